"""Column generation: ReLU networks over all patterns, neurons found by pricing and trained by turns.

A sampled set of patterns is not the program. L-BFGS trains a wide network on the whitened data, which finds patterns
that matter; the restricted master problem keeps the neurons that are needed; Newton's method on the kinks makes them
stationary to rounding; pricing looks for a neuron ``u`` with ``||V'(A u)_+|| > weight_decay ||u||``, which would lower
the objective, and hands it back. For a stationary network that is all there is to optimality. What pricing does not
find is bounded by ``bounds``, not by pricing.

Under max pooling a hidden unit has kinks where the largest row of a region changes, which Newton's method on the kinks
of single rows does not know: there L-BFGS alone trains, and ends at some 1e-4 of the objective.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from convexbn import bounds
from convexbn._types import Float, share_of
from convexbn.bounds.local_search import distinct, hidden_norms, hidden_units, normalise
from convexbn.program.neurons import Neurons, merge
from convexbn.program.relu import ReluProgram
from convexbn.solvers.base import Budget, Progress, Solution, Solver
from convexbn.solvers.relu.lbfgs import lbfgs, random_neurons
from convexbn.solvers.relu.newton import MOST_SYSTEMS, MOST_VARIABLES, polish
from convexbn.solvers.relu.pricing import Pricing
from convexbn.solvers.relu.pruning import merged_in_cones, vertex
from convexbn.solvers.relu.restricted_master import with_best_norms

_NEWCOMERS = 30  # neurons that enter in a round
_BATCHES = 10  # batches of starts that have to find nothing before the search ends
_ENOUGH = 0.1  # relative number of new neurons that ends the search after one batch; half as many after two, and so on
_PATIENCE = 5  # rounds without progress that end the solve
_POLISH_WORK, _ROUND_WORK = 2e10, 4e8  # cubed variables of the Newton systems of a polish, at most, and of a round
_FEWEST_SYSTEMS = 5  # Newton systems of a polish, at least
_POLISH_FLOPS = 4e11  # that these may take; beyond, L-BFGS polishes, to some 1e-4 of the objective
_ITERATIONS = 2000  # of L-BFGS in a round without Newton's method
_LARGE_ROUND = 40.0  # rounds that such a round counts as on large data: three win most of what there is to win


class _Priced(NamedTuple):
    """Violators (m, q), best first, valid and estimated bound (None if it is valid), and whether the search is over."""

    violators: Float
    bound: float
    estimate: float | None
    last: bool


@dataclass(frozen=True)
class ColumnGeneration(Solver[ReluProgram, Neurons]):
    """L-BFGS, restricted master problem, Newton's method, pricing, until nothing better is found.

    A warm start joins the random neurons, and the solution is never worse. Estimated bounds in the history rest on a
    search and prove nothing; lower bounds are valid and crude, but exact where every cell is searched.

    Parameters
    ----------
    tol : float
        Relative gap against the estimated bound at which to stop.
    max_iter : int or None
        Largest number of rounds; None for 100, and 10 with max pooling. With more than 737 variables a round of
        Newton's method counts as many, in proportion to their cube.
    width, n_starts : int
        Neurons of the first network, and random starts of a batch of pricing, fewer if the data are large; ten batches
        have to find nothing.
    """

    tol: float = 1e-6
    max_iter: int | None = None
    width: int = 200
    n_starts: int = 100

    def _solve(
        self, program: ReluProgram, start: Neurons | None, budget: Budget, rng: np.random.Generator
    ) -> Solution[Neurons]:
        method = _NewtonRounds if program.readout.linear else _Rounds
        rounds = method(program, self.tol, self.n_starts, budget.deadline, rng)
        most = rounds.most_rounds if self.max_iter is None else self.max_iter
        neurons, best = rounds.begin(random_neurons(program, self.width, rng), start)
        history: list[Progress] = []
        work = 0.0
        while True:
            neurons = rounds.trained(neurons, history[-1].estimated_gap if history else 1.0)
            best = rounds.cheaper(neurons, best)
            record = rounds.program.objective(best)
            for priced in rounds.price(neurons, record):
                lower = max(priced.bound, history[-1].lower_bound if history else 0.0)  # no loss is negative
                progress = Progress(len(history) + 1, record, lower, len(neurons.output), priced.estimate)
                reason = budget.stop_reason(progress, tol=self.tol if priced.last else -np.inf, max_iter=most)
                if reason is not None:
                    break
            history.append(progress)
            work += rounds.work(neurons)
            settled = len(history) > _PATIENCE and record >= history[-1 - _PATIENCE].objective * (1 - 1e-13)
            if reason is None and (work >= most or settled or not len(priced.violators)):
                reason = "max_iter" if work >= most else "stalled"
            if reason is not None:
                return Solution(rounds.reduced(best), reason, history)
            neurons = neurons.joined(rounds.newcomers(neurons, priced.violators))


@dataclass
class _Rounds:
    """Rounds of L-BFGS and pricing by local search, as max pooling needs them."""

    program: ReluProgram
    tol: float
    n_starts: int
    deadline: float | None
    rng: np.random.Generator
    most_rounds: ClassVar[int] = 10
    new_norm: ClassVar[float] = 1e-2  # of a new neuron, relative to the mean

    def begin(self, random: Neurons, start: Neurons | None) -> tuple[Neurons, Neurons]:
        """First neurons, and the best network so far."""
        if start is None:
            return random, self.program.no_neurons
        return start.joined(random), self.cheaper(start, self.program.no_neurons)

    def trained(self, neurons: Neurons, gap: float) -> Neurons:
        """All neurons, trained on."""
        return merge(lbfgs(self.program, neurons, _ITERATIONS, self.deadline)).balanced()

    def cheaper(self, one: Neurons, other: Neurons) -> Neurons:
        """The network of smaller objective."""
        return min(other, one, key=self.program.objective)

    def price(self, neurons: Neurons, record: float) -> Iterator[_Priced]:
        """Directions of a local search that would lower the objective."""
        dual = self.program.dual(neurons)
        V, A = self.program.unit_dual(dual), self.program.unit_rows
        values, found = bounds.local_maxima(
            V, A, self.n_starts, self.rng, start=neurons.first.T, deadline=self.deadline
        )
        violators = found[values > self.program.weight_decay * (1 + self.tol)]
        yield self._priced(dual, violators, float(values[0]), last=True)

    def _priced(self, dual: Float, violators: Float, largest: float, *, last: bool) -> _Priced:
        """Result of a search whose largest value is known; the spectral norm bounds what it did not see."""
        valid = self.program.dual_bound(dual, float(np.linalg.norm(self.program.unit_dual(dual), 2)))
        return _Priced(violators, valid, self.program.dual_bound(dual, largest), last)

    def work(self, neurons: Neurons) -> float:
        """Number of rounds that a round counts as."""
        return 1.0

    def newcomers(self, neurons: Neurons, directions: Float) -> Neurons:
        """New neurons with their best outputs."""
        V = self.program.unit_dual(self.program.dual(neurons))
        norm = self.new_norm * float(neurons.norms.mean()) if len(neurons.output) else 1.0
        new = Neurons(directions.T, normalise(hidden_units(directions, self.program.unit_rows) @ V))
        return new.with_norms(np.full(len(directions), norm))

    def reduced(self, neurons: Neurons) -> Neurons:
        """The network to return."""
        return neurons


@dataclass
class _NewtonRounds(_Rounds):
    """Rounds of the restricted master problem, Newton's method, and pricing by searches of growing effort."""

    most_rounds: ClassVar[int] = 100
    new_norm: ClassVar[float] = 1.0  # the restricted master problem decides

    def __post_init__(self) -> None:
        self.by_case, self.program = self.program, self.program.on_rows

    @functools.cached_property
    def cells(self) -> bounds.EveryCell | None:
        """All cells, if they are few, once there is a network; to enumerate them takes at most half of the time."""
        if self.program.n_outputs > 1:
            return None
        return bounds.EveryCell.of_few(self.program.unit_rows, share_of(self.deadline, 0.5))

    def begin(self, random: Neurons, start: Neurons | None) -> tuple[Neurons, Neurons]:
        """The random neurons after L-BFGS, with clusters merged, and the best network so far."""
        return super().begin(merge(lbfgs(self.by_case, random, deadline=self.deadline)), start)

    def trained(self, neurons: Neurons, gap: float) -> Neurons:
        """The neurons that are needed, with their best norms, made stationary."""
        best = with_best_norms(self.program, neurons, self.deadline)
        return self._polish(merged_in_cones(self.program.rows[:], best), gap)

    def price(self, neurons: Neurons, record: float) -> Iterator[_Priced]:
        """Look for directions that would lower the objective.

        If there are few cells, all of them are searched. Otherwise starts are followed batch by batch until enough of
        them leave a gap to the best objective so far. If the first batch finds none, branch and bound searches in low
        rank, and ends the search if it has covered everything. A search cut short by time estimates nothing: the
        spectral norm takes its place.
        """
        program, dual = self.program, self.program.dual(neurons)
        V, A = program.unit_dual(dual), program.unit_rows
        threshold = program.weight_decay * (1 + 0.1 * self.tol)
        if self.cells is not None:
            maxima = self.cells.maxima(V, threshold, self.deadline)
            found = distinct(maxima.directions, hidden_norms(maxima.directions, V, A), _NEWCOMERS)
            yield _Priced(found, program.dual_bound(dual, maxima.value), None, last=True)
            return
        search = Pricing(V, A, self.n_starts, self.rng, self.deadline)
        search.from_neurons(neurons.first.T)
        for batch in range(1, _BATCHES + 1):
            search.from_random()
            found, bound = search.above(threshold, _NEWCOMERS), program.dual_bound(dual, search.largest)
            gap = record - bound > self.tol * record
            enough = gap and len(found) * batch > _ENOUGH * len(neurons.output)
            last = enough or search.late or batch == _BATCHES
            yield self._priced(dual, found, float(np.linalg.norm(V, 2)) if search.late else search.largest, last=last)
            if last:
                return
            if batch == 1 and not (gap and len(found)) and search.by_branch_and_bound(threshold, self.tol):
                found = search.above(threshold, _NEWCOMERS)
                yield self._priced(dual, found, search.largest, last=True)
                return

    def work(self, neurons: Neurons) -> float:
        """Number of rounds that a round counts as: Newton systems cost the cube of the variables."""
        if self._too_large(neurons):
            return _LARGE_ROUND
        return max(1.0, _variables(neurons) ** 3 / _ROUND_WORK)

    def reduced(self, neurons: Neurons) -> Neurons:
        """The network with fewer neurons, polished, unless that raises the objective."""
        fewer = vertex(self.program.unit_rows, merged_in_cones(self.program.rows[:], neurons))
        if len(fewer.output) == len(neurons.output):
            return neurons
        fewer = self._polish(fewer, gap=0.0)
        return fewer if self.program.objective(fewer) <= self.program.objective(neurons) * (1 + 1e-12) else neurons

    def _polish(self, neurons: Neurons, gap: float) -> Neurons:
        """Newton's method, as carefully started and as accurate as a relative gap asks for; if too dear, L-BFGS."""
        if self._too_large(neurons):
            return self.cheaper(super().trained(neurons, gap), neurons)
        systems = np.clip(_POLISH_WORK / max(_variables(neurons), 1) ** 3, _FEWEST_SYSTEMS, MOST_SYSTEMS)
        damping, tol = float(np.clip(gap, 1e-6, 0.1)), float(np.clip(1e-3 * gap**2, 1e-14, 1e-9))
        return polish(self.program, neurons, damping=damping, tol=tol, max_iter=int(systems), deadline=self.deadline)

    def _too_large(self, neurons: Neurons) -> bool:
        """Whether the fewest Newton systems of a polish take too long."""
        entries, variables = self.program.loss.targets.size, _variables(neurons)
        size = min(variables, MOST_VARIABLES)
        return _FEWEST_SYSTEMS * variables * size * (2 * entries + size / 3) > _POLISH_FLOPS


def _variables(neurons: Neurons) -> int:
    """Number of weights of a network."""
    return neurons.first.size + neurons.output.size
