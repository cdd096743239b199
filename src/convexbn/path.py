"""Regularisation path of the gated program over weight decay: warm-started, every point certified."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from convexbn.certificate import Certificate, certify_blocks
from convexbn.program import GatedProgram
from convexbn.solvers.group_newton import GroupNewton
from convexbn.solvers.solution import Budget, Solution, Solver


@dataclass(frozen=True)
class PathPoint:
    """One point of a path: the weight decay, the solution there, and its certificate."""

    weight_decay: float
    solution: Solution
    certificate: Certificate


def weight_decay_path(
    program: GatedProgram,
    weight_decays: Iterable[float],
    solver: Solver | None = None,
    budget: Budget | None = None,
) -> Iterator[PathPoint]:
    """Solve the program at each weight decay in turn, each from the solution before it.

    Parameters
    ----------
    program : GatedProgram
        Its own ``weight_decay`` is not used.
    weight_decays : iterable of float
        In the order to be solved; from large to small is fastest.
    solver : Solver, optional
        ``GroupNewton()`` by default.
    budget : Budget, optional
        Shared by the whole path.

    Yields
    ------
    PathPoint

    Examples
    --------
    >>> import numpy as np
    >>> from convexbn.losses import SquaredLoss
    >>> rows = np.linalg.qr(np.c_[np.ones(8), np.random.default_rng(0).normal(size=(8, 2))])[0]
    >>> program = GatedProgram(rows, rows > 0, SquaredLoss(rows[:, 1:2], np.ones(8)), 1.0)
    >>> largest = program.max_weight_decay()
    >>> [str(p.certificate.status.value) for p in weight_decay_path(program, [largest, 0.1 * largest])]
    ['TRIVIAL', 'CERTIFIED']
    """
    solver = solver or GroupNewton()
    solution: Solution | None = None
    for weight_decay in weight_decays:
        current = program.with_weight_decay(weight_decay)
        solution = solver.solve(current, start=solution, budget=budget)
        certificate = certify_blocks(
            current,
            solution.gate_index,
            solution.blocks,
            tolerance=solver.tol,
            stopped_by=solution.stopped_by,
        )
        yield PathPoint(weight_decay, solution, certificate)
