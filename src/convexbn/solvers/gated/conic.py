"""The gated program with squared loss handed to Clarabel, an interior-point conic solver: the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import scipy.sparse

from convexbn._types import Float
from convexbn.program.gated import Frobenius, GateBlocks, GatedProgram
from convexbn.program.losses import SquaredLoss
from convexbn.solvers.base import Budget, Progress, Solution, Solver, Solves


@dataclass(frozen=True)
class Conic(Solver[GatedProgram, GateBlocks]):
    """Clarabel on ``min 1/2 ||R||^2 + beta sum t_i`` s.t. ``R = sqrt(w) (sum_i D_i A S_i - Y)``, ``||S_i|| <= t_i``.

    If the loss has an output bias ``b``, it is added to the outputs.

    For small programs: the constraint matrix has ``n K q P`` nonzeros. An interior point takes no warm start.

    Parameters
    ----------
    tol, max_iter : float, int
        Relative gap, at a hundredth of which Clarabel runs, and largest number of interior-point iterations.
    """

    tol: float = 1e-6
    max_iter: int = 200

    solves: ClassVar[Solves] = Solves(losses=(SquaredLoss,), norms=(Frobenius,))

    def _solve(
        self, program: GatedProgram, start: GateBlocks | None, budget: Budget, rng: np.random.Generator
    ) -> Solution[GateBlocks]:
        self.solves.check("conic", program)
        try:
            import clarabel
        except ImportError as error:
            raise ImportError("solver='conic' needs Clarabel: pip install 'convexbn[reference]'.") from error
        settings = clarabel.DefaultSettings()
        settings.verbose, settings.max_iter = False, self.max_iter
        settings.tol_gap_rel = settings.tol_gap_abs = settings.tol_feas = min(0.01 * self.tol, 1e-8)
        if budget.time_limit is not None:
            settings.time_limit = max(budget.time_limit, 1e-3)
        return _solution(program, clarabel.DefaultSolver(*_problem(program, clarabel), settings).solve())


def _problem(program: GatedProgram, clarabel):  # type: ignore[no-untyped-def]
    """``P, q, A, b, cones`` for variables ``(R, S_1, t_1, S_2, t_2, ..., b)``."""
    (n, K), (q, _), m = program.loss.targets.shape, program.block_shape, program.n_gates
    root = np.sqrt(program.loss.weights)[:, None]
    bias = 0 if program.loss is program.loss.without_bias else K
    end = n * K + m * (q * K + 1)
    size = end + bias
    quadratic = scipy.sparse.diags(np.r_[np.ones(n * K), np.zeros(size - n * K)]).tocsc()
    linear = np.zeros(size)
    linear[n * K + q * K : end : q * K + 1] = program.weight_decay
    columns: list[scipy.sparse.spmatrix] = [scipy.sparse.identity(n * K)]
    for i in range(m):
        block = scipy.sparse.kron(root * program.operator.gate(i), scipy.sparse.identity(K))
        columns += [-block, scipy.sparse.csc_matrix((n * K, 1))]
    columns.append(-scipy.sparse.kron(root, scipy.sparse.identity(K), format="csc")[:, :bias])
    # cone rows hold (t_i, S_i) = b - A x with b = 0
    order = np.roll(np.arange(n * K, end).reshape(m, -1), 1, axis=1).ravel()
    count = len(order)
    cone = scipy.sparse.csc_matrix((-np.ones(count), (np.arange(count), order)), shape=(count, size))
    constraints = scipy.sparse.vstack([scipy.sparse.hstack(columns), cone]).tocsc()
    right = np.r_[-(root * program.loss.targets).ravel(), np.zeros(count)]
    cones = [clarabel.ZeroConeT(n * K)] + [clarabel.SecondOrderConeT(q * K + 1)] * m
    return quadratic, linear, constraints, right, cones


def _solution(program: GatedProgram, answer) -> Solution[GateBlocks]:  # type: ignore[no-untyped-def]
    """Blocks above the solver's own accuracy, with its reason for stopping."""
    (n, K), (q, _) = program.loss.targets.shape, program.block_shape
    count = program.n_gates * (q * K + 1)
    stacked = np.asarray(answer.x)[n * K : n * K + count].reshape(program.n_gates, -1)
    blocks: Float = stacked[:, :-1].reshape(-1, q, K)
    index = np.flatnonzero(stacked[:, -1] > 1e-9 * max(stacked[:, -1].max(initial=0.0), 0.0))
    solved = str(answer.status) in ("Solved", "AlmostSolved")
    reason = "tolerance" if solved else ("time_limit" if "Time" in str(answer.status) else "max_iter")
    history = [Progress(answer.iterations, answer.obj_val + program.loss.constant, answer.obj_val_dual, len(index))]
    return Solution(GateBlocks(index, blocks[index]), reason, history)
