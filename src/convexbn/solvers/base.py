"""What every solver takes and gives: a budget of work, a report after each iteration, a solution."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np

from convexbn._types import Float, Index
from convexbn.program.gated import GatedProgram


class Progress(NamedTuple):
    """State after one iteration; bounds are the solver's own, the certificate recomputes them."""

    iteration: int
    objective: float
    lower_bound: float
    working_set: int

    @property
    def relative_gap(self) -> float:
        """Gap relative to the objective, 0 when the objective is 0."""
        return (self.objective - self.lower_bound) / self.objective if self.objective else 0.0


@dataclass(frozen=True)
class Budget:
    """When to stop before the tolerance is met.

    Parameters
    ----------
    time_limit : float, optional
        Seconds from the creation of the budget.
    callback : callable, optional
        Called with a ``Progress`` after each iteration; a true return value stops the solver.
    """

    time_limit: float | None = None
    callback: Callable[[Progress], object] | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def deadline(self) -> float | None:
        """``time.monotonic()`` at which the time limit is over, None without one."""
        return self.until(1.0)

    def until(self, share: float) -> float | None:
        """``time.monotonic()`` at which a share of the time limit is over, None without one."""
        return None if self.time_limit is None else self.started + share * self.time_limit

    def stop_reason(self, progress: Progress, *, tol: float, max_iter: int) -> str | None:
        """Why to stop now (a key of ``status.STOPPED_BY``), or None to go on."""
        asked = bool(self.callback(progress)) if self.callback is not None else False
        if not np.isfinite(progress.objective):
            return "numerical"
        if progress.relative_gap <= tol:
            return "tolerance"
        if asked:
            return "callback"
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "time_limit"
        return "max_iter" if progress.iteration >= max_iter else None


@dataclass(frozen=True)
class Solution:
    """Nonzero blocks of a solution and how it was reached.

    Attributes
    ----------
    gate_index : ndarray (m,)
        Gates with a nonzero block.
    blocks : ndarray (m, q, K)
        The blocks ``S_i``.
    stopped_by : str
        A key of ``status.STOPPED_BY``.
    history : list of Progress
        One entry an iteration.
    n_factorizations : int
        Cholesky factorisations of size n.
    """

    gate_index: Index
    blocks: Float
    stopped_by: str
    history: list[Progress] = field(default_factory=list)
    n_factorizations: int = 0

    def finite(self) -> Solution:
        """Return this solution, or the zero one stopped by ``"numerical"`` when a block is not finite."""
        if np.isfinite(self.blocks).all():
            return self
        return replace(self, gate_index=self.gate_index[:0], blocks=self.blocks[:0], stopped_by="numerical")

    @property
    def n_iter(self) -> int:
        """Iterations done."""
        return self.history[-1].iteration if self.history else 0


def zero_solution(program: GatedProgram, budget: Budget) -> Solution | None:
    """The zero network where the weight decay makes it optimal, else None."""
    if program.max_weight_decay() > program.weight_decay * (1 + 1e-14):
        return None
    value = program.loss.value(np.zeros_like(program.loss.targets))
    report = Progress(1, value, value, 0)
    if budget.callback is not None:
        budget.callback(report)
    return Solution(np.zeros(0, dtype=np.intp), np.zeros((0, *program.block_shape)), "tolerance", [report])


class Solver(Protocol):
    """Frozen settings with one method; no state is kept between solves."""

    @property
    def tol(self) -> float:
        """Relative duality gap to reach."""

    def solve(self, program: GatedProgram, start: Solution | None = None, budget: Budget | None = None) -> Solution:
        """Solve the program, from ``start`` where the method can use it."""
