"""Descent in subspaces for the gated program: any smooth loss, any number of rows and outputs.

The Hessian of the loss is nearly the same for all ``K`` outputs, so every preconditioned gradient gives ``K``
directions, and every output may take its own combination of them. An iteration minimises the objective itself over
``S + U C``: the columns of ``U`` (P q, m) are those of the preconditioned gradient and of the last steps, ``C`` is
(m, K). For the squared loss and fixed weights of the penalty this is the conjugate gradient method for blocks of
right-hand sides (O'Leary 1980). Outputs are linear in the blocks, so an iteration costs one product for the outputs
of the gradient and one for the next gradient, ``4 n q P K`` flops, in float32.

An output bias without penalty is one more direction of every search, and the best one wherever a point is certified.

The dual point is the residual, scaled until it is feasible, and lags behind: where the objective is right to 1e-5
some ``||A' D_i V||`` are still 1e-3 above the weight decay. They are derivatives of the loss with respect to the
lengths of the blocks. So before a point is certified all lengths are chosen anew, by a bounded quadratic model with
a Hessian from some rows, which also sets to zero what should be zero. Certificates are taken in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import scipy.linalg
import scipy.optimize

from convexbn._threads import single_scipy_blas
from convexbn._types import Float, FloatMatrix
from convexbn.program.gated import Frobenius, GateBlocks, GatedProgram, MaskedRows, block_norms
from convexbn.solvers.base import Budget, Progress, Solution, Solver, Solves, nonzero, zero_solution
from convexbn.solvers.box_qp import minimise_nonnegative
from convexbn.solvers.gated.sketched_hessian import SketchedHessian, factor_hessian, row_curvature, sample_size

_COLUMNS = 10  # of last steps that are kept, in blocks of K, at least one block
_EVALUATIONS = 8  # of a search in a subspace
_SMALL = 1e-9  # norm relative to the mean below which the penalty of a block is majorised as if it were of this norm
_EARLY = 5.0  # gap to the tolerance at which a certificate is taken, since new lengths will lower it
_PATIENCE, _WARM_PATIENCE = 5, 2  # iterations without half the gap before new lengths, from zero and a warm start
_ROUNDING = 1e-14  # relative change of an objective by rounding in float64
_DOUBLE, _SINGLE = 1e-5, 1e-7  # relative gap that needs float64, and what float32 may change in the objective
_DEPENDENT = 1e-7  # relative eigenvalues of the Hessian of a subspace below this belong to dependent columns
_MOVED, _STALE = 1.1, 8  # mean factor of the penalty weights, or iterations, after which the Hessian is factorised


@dataclass(frozen=True)
class Subspace(Solver[GatedProgram, GateBlocks]):
    """Descent in subspaces with a sampled Hessian: any loss, any number of rows.

    Lower bounds in the history are valid and certified in float64; they change when a point is certified. Rows are
    sampled by a generator of the solver's own.

    Parameters
    ----------
    tol, max_iter : float, int
        Relative duality gap to reach, and largest number of iterations.

    """

    tol: float = 1e-6
    max_iter: int = 2000

    solves: ClassVar[Solves] = Solves(operators=(MaskedRows,), norms=(Frobenius,))

    def _solve(
        self, program: GatedProgram, start: GateBlocks | None, budget: Budget, rng: np.random.Generator
    ) -> Solution[GateBlocks]:
        self.solves.check("subspace", program)
        with single_scipy_blas():
            descent, stalled = _Descent(program, start), False
            history: list[Progress] = []
            if not descent.below_zero and (zero := zero_solution(program, budget)) is not None:
                return zero
            while True:
                if stalled or descent.due(self.tol):
                    before = descent.certified
                    stalled = descent.certify() > 0.9 * before and stalled
                live = np.flatnonzero(descent.norms)
                history.append(Progress(len(history) + 1, descent.objective, descent.bound, len(live)))
                reason = budget.stop_reason(history[-1], tol=0.9 * self.tol, max_iter=self.max_iter)
                if reason is not None or (stalled and descent.double):
                    return Solution(GateBlocks(live, descent.blocks[live]), reason or "stalled", history)
                if stalled or descent.certified <= _DOUBLE or descent.exhausted:
                    descent.use_double()
                stalled = not descent.step()


class _Descent:
    """A point with its outputs, dual and correlations, the last steps, and the best bound so far."""

    def __init__(self, program: GatedProgram, start: GateBlocks | None) -> None:
        self.program, self.loss, self.beta = program, program.loss.without_bias, program.weight_decay
        self.biased = self.loss is not program.loss
        self.kernels = program if sample_size(program) == len(program.operator.rows) else program.in_single_precision()
        self.rng = np.random.default_rng(0)
        blocks = np.zeros((program.n_gates, *program.block_shape))
        if start is not None:
            blocks[start.gate_index] = start.values
        self.bound = program.loss.dual_value(np.zeros_like(self.loss.targets))
        self.certified = self.halved = self.judged = np.inf
        self.exhausted, self.waiting, self.penalty = False, 0, np.ones(program.n_gates)
        self.patience = _PATIENCE if start is None else _WARM_PATIENCE
        outputs = _outputs(self.kernels, blocks)
        self.bias = program.loss.best_bias(outputs)
        self._move_to(blocks, outputs + self.bias)
        self._forget()

    @property
    def double(self) -> bool:
        """Whether products are made in float64."""
        return self.kernels is self.program

    def use_double(self) -> None:
        """Make products and factors in float64 from now on."""
        if not self.double:
            self.kernels = self.program
            self._forget()  # outputs of the last steps are in float32

    def _move_to(
        self, blocks: Float, outputs: Float, kernels: GatedProgram | None = None, dual: Float | None = None
    ) -> None:
        self.blocks, self.outputs = blocks, outputs
        self.norms = block_norms(blocks)
        loss, here = self.loss.value_and_dual(self.outputs)
        self.objective = loss + self.beta * float(self.norms.sum())
        self.dual = here if dual is None else dual
        self.correlations = _in_range((kernels or self.kernels).correlations, self.dual)

    @property
    def below_zero(self) -> bool:
        """Whether the point has a lower objective than zero, which then is no optimum."""
        at_zero = self.program.loss.value(np.zeros_like(self.outputs))
        return bool(self.norms.any()) and self.objective < at_zero * (1 - _SINGLE)

    @property
    def gap(self) -> float:
        """Relative gap to the last certified bound."""
        return (self.objective - self.bound) / self.objective if self.objective else 0.0

    def due(self, tol: float) -> bool:
        """Whether a certificate may end the solve, or new lengths may lower a stagnant gap."""
        wanted = max(tol, self.certified / 3) if np.isfinite(self.certified) else _EARLY * tol
        # as far as float32 and the output bias are right
        estimate = self.objective - self.loss.dual_value(self._feasible(0.0) * self.dual)
        estimate /= self.objective or 1.0
        self.waiting += 1
        if estimate < 0.5 * self.halved:
            self.halved, self.waiting = estimate, 0
        return self.waiting >= self.patience or self.gap <= tol or estimate <= wanted

    def certify(self) -> float:
        """Choose the lengths of all blocks anew, and compute objective, bound and their gap there in float64."""
        before, unchanged, last = self.objective, self.blocks, self.judged
        self._judge(self._best_factors()[:, None, None] * unchanged)
        if self.objective > before * (1 + (_ROUNDING if self.double else _SINGLE)):
            self._judge(unchanged)
        elif np.count_nonzero(self.norms) < np.count_nonzero(unchanged.any(axis=(1, 2))):
            self._forget()  # the last steps would move blocks that are zero now
        loss, rounding = self.program.loss, self.program.correlation_rounding(self.dual)
        self.bound = loss.dual_value(self._feasible(rounding) * self.dual)
        self.certified = self.halved = self.gap
        self.judged, self.waiting = self.objective, 0
        self.exhausted = self.objective > last * (1 - _SINGLE)  # a decrease that float32 cannot resolve
        return self.certified

    def _judge(self, blocks: Float) -> None:
        loss, outputs = self.program.loss, _outputs(self.program, blocks)
        self.bias = loss.best_bias(outputs, self.bias)
        self._move_to(blocks, outputs + self.bias, self.program, loss.dual_at(outputs, self.bias))

    def _forget(self) -> None:
        self.age = _STALE
        self.steps = np.zeros((self.blocks[..., 0].size, 0))  # columns of U, the newest first
        self.step_outputs = np.zeros((len(self.program.operator.rows), 0))

    def _feasible(self, rounding: float) -> float:
        """Factor that makes the dual point feasible."""
        return self.beta / max(self.beta, float(block_norms(self.correlations).max()) + rounding)

    def _best_factors(self) -> Float:
        """Factors ``z >= 0`` of the blocks by a quadratic model with the sample's Hessian: (P,)."""
        live = np.flatnonzero(self.norms)
        factors = np.zeros(len(self.norms))
        if not len(live):
            return factors
        blocks = self.blocks[live]
        slope = self.beta * self.norms[live] - np.einsum("mqk,mqk->m", blocks, self.correlations[live])
        hessian = factor_hessian(self.kernels, live, blocks, self.outputs, self.rng)
        try:
            ones = np.ones(len(live))
            factors[live] = minimise_nonnegative(hessian, hessian @ ones - slope, ones)
        except np.linalg.LinAlgError:  # the curvature of a saturated loss is rounding
            factors[live] = 1.0
        return factors

    def step(self) -> bool:
        """Minimise over the preconditioned gradient and the last steps; whether the objective decreased."""
        unchanged = self.blocks
        try:
            decreased = self._descend()
        except np.linalg.LinAlgError:  # the curvature overflows, or is rounding
            decreased = False
        if not np.isfinite(self.objective):
            self._judge(unchanged)
            self._forget()
            return False
        return decreased

    def _descend(self) -> bool:
        before = self.objective
        self._admit()
        if not self.norms.any():  # the loss is too large for its decrease to be seen
            return False
        direction = self._precondition()
        shape, K = direction.shape, direction.shape[2]
        columns = np.hstack([direction.reshape(-1, K), self.steps])
        outputs = np.hstack([_outputs(self.kernels, direction), self.step_outputs])
        if self.biased:
            columns, outputs = _joined(columns, 0.0), _joined(outputs, 1.0)
        combination = self._search(columns, outputs)
        if self.biased:
            self.bias = self.bias + combination[-1]
        moved, seen = columns @ combination, outputs @ combination
        self._move_to(self.blocks + moved.reshape(shape), self.outputs + seen)
        kept = max(1, _COLUMNS // K) * K
        self.steps = np.hstack([moved, self.steps])[:, :kept]
        self.step_outputs = np.hstack([seen, self.step_outputs])[:, :kept]
        if self.objective < before or (moved.any() and self.objective <= before * (1 + _ROUNDING)):
            return True
        self._forget()
        return False

    def _admit(self) -> None:
        """Let blocks leave zero by a proximal gradient step of best length, if they violate optimality most."""
        at_zero, pull = self.norms == 0, block_norms(self.correlations)
        if pull[at_zero].max(initial=0.0) <= max(self.beta, pull[~at_zero].max(initial=0.0)):
            return
        entering = np.where(at_zero, 1 - self.beta / np.maximum(pull, self.beta), 0)[:, None, None] * self.correlations
        seen = _outputs(self.kernels, entering)
        price = self.beta * float(block_norms(entering).sum())  # linear along the step
        length = scipy.optimize.minimize_scalar(lambda t: self.loss.value(self.outputs + t * seen) + t * price).x
        self._move_to(self.blocks + length * entering, self.outputs + length * seen)

    def _precondition(self) -> Float:
        """Inverse of the sampled Hessian times the negative gradient; blocks at zero stay there."""
        live = self.norms > 0
        self._renew_hessian()
        pull = (self.beta / np.where(live, self.norms, 1.0))[:, None, None] * self.blocks
        downhill = np.where(live[:, None, None], self.correlations - pull, 0.0)
        direction = _in_range(self.hessian.solve, downhill)
        direction[~live] = 0
        return direction

    def _renew_hessian(self) -> None:
        """Factorise the Hessian at this point unless a recent factor has nearly the same penalty weights."""
        live = self.norms > 0
        mean = float(self.norms[live].mean())
        penalty = self.beta / np.where(live, np.maximum(self.norms, _SMALL * mean), mean)
        self.age += 1
        if self.age > _STALE or np.mean(np.abs(np.log(penalty / self.penalty))) > np.log(_MOVED):
            self.hessian = SketchedHessian.at(self.kernels, penalty, self.outputs, self.rng)
            self.penalty, self.age = penalty, 0

    def _search(self, columns: Float, outputs: Float) -> Float:
        """Combination ``C`` (m, K) of the columns that minimises the objective, by a few evaluations of L-BFGS."""
        metric = self._metric(columns, outputs)
        blocks, K = self.blocks.reshape(len(columns), -1), self.outputs.shape[1]

        def value_and_slope(combination: Float) -> tuple[float, Float]:
            here = (blocks + columns @ combination).reshape(self.blocks.shape)
            seen = self.outputs + outputs @ combination
            norms = block_norms(here)
            loss, dual = self.loss.value_and_dual(seen)
            value = loss + self.beta * float(norms.sum())
            here /= np.where(norms > 0, norms, 1.0)[:, None, None]
            slope = self.beta * columns.T @ here.reshape(len(columns), -1) - outputs.T @ dual
            return value, slope

        best = np.zeros((columns.shape[1], K))
        at_zero, slope = value_and_slope(best)
        lowest = at_zero
        unit = float(np.linalg.norm(metric.T @ slope)) or 1.0  # in these units a Newton step is 1

        def scaled(x: Float) -> tuple[float, Float]:
            nonlocal lowest, best
            combination: Float = unit * metric @ x.reshape(-1, K)
            value, slope = value_and_slope(combination)
            if value < lowest:  # L-BFGS forgets what it found in a line search cut short
                lowest, best = value, combination
            return (value - at_zero) / unit**2, (metric.T @ slope).ravel() / unit

        found = scipy.optimize.minimize(
            scaled, np.zeros(metric.shape[1] * K), jac=True, method="L-BFGS-B", options={"maxfun": _EVALUATIONS}
        )
        if found.nfev > 2 * _EVALUATIONS:  # a far too long step: the curvature of a saturating loss has changed
            self.age = _STALE
        return best

    def _metric(self, columns: Float, outputs: Float) -> Float:
        """``T`` with ``T' H T = I`` for the Hessian of an output in its combination, without dependent columns."""
        curvature = row_curvature(self.loss, self.outputs)
        penalty = np.repeat(self.penalty, self.blocks.shape[1])
        hessian = (outputs.T * curvature) @ outputs + (columns.T * penalty) @ columns
        scale = 1 / np.sqrt(np.maximum(hessian.diagonal(), np.finfo(float).tiny))
        hessian = scale[:, None] * hessian * scale
        if not np.isfinite(hessian).all():
            raise np.linalg.LinAlgError("the Hessian of the subspace overflows.")
        values, vectors = scipy.linalg.eigh(hessian, check_finite=False)
        kept = values > _DEPENDENT * values[-1]
        return scale[:, None] * vectors[:, kept] / np.sqrt(values[kept])


def _joined(columns: Float, value: float) -> Float:
    """Columns and one more of equal entries."""
    return np.hstack([columns, np.full((len(columns), 1), value)])


def _outputs(program: GatedProgram, blocks: Float) -> Float:
    """Outputs of all blocks (P, q, K); products take the nonzero ones alone."""
    index, values = nonzero(blocks)
    return _in_range(lambda live: program.outputs(index, live), values)


def _in_range(linear: Callable[[Float], FloatMatrix], array: Float) -> Float:
    """A linear function at an array that is scaled by a power of two to entries below 1, so in float32's range."""
    exponent = np.frexp(np.abs(array).max(initial=0.0))[1]
    return np.ldexp(linear(np.ldexp(array, -exponent)).astype(np.float64, copy=False), exponent)
