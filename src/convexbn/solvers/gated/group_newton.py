"""Newton's method on the group scales of the gated program with squared loss.

``||S_i|| = min over eta_i >= 0 of (||S_i||^2 / eta_i + eta_i) / 2`` turns the program into a smooth convex
one in the scales ``eta`` alone, as in multiple-kernel learning with one kernel a gate:

    J(eta) = weight_decay / 2 [tr Y' C^{-1} Y + sum eta],   C(eta) = weight_decay I + (A A') o (M diag(eta) M')

With ``alpha = C^{-1} Y`` the blocks are ``S_i = eta_i A' D_i alpha``, the residual is ``weight_decay alpha``,
and with ``w_i = D_i A A' D_i alpha`` the derivatives are ``dJ_i = weight_decay / 2 (1 - ||A' D_i alpha||^2)`` and
``H_ij = weight_decay <w_i, C^{-1} w_j>``. With an output bias without penalty targets, ``alpha`` and ``w_i`` are
projected onto the complement of the constant, and ``C^{-1}`` is the inverse on it. Scales at zero stay exactly zero, so
the working set is the support.

Flops of an iteration with |W| gates at work: ``n^2 |W|`` (C), ``n^3 / 3`` (Cholesky), ``n^2 |W| K`` (triangular
solve), ``n |W|^2 K`` (Hessian), in float32 from ``n = 500`` on; ``2 n q P K`` (all gradients) and
``4 n q |W| K`` a refinement step in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import scipy.linalg

from convexbn._types import EPS, Float, FloatMatrix, Index
from convexbn.program.gated import Frobenius, GateBlocks, GatedProgram, MaskedRows, block_norms
from convexbn.program.losses import SquaredLoss
from convexbn.solvers.base import Budget, Progress, Solution, Solver, Solves, zero_solution
from convexbn.solvers.box_qp import minimise_nonnegative

_SMALL = 500  # below this many rows everything is factorised in float64
_ROUNDING, _PATIENCE = 1e-14, 3  # relative change that is rounding, and iterations of no other before the end


@dataclass(frozen=True)
class GroupNewton(Solver[GatedProgram, GateBlocks]):
    """Newton on the group scales: squared loss, up to some thousand rows, one Cholesky an iteration.

    Parameters
    ----------
    tol, max_iter : float, int
        Relative duality gap to reach, and largest number of Newton iterations.
    """

    tol: float = 1e-6
    max_iter: int = 200

    solves: ClassVar[Solves] = Solves(losses=(SquaredLoss,), operators=(MaskedRows,), norms=(Frobenius,))

    def _solve(
        self, program: GatedProgram, start: GateBlocks | None, budget: Budget, rng: np.random.Generator
    ) -> Solution[GateBlocks]:
        self.solves.check("group_newton", program)
        if (zero := zero_solution(program, budget)) is not None:
            return zero
        state = _Scaled(program)
        scales = state.initial_scales(block_norms(program.correlations_at_zero) / state.unit, start)
        point = state.evaluate(scales, accuracy=1.0)
        history: list[Progress] = []
        lowest, idle = np.full(3, np.inf), 0
        while True:
            gradients = state.program.correlations(point.alpha)
            norms = block_norms(gradients)
            history.append(state.report(len(history) + 1, point, norms))
            values = np.array([point.value, history[-1].objective, -history[-1].lower_bound])
            idle = 0 if (values < lowest - _ROUNDING * np.abs(values)).any() else idle + 1
            lowest = np.minimum(lowest, values)
            # the certificate is taken at the residual, which differs from weight_decay * alpha by rounding
            reason = budget.stop_reason(history[-1], tol=0.8 * self.tol, max_iter=self.max_iter)
            following = None
            if reason is None and idle < _PATIENCE:
                relative = max(history[-1].relative_gap ** 2, self.tol, EPS)  # what a Newton step may reach
                following = _newton_step(state, point, gradients, norms, relative)
            if following is None:
                active = np.flatnonzero(point.scales)
                blocks = state.unit * point.scales[active, None, None] * gradients[active]
                return Solution(GateBlocks(active, blocks), reason or "stalled", history, state.n_factorizations)
            point = following


def _newton_step(state: _Scaled, point: _Point, gradients: Float, norms: Float, accuracy: float) -> _Point | None:
    """One step on the working set with backtracking; None when no step decreases ``J``."""
    working = _working_set(point.scales, norms)
    old, norms = point.scales[working], norms[working]
    slope = 0.5 * state.beta * (1 - norms**2)
    # Where a scale should grow, first take the slope for which the model is Newton's for 1 / norm_i = 1, up to a factor
    # a row: 1 / norm_i is nearly linear in the scales where norm_i^2 is nearly a hyperbola, as in the secular equation
    # of a trust region (More and Sorensen 1983).
    secular = np.where(norms > 1, state.beta * norms**2 * (1 - norms), slope)
    hessian = state.hessian(working, gradients[working])
    for modelled, halvings in ((secular, 4), (slope, 30)):
        step = minimise_nonnegative(hessian, hessian @ old - modelled, old) - old
        for _ in range(halvings):
            scales = point.scales.copy()
            scales[working] = np.maximum(old + step, 0)
            if not scales.any():
                scales = 0.1 * point.scales
            trial = state.evaluate(scales, accuracy)
            decrease = min(slope @ (scales[working] - old), 0.0)
            if trial.value <= point.value + 1e-4 * decrease + 1e-13 * abs(point.value):
                return trial if np.any(scales != point.scales) else None
            step *= 0.5
    return None


@dataclass(frozen=True)
class _Point:
    """``J`` and its parts at one vector of scales."""

    scales: Float  # (P,)
    alpha: Float  # C^{-1} Y, (n, K)
    outputs: Float  # sum_i eta_i D_i A A' D_i alpha, exactly that of the blocks, (n, K)
    value: float  # J


class _Scaled:
    """The program on rows scaled by sqrt(w) and targets scaled to unit norm, with its kernels and factors."""

    def __init__(self, program: GatedProgram) -> None:
        root = np.sqrt(program.loss.weights)[:, None]
        biased = program.loss is not program.loss.without_bias
        self.constant_row = root / np.linalg.norm(root) if biased else np.zeros_like(root)  # (n, 1), of unit norm or 0
        targets = self.projected(root * program.loss.targets)
        largest = float(np.abs(targets).max()) or 1.0
        self.unit = 2.0 ** np.frexp(largest * np.linalg.norm(targets / largest))[1]
        self.targets, self.constant = targets / self.unit, program.loss.without_bias.constant
        # below 1e-12 only the kernel matters; the judge still takes the weight decay as it is
        self.beta = max(program.weight_decay / self.unit, 1e-12)
        self.program = replace(
            program,
            operator=replace(program.operator, rows=root * program.operator.rows),
            loss=SquaredLoss(self.targets, np.ones(len(targets))),
            weight_decay=self.beta,
        )
        self.n_factorizations = 0
        self._use(np.dtype(np.float32 if len(targets) >= _SMALL else np.float64))

    def projected(self, columns: Float) -> Float:
        """Columns (n, K) without what an output bias fits."""
        return columns - self.constant_row * (self.constant_row.T @ columns)

    def _use(self, dtype: np.dtype) -> None:
        """Build ``A``, ``A A'`` and room for ``C`` in the precision of the factorisation."""
        self.rows = self.program.operator.rows.astype(dtype)
        self.gram = (self.rows @ self.rows.T).T  # symmetric, in LAPACK's order
        self.factor = np.zeros_like(self.gram)  # syrk and potrf touch the lower triangle only
        self.syrk, self.trsm = scipy.linalg.get_blas_funcs(("syrk", "trsm"), (self.gram,))
        self.potrf, self.potrs = scipy.linalg.get_lapack_funcs(("potrf", "potrs"), (self.gram,))

    def initial_scales(self, norms: Float, start: GateBlocks | None) -> Float:
        """Scales of a warm start (norms of its blocks), or equal ones on the 64 largest gates."""
        scales = np.zeros(len(norms))
        if start is not None and len(start.gate_index):
            scales[start.gate_index] = block_norms(start.values) / self.unit
            return scales
        largest = np.argsort(-norms, kind="stable")[:64]
        scales[largest] = np.linalg.norm(self.targets) / len(largest)
        return scales

    def evaluate(self, scales: Float, accuracy: float) -> _Point:
        """Factorise ``C``, solve for ``alpha`` by refined conjugate gradients, and evaluate ``J``."""
        active, operator = np.flatnonzero(scales), self.program.operator
        restricted = MaskedRows(operator.rows, operator.patterns[:, active].astype(np.float64))
        self._factorize(scales[active], active)

        def image(alpha: Float) -> Float:  # the masked kernel, without forming it
            return self.projected(restricted.apply(None, scales[active, None, None] * restricted.adjoint(alpha)))

        alpha, outputs = self._conjugate_gradients(image, goal=0.03 * self.beta * accuracy)
        fitted = self.beta * alpha + outputs
        # second-order accurate in the error of alpha, unlike <Y, alpha>
        value = 0.5 * self.beta * float(np.sum(alpha * (2 * self.targets - fitted)) + scales.sum())
        return _Point(scales, alpha, outputs, value)

    def _factorize(self, scales: Float, active: Index) -> None:
        """Lower Cholesky factor of ``C`` in place, in float32 while that is enough."""
        for ridge in (0.0, 0.0, 1e-14, 1e-11, 1e-8, 1e-5):
            root = np.sqrt(scales).astype(self.rows.dtype)[:, None]
            C = self.syrk(1.0, (root * self._gates(active)).T, beta=0.0, c=self.factor, lower=1, overwrite_c=1)
            C *= self.gram
            diagonal = np.einsum("ii->i", C)
            diagonal += self.beta + ridge * diagonal.max()
            self.n_factorizations += 1
            self.factor, info = self.potrf(C, lower=1, overwrite_a=1, clean=0)
            if not info:
                self.solved_constant = self._solve(self.constant_row)
                return
            if self.rows.dtype == np.float32:
                self._use(np.dtype(np.float64))
        raise np.linalg.LinAlgError("the kernel of the group scales could not be factorised; raise weight_decay.")

    def _gates(self, index: Index) -> FloatMatrix:
        """Patterns of the gates ``index``, one a row, in the precision of the factorisation."""
        return np.ascontiguousarray(self.program.operator.patterns.T[index], dtype=self.rows.dtype)

    def _solve(self, right: Float) -> Float:
        return self.potrs(self.factor, right.astype(self.factor.dtype), lower=1)[0].astype(np.float64)

    def _conjugate_gradients(self, image: Callable[[Float], Float], goal: float) -> tuple[Float, Float]:
        """Solve ``(beta I + image) alpha = Y`` in float64, one run a column, preconditioned by the factor."""

        def solve(right: Float) -> Float:  # the inverse of C on the complement of the constant
            inner = self._solve(right)
            along = self.constant_row.T @ inner / max(float(np.vdot(self.constant_row, self.solved_constant)), 1e-300)
            return self.projected(inner - self.solved_constant * along)

        alpha = solve(self.targets)
        outputs = image(alpha)
        residual = self.targets - self.beta * alpha - outputs
        direction = np.zeros_like(alpha)
        old = np.ones(alpha.shape[1])
        for _ in range(60):
            if np.linalg.norm(residual) <= goal:
                break
            preconditioned = solve(residual)
            new = np.einsum("nk,nk->k", residual, preconditioned)
            direction = preconditioned + _ratio(new, old) * direction * (direction.any())
            along = image(direction)
            curvature = np.einsum("nk,nk->k", direction, self.beta * direction + along)
            step = _ratio(new, curvature)
            alpha = alpha + step * direction
            outputs = outputs + step * along
            residual = residual - step * (self.beta * direction + along)
            old = new
        return alpha, outputs

    def report(self, iteration: int, point: _Point, norms: Float) -> Progress:
        """Primal value of the blocks, and the dual value of the feasible multiple of ``beta alpha``."""
        penalty = float(point.scales @ norms)
        objective = 0.5 * float(np.sum((self.targets - point.outputs) ** 2)) + self.beta * penalty
        dual = self.beta * point.alpha
        inner, square = float(np.sum(dual * self.targets)), float(np.sum(dual**2))
        t = min(inner / square, 1 / norms.max()) if square > 0 else 0.0
        bound = t * inner - 0.5 * t**2 * square
        objective, bound = (value * self.unit**2 + self.constant for value in (objective, bound))
        return Progress(iteration, objective, bound, int(np.count_nonzero(point.scales)))

    def hessian(self, working: Index, gradients: Float) -> Float:
        """``H_ij = beta <w_i, C^{-1} w_j> = beta <L^{-1} w_i, L^{-1} w_j>`` at the point evaluated last."""
        q, K = self.program.block_shape
        columns = gradients.transpose(0, 2, 1).reshape(-1, q).astype(self.rows.dtype) @ self.rows.T
        columns.reshape(len(working), K, -1)[...] *= self._gates(working)[:, None]
        solved = self.trsm(1.0, self.factor, columns.T, lower=1, overwrite_b=1).T
        constant = self.trsm(1.0, self.factor, self.constant_row.astype(self.rows.dtype), lower=1)
        constant /= max(float(np.linalg.norm(constant)), 1e-30)
        solved -= (solved @ constant) * constant.T
        stacked = solved.reshape(len(working), -1).astype(np.float64)  # of rounded columns too semidefinite to 1e-16
        return self.beta * (stacked @ stacked.T)


def _working_set(scales: Float, norms: Float) -> Index:
    """The support and the worst violators of ``||A' D_i alpha|| <= 1``, at most twice as many (or 64)."""
    support = scales > 0
    outside = np.flatnonzero(~support & (norms > 1))
    worst = outside[np.argsort(-norms[outside], kind="stable")[: max(64, 2 * int(support.sum()))]]
    return np.sort(np.concatenate([np.flatnonzero(support), worst]))


def _ratio(numerator: Float, denominator: Float) -> Float:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
