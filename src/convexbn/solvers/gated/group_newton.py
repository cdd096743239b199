"""Newton's method on the group scales of the gated program with squared loss.

``||S_i|| = min over eta_i >= 0 of (||S_i||^2 / eta_i + eta_i) / 2`` turns the program into a smooth convex
one in the scales ``eta`` alone, as in multiple-kernel learning with one kernel a gate:

    J(eta) = weight_decay / 2 [tr Y' C^{-1} Y + sum eta],   C(eta) = weight_decay I + (A A') o (M diag(eta) M')

With ``alpha = C^{-1} Y`` the blocks are ``S_i = eta_i A' D_i alpha``, the residual is ``weight_decay alpha``,
and with ``w_i = D_i A A' D_i alpha`` the derivatives are ``dJ_i = weight_decay / 2 (1 - ||A' D_i alpha||^2)`` and
``H_ij = weight_decay <w_i, C^{-1} w_j>``. Scales at zero stay exactly zero, so the working set is the support.

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

from convexbn._types import Float, FloatMatrix, Index
from convexbn.program.gated import Frobenius, GateBlocks, GatedProgram, MaskedRows, block_norms
from convexbn.program.losses import SquaredLoss
from convexbn.solvers.base import Budget, Progress, Solution, Solves, zero_solution
from convexbn.solvers.box_qp import minimise_nonnegative

#: Below this many rows everything is factorised in float64.
_SMALL = 500


@dataclass(frozen=True)
class GroupNewton:
    """Newton on the group scales: squared loss, up to some thousand rows, one Cholesky an iteration.

    Parameters
    ----------
    tol : float, default=1e-6
        Relative duality gap to reach.
    max_iter : int, default=200
        Largest number of Newton iterations.
    """

    tol: float = 1e-6
    max_iter: int = 200

    solves: ClassVar[Solves] = Solves(losses=(SquaredLoss,), operators=(MaskedRows,), norms=(Frobenius,))

    def solve(
        self,
        program: GatedProgram,
        start: GateBlocks | None = None,
        budget: Budget | None = None,
        rng: np.random.Generator | None = None,
    ) -> Solution[GateBlocks]:
        """Solve the program.

        Parameters
        ----------
        program : GatedProgram
        start : GateBlocks, optional
            A warm start.
        budget : Budget, optional
        rng : numpy.random.Generator, optional
            Not used: nothing is random.

        Raises
        ------
        TypeError
            For another loss than the squared one, and for convolutional programs; use ``Proximal``.
        """
        self.solves.check("group_newton", program)
        budget = budget or Budget()
        zero = zero_solution(program, budget)
        if zero is not None:
            return zero
        state = _Scaled(program)
        norms = block_norms(program.correlations_at_zero) / state.unit
        scales = state.initial_scales(norms, start)
        point = state.evaluate(scales, accuracy=1.0)
        history: list[Progress] = []
        while True:
            gradients = state.program.correlations(point.alpha)
            norms = block_norms(gradients)
            objective, bound = state.gap(point, norms)
            unit = state.unit**2
            history.append(
                Progress(
                    len(history) + 1,
                    objective * unit + program.loss.constant,
                    bound * unit + program.loss.constant,
                    int(np.count_nonzero(point.scales)),
                )
            )
            # the certificate is taken at the residual, which differs from weight_decay * alpha by rounding
            reason = budget.stop_reason(history[-1], tol=0.8 * self.tol, max_iter=self.max_iter)
            following = None
            if reason is None:
                relative = max(history[-1].relative_gap ** 2, self.tol)  # what a Newton step may reach
                following = self._newton_step(state, point, gradients, norms, accuracy=relative)
            if reason is not None or following is None:
                return state.solution(point, gradients, reason or "stalled", history)
            point = following

    def _newton_step(
        self, state: _Scaled, point: _Point, gradients: Float, norms: Float, accuracy: float
    ) -> _Point | None:
        """One step on the working set with backtracking; None when no step decreases ``J``."""
        working = _working_set(point.scales, norms)
        slope = 0.5 * state.beta * (1 - norms[working] ** 2)
        hessian = state.hessian(working, gradients[working])
        old = point.scales[working]
        for modelled, halvings in ((_secular(slope, norms[working], state.beta), 4), (slope, 30)):
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
    """``J`` and its ingredients at one vector of scales."""

    scales: Float  # (P,)
    alpha: Float  # C^{-1} Y, (n, K)
    outputs: Float  # sum_i eta_i D_i A A' D_i alpha, exactly that of the blocks, (n, K)
    value: float  # J


class _Scaled:
    """The program on rows scaled by sqrt(w) and targets scaled to unit norm, with its kernels and factors."""

    def __init__(self, program: GatedProgram) -> None:
        root = np.sqrt(program.loss.weights)[:, None]
        targets = root * program.loss.targets
        largest = float(np.abs(targets).max()) or 1.0
        self.unit = 2.0 ** np.frexp(largest * np.linalg.norm(targets / largest))[1]
        self.targets = targets / self.unit
        # below this the kernel is all there is; the judge still takes the weight decay as it is
        self.beta = max(program.weight_decay / self.unit, 1e-12)
        self.program = replace(
            program,
            operator=replace(program.operator, rows=root * program.operator.rows),
            loss=SquaredLoss(self.targets, np.ones(len(targets))),
            weight_decay=self.beta,
        )
        self.n_factorizations = 0
        self._use(np.dtype(np.float32 if len(targets) >= _SMALL else np.float64))

    def _use(self, dtype: np.dtype) -> None:
        """Build what the factorisation reads in its precision: ``A`` and ``A A'``, and room for ``C``."""
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
        active = np.flatnonzero(scales)
        operator = self.program.operator
        restricted = replace(operator, patterns=operator.patterns[:, active])
        self._factorize(scales[active], active)
        everything = np.arange(len(active))

        def image(alpha: Float) -> Float:  # the masked kernel, without forming it
            return restricted.apply(everything, scales[active, None, None] * restricted.adjoint(alpha))

        goal = 0.03 * self.beta * accuracy
        alpha, outputs = self._conjugate_gradients(image, goal)
        fitted = self.beta * alpha + outputs
        # second-order accurate in the error of alpha, unlike <Y, alpha>
        value = 0.5 * self.beta * float(np.sum(alpha * (2 * self.targets - fitted)) + scales.sum())
        return _Point(scales, alpha, outputs, value)

    def _factorize(self, scales: Float, active: Index) -> None:
        """Lower Cholesky factor of ``C`` in place, in float32 while that is enough."""
        for ridge in (0.0, 0.0, 1e-14, 1e-11, 1e-8, 1e-5):
            root = np.sqrt(scales).astype(self.rows.dtype)
            columns = (root[:, None] * self._gates(active)).T
            C = self.syrk(1.0, columns, beta=0.0, c=self.factor, lower=1, overwrite_c=1)
            C *= self.gram
            diagonal = np.einsum("ii->i", C)
            diagonal += self.beta + ridge * diagonal.max()
            self.n_factorizations += 1
            self.factor, info = self.potrf(C, lower=1, overwrite_a=1, clean=0)
            if info == 0:
                return
            if self.rows.dtype == np.float32:
                self._use(np.dtype(np.float64))
        raise FloatingPointError("the kernel of the group scales could not be factorised; raise weight_decay.")

    def _gates(self, index: Index) -> FloatMatrix:
        """Patterns of the gates ``index``, one a row, in the precision of the factorisation."""
        return np.ascontiguousarray(self.program.operator.patterns.T[index], dtype=self.rows.dtype)

    def _conjugate_gradients(self, image: Callable[[Float], Float], goal: float) -> tuple[Float, Float]:
        """Solve ``(beta I + image) alpha = Y`` in float64, one run a column, preconditioned by the factor."""

        def solve(right: Float) -> Float:
            right = right.astype(self.factor.dtype)
            return self.potrs(self.factor, right, lower=1)[0].astype(np.float64)

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

    def gap(self, point: _Point, norms: Float) -> tuple[float, float]:
        """Primal value of the blocks, and the dual value of the feasible multiple of ``beta alpha``."""
        penalty = float(point.scales @ norms)
        objective = 0.5 * float(np.sum((self.targets - point.outputs) ** 2)) + self.beta * penalty
        dual = self.beta * point.alpha
        inner, square = float(np.sum(dual * self.targets)), float(np.sum(dual**2))
        t = min(inner / square, 1 / norms.max()) if square > 0 else 0.0
        return objective, t * inner - 0.5 * t**2 * square

    def hessian(self, working: Index, gradients: Float) -> Float:
        """``H_ij = beta <w_i, C^{-1} w_j> = beta <L^{-1} w_i, L^{-1} w_j>`` at the point evaluated last."""
        q, K = self.program.block_shape
        columns = gradients.transpose(0, 2, 1).reshape(-1, q).astype(self.rows.dtype) @ self.rows.T
        columns.reshape(len(working), K, -1)[...] *= self._gates(working)[:, None]
        solved = self.trsm(1.0, self.factor, columns.T, lower=1, overwrite_b=1).T
        stacked = solved.reshape(len(working), -1)
        return self.beta * (stacked @ stacked.T).astype(np.float64)

    def solution(self, point: _Point, gradients: Float, reason: str, history: list[Progress]) -> Solution[GateBlocks]:
        """Blocks ``S_i = eta_i A' D_i alpha`` in the units of the program."""
        active = np.flatnonzero(point.scales)
        blocks = self.unit * point.scales[active, None, None] * gradients[active]
        return Solution(GateBlocks(active, blocks), reason, history, self.n_factorizations)


def _working_set(scales: Float, norms: Float) -> Index:
    """The support and the worst violators of ``||A' D_i alpha|| <= 1``, at most twice as many (or 64)."""
    support = scales > 0
    outside = np.flatnonzero(~support & (norms > 1))
    count = max(64, 2 * int(support.sum()))
    worst = outside[np.argsort(-norms[outside], kind="stable")[:count]]
    return np.sort(np.concatenate([np.flatnonzero(support), worst]))


def _secular(slope: Float, norms: Float, beta: float) -> Float:
    """Slope for which the quadratic model is Newton's for ``1 / norm_i = 1`` where a scale should grow.

    ``1 / norm_i`` is nearly linear in the scales where ``norm_i^2`` is nearly a hyperbola, as in the secular
    equation of a trust region (More and Sorensen 1983); the Jacobian is that of ``J`` up to a factor a row.
    """
    return np.where(norms > 1, beta * norms**2 * (1 - norms), slope)


def _ratio(numerator: Float, denominator: Float) -> Float:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
