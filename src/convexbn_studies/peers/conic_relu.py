"""The ReLU program over all activation patterns, written out for CVXPY and solved by Clarabel: the reference.

    min   1/2 ||F - Y||^2 + beta sum_i Omega_i(S_i),   F = sum_i D_i A S_i,   S_i in R^{q x K},   i over all cells

One output: ``S_i = s_i - t_i`` with ``s_i, t_i`` in the cone of the cell, ``Omega_i = ||s_i|| + ||t_i||``. Several
outputs: ``Omega_i`` is the cone's nuclear norm. A cone of the plane has two rays, the columns of ``R``, and there it
is a semidefinite program: ``min 1/2 (<R'R, N> + tr Z)`` over psd ``[[N, T], [T', Z]]``, ``N >= 0``, ``S_i = R T``
(mathematics, section 2a). Outputs of patch rows are pooled; max pooling has regions of its own, on each of which the
largest row of every group takes the place of ``D_i A`` (section 3).
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse

from convexbn._types import Float, Index
from convexbn.program.arrangement import Cells, enumerate_max_regions, enumerate_patterns, facets
from convexbn.program.losses import SquaredLoss
from convexbn.program.neurons import Neurons
from convexbn.program.readout import Pooling
from convexbn.program.relu import ReluProgram
from convexbn.solvers.base import Budget, Solution

#: Share of the objective below which a neuron's penalty is what an interior point leaves of a zero.
_NEGLIGIBLE = 1e-8


@dataclass(frozen=True)
class ConicSolution(Solution[Neurons]):
    """Optimum of the conic solver.

    Attributes
    ----------
    dual : ndarray (n, K)
        The dual point ``V`` of the rows (or groups of max pooling), ``max ||V'(A u)_+|| <= beta`` to the solver's
        accuracy.
    value : float
        The objective.
    """

    dual: Float = field(kw_only=True)
    value: float = field(kw_only=True)


@dataclass(frozen=True)
class ConicRelu:
    """Clarabel on every pattern of the rows, for small problems.

    Parameters
    ----------
    tol : float, default=1e-11
        Relative gap of the conic solver, which ends with a larger one where it cannot get there.
    max_bytes : int, default=2**30
        Largest size of the patterns.
    """

    tol: float = 1e-11
    max_bytes: int = 1 << 30

    def solve(
        self,
        program: ReluProgram,
        start: Neurons | None = None,
        budget: Budget | None = None,
        rng: np.random.Generator | None = None,
    ) -> ConicSolution:
        """Optimal network and dual point.

        Parameters
        ----------
        program : ReluProgram
            Of squared loss, pooled or not; several outputs need ``q = 2``, of max pooling there may be one.
        start, budget, rng
            Not used.

        Returns
        -------
        ConicSolution

        Raises
        ------
        ImportError
            When CVXPY or Clarabel is not installed.
        TypeError
            For another loss, or for several outputs on other than two columns.
        MemoryError
            When there are too many patterns.
        """
        try:
            cvxpy: Any = importlib.import_module("cvxpy")
        except ImportError as error:
            raise ImportError("the reference over all patterns needs CVXPY: pip install cvxpy clarabel.") from error
        q, K, loss = program.n_inputs, program.n_outputs, program.loss
        A = program.readout.arranged(program.rows[:])
        if not isinstance(loss, SquaredLoss):
            raise TypeError("the conic reference solves the squared loss only.")
        if K > 1 and (q != 2 or A.ndim == 3):
            raise TypeError(f"the conic reference solves several outputs on 2 whitened columns only, not on {q}.")
        blocks: _Vectors | _PlaneCones
        if A.ndim == 3:
            blocks = _Vectors(cvxpy, len(A), *_max_regions(A, self.max_bytes))
        else:
            cells = enumerate_patterns(A, max_bytes=self.max_bytes)
            blocks = _Vectors(cvxpy, len(A), *_cells(A, cells)) if K == 1 else _PlaneCones(cvxpy, A, cells, K)
        fitted = cvxpy.Variable((len(A), K))
        residual = cvxpy.multiply(np.sqrt(loss.weights)[:, None], _seen(program, fitted) - loss.targets)
        objective = 0.5 * cvxpy.sum_squares(residual) + program.weight_decay * blocks.penalty + loss.constant
        problem = cvxpy.Problem(cvxpy.Minimize(objective), [fitted == blocks.outputs, *blocks.constraints])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Solution may be inaccurate")
            problem.solve("CLARABEL", tol_gap_rel=self.tol, tol_gap_abs=self.tol, tol_feas=self.tol)
        value = float(problem.value)
        neurons = _balanced(blocks.neurons(), _NEGLIGIBLE * value / program.weight_decay)
        return ConicSolution(neurons, "tolerance", dual=problem.constraints[0].dual_value, value=value)


class _Linear(NamedTuple):
    """Vectors (m, q), each with the cell and the row or inequality that it belongs to."""

    cell: Index
    row: Index
    vectors: Float

    def matrix(self, n_rows: int, n_cells: int) -> scipy.sparse.csc_array:
        """On the vectors of all cells, one after the other."""
        q = self.vectors.shape[1]
        places = np.repeat(self.row, q), (self.cell[:, None] * q + np.arange(q)).ravel()
        return scipy.sparse.csc_array((self.vectors.ravel(), places), shape=(n_rows, n_cells * q))


def _cells(rows: Float, cells: Cells) -> tuple[int, _Linear, _Linear]:
    """Number of cells, the rows that are open in each, and the inequalities of their cones."""
    cell, row = np.nonzero(cells.patterns)
    opened = _Linear(cell, row, rows[row])
    cell, row = np.nonzero(facets(cells.patterns))
    inward = np.where(cells.patterns[cell, row], 1.0, -1.0)[:, None] * rows[row]
    return len(cells.patterns), opened, _Linear(cell, np.arange(len(row)), inward)


def _max_regions(groups: Float, max_bytes: int) -> tuple[int, _Linear, _Linear]:
    """The same of max pooling, where the largest row of each group is open."""
    regions = enumerate_max_regions(groups, max_bytes=max_bytes)
    region, group = np.nonzero(regions.members >= 0)
    opened = _Linear(region, group, groups[group, regions.members[region, group]])
    region, inward = regions.walls(groups)
    return len(regions.members), opened, _Linear(region, np.arange(len(inward)), inward)


def _seen(program: ReluProgram, fitted: Any) -> Any:
    """What the loss sees of the outputs of all rows, or groups, as an expression."""
    readout, (n, K) = program.readout, program.loss.targets.shape
    if not isinstance(readout, Pooling):
        return fitted
    matrix = readout.regions.averages if readout.linear else np.eye(readout.n_regions)
    maps = (scipy.sparse.kron(scipy.sparse.eye_array(n), row[None, :]).tocsr() for row in matrix)
    return sum(region @ fitted[:, r * K : (r + 1) * K] for r, region in enumerate(maps))


class _Vectors:
    """One output: ``s_i`` and ``t_i`` (P, q) of the cells."""

    def __init__(self, cvxpy: Any, n: int, count: int, opened: _Linear, inward: _Linear) -> None:
        q = opened.vectors.shape[1]
        self.s, self.t = cvxpy.Variable((count, q)), cvxpy.Variable((count, q))
        s, t = (cvxpy.vec(variable, order="C") for variable in (self.s, self.t))
        self.outputs = cvxpy.reshape(opened.matrix(n, count) @ (s - t), (n, 1), order="C")
        self.penalty = cvxpy.sum(cvxpy.norm(self.s, axis=1)) + cvxpy.sum(cvxpy.norm(self.t, axis=1))
        walls = inward.matrix(len(inward.row), count)
        self.constraints = [walls @ s >= 0, walls @ t >= 0]

    def neurons(self) -> Neurons:
        first = np.vstack([self.s.value, self.t.value])
        signs = np.repeat([1.0, -1.0], len(first) // 2)
        return Neurons(first.T, signs[:, None])


class _PlaneCones:
    """Several outputs on two columns: a psd matrix ``[[N, T], [T', Z]]`` for every cell."""

    def __init__(self, cvxpy: Any, rows: Float, cells: Cells, K: int) -> None:
        self.rays = _rays(rows, cells)
        self.matrices = [cvxpy.Variable((2 + K, 2 + K), PSD=True) for _ in cells.patterns]
        gated = [opened[:, None] * (rows @ R) for opened, R in zip(cells.patterns, self.rays, strict=True)]
        self.outputs = sum(G @ M[:2, 2:] for G, M in zip(gated, self.matrices, strict=True))
        traces = [
            cvxpy.sum(cvxpy.multiply(R.T @ R, M[:2, :2])) + cvxpy.trace(M[2:, 2:])
            for R, M in zip(self.rays, self.matrices, strict=True)
        ]
        self.penalty = 0.5 * sum(traces)
        self.constraints = [M[0, 1] >= 0 for M in self.matrices]

    def neurons(self) -> Neurons:
        """Two neurons a cell from ``N = B B'``, ``B >= 0`` triangular, and the rows of ``B^{-1} T`` as outputs."""
        first, output = [], []
        for R, M in zip(self.rays, (matrix.value for matrix in self.matrices), strict=True):
            p = int(M[1, 1] > M[0, 0])
            slope = max(M[0, 1], 0.0) / M[p, p]
            first += [R[:, p] + slope * R[:, 1 - p], R[:, 1 - p]]
            output += [M[p, 2:], M[1 - p, 2:] - slope * M[p, 2:]]
        return Neurons(np.array(first).T, np.array(output))


def _rays(rows: Float, cells: Cells) -> Float:
    """Unit extreme rays of the cells of a plane, in columns: (P, 2, 2)."""
    normals = np.arctan2(rows[:, 1], rows[:, 0])
    ends = np.sort(np.mod(np.concatenate([normals - 0.5 * np.pi, normals + 0.5 * np.pi]), 2 * np.pi))
    middles = np.mod(np.arctan2(cells.directions[:, 1], cells.directions[:, 0]), 2 * np.pi)
    after = np.searchsorted(ends, middles)
    angles = np.stack([ends[after - 1], ends[after % len(ends)]], axis=1)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _balanced(neurons: Neurons, negligible: float) -> Neurons:
    """Neurons of more than negligible norm, with equal norms on both sides."""
    live = neurons.norms > negligible
    first, output = neurons.first[:, live], neurons.output[live]
    root = np.sqrt(np.linalg.norm(output, axis=1) / np.linalg.norm(first, axis=0))
    return Neurons(first * root, output / root[:, None])
