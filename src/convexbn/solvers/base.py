"""The interface of all solvers: a program and a budget of work in, a solution with its history out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from convexbn._types import Float, is_over, now
from convexbn.program.gated import Frobenius, GateBlocks, GatedProgram, MaskedRows, Nuclear, PooledFeatures
from convexbn.program.losses import Loss

Program = TypeVar("Program")
Weights = TypeVar("Weights")


class Progress(NamedTuple):
    """State after one iteration; bounds are the solver's own, the certificate recomputes them.

    Attributes
    ----------
    iteration, objective : int, float
    lower_bound : float
        No network has a lower objective; of ReLU networks a crude bound.
    working_set : int
        Gates or neurons in use.
    estimated_bound : float or None
        The bound, had a local search found the worst neuron: no bound; None where ``lower_bound`` is the solver's own.
    """

    iteration: int
    objective: float
    lower_bound: float
    working_set: int
    estimated_bound: float | None = None

    @property
    def relative_gap(self) -> float:
        """Gap to the lower bound relative to the objective, 0 when the objective is 0."""
        return self._gap_to(self.lower_bound)

    @property
    def estimated_gap(self) -> float:
        """Gap that the solver goes by: to the estimated bound, if there is one, else ``relative_gap``."""
        return self._gap_to(self.lower_bound if self.estimated_bound is None else self.estimated_bound)

    def _gap_to(self, bound: float) -> float:
        return (self.objective - bound) / self.objective if self.objective else 0.0


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
    started: float = field(default_factory=now)

    @property
    def deadline(self) -> float | None:
        """``now()`` at which the time limit is over, None without one."""
        return self.until(1.0)

    def until(self, share: float) -> float | None:
        """``now()`` at which a share of the time limit is over, None without one."""
        return None if self.time_limit is None else self.started + share * self.time_limit

    def sooner(self, seconds: float | None) -> float | None:
        """``now()`` at which so many seconds (none and infinity: no limit) or the time limit are over."""
        limits = [] if seconds is None or np.isinf(seconds) else [now() + seconds]
        return min([*limits, *([] if self.deadline is None else [self.deadline])], default=None)

    def stop_reason(self, progress: Progress, *, tol: float, max_iter: int) -> str | None:
        """Why to stop now (a key of ``status.STOPPED_BY``), or None to go on.

        Parameters
        ----------
        progress, tol, max_iter : Progress, float, int
            State after the last iteration, relative (estimated) gap to reach, and largest number of iterations.
        """
        asked = self.callback is not None and bool(self.callback(progress))
        if not np.isfinite(progress.objective):
            return "numerical"
        if progress.estimated_gap <= tol:
            return "tolerance"
        if asked:
            return "callback"
        if is_over(self.deadline):
            return "time_limit"
        return "max_iter" if progress.iteration >= max_iter else None


@dataclass(frozen=True)
class Solution(Generic[Weights]):
    """Weights of a solution and how it was reached.

    Attributes
    ----------
    weights : GateBlocks or Neurons
        Nonzero blocks of a gated program, neurons of a ReLU program.
    stopped_by, history : str, list of Progress
        A key of ``status.STOPPED_BY``, and one entry an iteration.
    n_factorizations : int
        Cholesky factorisations of size n.
    """

    weights: Weights
    stopped_by: str
    history: list[Progress] = field(default_factory=list)
    n_factorizations: int = 0

    @property
    def n_iter(self) -> int:
        """Iterations done."""
        return self.history[-1].iteration if self.history else 0


class Solver(ABC, Generic[Program, Weights]):
    """Frozen settings with one method; a solve keeps no state and does not change its arguments."""

    def solve(
        self, program: Program, start: Weights | None = None, budget: Budget | None = None,
        rng: np.random.Generator | None = None,
    ) -> Solution[Weights]:  # fmt: skip
        """Solve a program.

        Parameters
        ----------
        program : GatedProgram or ReluProgram
        start : GateBlocks or Neurons, optional
            Weights to begin with, where the method can use them.
        budget, rng : Budget, numpy.random.Generator, optional
            By default the solver's own limits alone, and a generator of seed 0 for random starts.

        Raises
        ------
        UnsupportedProgramError
            For a program that the solver does not take.
        """
        return self._solve(program, start, budget or Budget(), np.random.default_rng(0) if rng is None else rng)

    @abstractmethod
    def _solve(
        self, program: Program, start: Weights | None, budget: Budget, rng: np.random.Generator
    ) -> Solution[Weights]:
        """Solve with the defaults filled in."""


class UnsupportedProgramError(TypeError, ValueError):
    """A solver does not take a program; the message says what is missing, and which solver does."""


@dataclass(frozen=True)
class Solves:
    """Losses (None for all), operators and norms that a solver of gated programs takes, checked before any work."""

    losses: tuple[type[Loss], ...] | None = None
    operators: tuple[type, ...] = (MaskedRows, PooledFeatures)
    norms: tuple[type, ...] = (Frobenius, Nuclear)

    def check(self, solver: str, program: GatedProgram) -> None:
        """Raise an ``UnsupportedProgramError`` for a program that a solver does not take."""
        if self.losses is not None and not isinstance(program.loss.without_bias, self.losses):
            names = " and ".join(loss.name.replace("_", " ") for loss in self.losses)
            raise UnsupportedProgramError(f"solver={solver!r} solves the {names} loss only: use 'proximal' for others.")
        if not isinstance(program.operator, self.operators):
            raise UnsupportedProgramError(f"solver={solver!r} is for dense data: use 'proximal' with a convolution.")
        if not isinstance(program.norm, self.norms):
            raise UnsupportedProgramError(f"solver={solver!r} has one Frobenius norm a gate: use 'proximal'.")


def nonzero(blocks: Float) -> GateBlocks:
    """Nonzero ones among the blocks (P, q, K) of all gates."""
    index = np.flatnonzero(blocks.any(axis=(1, 2)))
    return GateBlocks(index, blocks[index])


def zero_solution(program: GatedProgram, budget: Budget) -> Solution[GateBlocks] | None:
    """The zero network if the weight decay makes it optimal, else None."""
    if program.max_weight_decay() > program.weight_decay * (1 + 1e-14):
        return None
    value = program.loss.value(np.zeros_like(program.loss.targets))
    report = Progress(1, value, value, 0)
    if budget.callback is not None:
        budget.callback(report)
    return Solution(GateBlocks(np.zeros(0, dtype=np.intp), np.zeros((0, *program.block_shape))), "tolerance", [report])
