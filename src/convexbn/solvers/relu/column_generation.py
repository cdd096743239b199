"""ReLU networks over all patterns: local phase, masses, Newton's method, pricing, repeated.

A sampled set of patterns is not the program. The local phase trains a wide network on the whitened data, which
finds patterns that matter; the program over the masses keeps the neurons that are needed; Newton's method on the
kinks makes them stationary to rounding; pricing looks for a neuron ``u`` with
``||V'(A u)_+|| > weight_decay ||u||``, which would lower the objective, and hands it back. For a stationary network
that is all there is to optimality. What pricing does not find is bounded by ``bounds``, not by pricing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from convexbn import bounds
from convexbn._types import Float
from convexbn.bounds.local_search import distinct, hidden_norms, normalise
from convexbn.program.losses import Loss
from convexbn.program.neurons import Neurons, merge, network_outputs
from convexbn.solvers.base import Budget, Progress
from convexbn.solvers.relu.lbfgs import local_phase, random_neurons
from convexbn.solvers.relu.newton import KinkNewton
from convexbn.solvers.relu.pricing import NeuronSearch
from convexbn.solvers.relu.pruning import merged_in_cones, vertex
from convexbn.solvers.relu.restricted_master import with_best_masses

__all__ = ["NeuronPricing", "Neurons", "ReluSolution", "local_phase", "merge", "network_outputs", "polish"]

#: Neurons that enter in a round.
_NEWCOMERS = 30

#: Batches of starts that have to find nothing before the search ends.
_BATCHES = 10

#: New neurons relative to the present ones that end the search after one batch; half as many after two, and so on.
_ENOUGH = 0.1

#: Rounds without progress that are enough.
_PATIENCE = 5

#: Cubes of the number of variables that one polish may spend on Newton systems, and that count as a round of work.
_POLISH_WORK, _ROUND_WORK = 2e10, 4e8

#: Least and most Newton systems of a polish.
_FEWEST_SYSTEMS, _MOST_SYSTEMS = 5, 100

#: Variables of one Newton system; more are taken in blocks, which keeps memory at some 100 MB a matrix.
_MOST_VARIABLES = 3000


@dataclass(frozen=True)
class ReluSolution:
    """Neurons, why the solver stopped, and the history of (objective, estimated bound)."""

    neurons: Neurons
    stopped_by: str
    history: list[Progress] = field(default_factory=list)


class _Priced(NamedTuple):
    """Violators (m, q), best first, the estimated bound, and whether the search is over."""

    violators: Float
    bound: float
    last: bool


@dataclass(frozen=True)
class NeuronPricing:
    """Local phase, masses, Newton's method, pricing, until nothing better is found.

    Parameters
    ----------
    tol : float, default=1e-6
        Relative gap against the estimated bound at which to stop.
    max_iter : int, default=100
        Largest number of rounds; with more than 737 variables a round counts as many, in proportion to their cube.
    width : int, default=200
        Neurons of the local phase.
    n_starts : int, default=100
        Random starts of a batch of pricing, fewer where the data are large; ten batches have to find nothing.
    """

    tol: float = 1e-6
    max_iter: int = 100
    width: int = 200
    n_starts: int = 100

    def solve(
        self,
        rows: Float,
        loss: Loss,
        weight_decay: float,
        rng: np.random.Generator,
        budget: Budget | None = None,
        initial: Neurons | None = None,
    ) -> ReluSolution:
        """Train on whitened rows; the bounds in the history rest on a search and prove nothing.

        Parameters
        ----------
        rows : ndarray (n, q)
        loss : Loss
        weight_decay : float
        rng : numpy.random.Generator
        budget : Budget, optional
        initial : Neurons, optional
            A warm start, which joins the trained neurons; the solution is never worse.
        """
        budget = budget or Budget()
        problem = _Problem(rows, loss, weight_decay, budget.deadline)
        neurons = problem.trained(random_neurons(rows, loss, self.width, rng))
        best = problem.nothing
        if initial is not None:
            neurons, best = initial.joined(neurons), problem.cheaper(initial, best)
        history: list[Progress] = []
        rounds = 0.0
        while True:
            gap = history[-1].relative_gap if history else 1.0
            neurons = problem.polished(problem.selected(neurons), gap)
            best = problem.cheaper(neurons, best)
            record = problem.objective(best)
            for priced in self._price(problem, neurons, record, rng):
                progress = Progress(len(history) + 1, record, priced.bound, len(neurons.output))
                tol = self.tol if priced.last else -np.inf
                reason = budget.stop_reason(progress, tol=tol, max_iter=self.max_iter)
                if reason is not None:
                    break
            history.append(progress)
            rounds += max(1.0, problem.variables(neurons) ** 3 / _ROUND_WORK)
            if reason is None and rounds >= self.max_iter:
                reason = "max_iter"
            if reason is None and (not len(priced.violators) or _without_progress(history)):
                reason = "stalled"
            if reason is not None:
                return ReluSolution(problem.with_fewest(best), reason, history)
            neurons = neurons.joined(problem.newcomers(neurons, priced.violators))

    def _price(self, problem: _Problem, neurons: Neurons, record: float, rng: np.random.Generator) -> Iterator[_Priced]:
        """Look for directions that would lower the objective.

        Every cell is looked at where there are few. Else starts are followed batch by batch until enough of them
        leave a gap to the best objective so far. Where the first batch finds none, branch and bound looks in low
        rank, and nothing else is left to do when it has looked everywhere. A search that time cuts short estimates
        nothing: a valid bound takes its place.
        """
        V = problem.dual(neurons)
        threshold = problem.weight_decay * (1 + 0.1 * self.tol)
        if problem.cells is not None:
            maxima = problem.cells.maxima(V, threshold)
            values = hidden_norms(maxima.directions, V, problem.A)
            yield _Priced(distinct(maxima.directions, values, _NEWCOMERS), problem.estimate(V, maxima.value), last=True)
            return
        search = NeuronSearch(V, problem.A, problem.deadline)
        search.from_neurons(neurons.first.T, self.n_starts, rng)
        for batch in range(1, _BATCHES + 1):
            search.from_random(self.n_starts, rng)
            found, bound = search.above(threshold, _NEWCOMERS), problem.estimate(V, search.largest)
            gap = record - bound > self.tol * record
            enough = gap and len(found) * batch > _ENOUGH * len(neurons.output)
            if search.late:
                bound = problem.estimate(V, float(np.linalg.norm(V, 2)))
            last = enough or search.late or batch == _BATCHES
            yield _Priced(found, bound, last)
            if last:
                return
            if batch == 1 and not (gap and len(found)) and search.by_branch_and_bound(threshold, self.tol):
                found = search.above(threshold, _NEWCOMERS)
                yield _Priced(found, problem.estimate(V, search.largest), last=True)
                return


@dataclass(frozen=True)
class _Problem:
    """The program, and when to stop working on it."""

    rows: Float
    loss: Loss
    weight_decay: float
    deadline: float | None

    @functools.cached_property
    def root(self) -> Float:
        root: Float = np.sqrt(self.loss.weights)[:, None]
        return root

    @functools.cached_property
    def A(self) -> Float:
        """Rows of orthonormal columns."""
        return self.root * self.rows

    @functools.cached_property
    def cells(self) -> bounds.EveryCell | None:
        """All cells, where they can be enumerated."""
        one_output = self.loss.targets.shape[1] == 1
        return bounds.EveryCell(self.A) if one_output and bounds.few_cells(self.A) else None

    @property
    def nothing(self) -> Neurons:
        """The network without neurons."""
        return Neurons(np.zeros((self.rows.shape[1], 0)), np.zeros((0, self.loss.targets.shape[1])))

    def objective(self, neurons: Neurons) -> float:
        """Loss and penalty."""
        penalty = self.weight_decay * float(neurons.masses.sum())
        return self.loss.value(network_outputs(self.rows, neurons)) + penalty

    def cheaper(self, one: Neurons, other: Neurons) -> Neurons:
        """The network of smaller objective."""
        return one if self.objective(one) < self.objective(other) else other

    def dual(self, neurons: Neurons) -> Float:
        """``V / sqrt(w)``."""
        dual: Float = self.loss.negative_gradient(network_outputs(self.rows, neurons)) / self.root
        return dual

    def estimate(self, V: Float, norm: float) -> float:
        """Dual value of ``V`` scaled to feasibility, were ``norm`` its dual norm."""
        return self.loss.dual_value(min(1.0, self.weight_decay / max(norm, 1e-300)) * self.root * V)

    def trained(self, neurons: Neurons) -> Neurons:
        """The local phase, and what it leaves in clusters as one neuron each."""
        return merge(local_phase(self.rows, self.loss, self.weight_decay, neurons, deadline=self.deadline))

    def selected(self, neurons: Neurons) -> Neurons:
        """The neurons that are needed, with their best masses."""
        best = with_best_masses(self.rows, self.loss, self.weight_decay, neurons, deadline=self.deadline)
        return merged_in_cones(self.rows, best)

    def polished(self, neurons: Neurons, gap: float) -> Neurons:
        """Newton's method, as carefully started and as accurate as a relative gap asks for."""
        return polish(
            self.rows, self.loss, self.weight_decay, neurons,
            damping=float(np.clip(gap, 1e-6, 0.1)), tol=float(np.clip(1e-3 * gap**2, 1e-14, 1e-9)),
            max_iter=int(np.clip(_POLISH_WORK / max(self.variables(neurons), 1) ** 3, _FEWEST_SYSTEMS, _MOST_SYSTEMS)),
            deadline=self.deadline,
        )  # fmt: skip

    def variables(self, neurons: Neurons) -> int:
        """Weights of the network."""
        return int(neurons.first.size + neurons.output.size)

    def newcomers(self, neurons: Neurons, directions: Float) -> Neurons:
        """New neurons with their best outputs; the program over the masses decides on these."""
        image = np.maximum(directions @ self.A.T, 0) @ self.dual(neurons)
        mass = float(neurons.masses.mean()) if len(neurons.output) else 1.0
        return Neurons(directions.T, normalise(image)).with_masses(np.full(len(directions), mass))

    def with_fewest(self, neurons: Neurons) -> Neurons:
        """The same network with fewer neurons, polished, where that does not cost anything."""
        fewer = vertex(self.A, merged_in_cones(self.rows, neurons))
        if len(fewer.output) == len(neurons.output):
            return neurons
        fewer = self.polished(fewer, gap=0.0)
        return fewer if self.objective(fewer) <= self.objective(neurons) * (1 + 1e-12) else neurons


def _without_progress(history: list[Progress]) -> bool:
    """Several rounds have brought nothing beyond rounding."""
    return len(history) > _PATIENCE and history[-1].objective >= history[-1 - _PATIENCE].objective * (1 - 1e-13)


def polish(
    rows: Float,
    loss: Loss,
    weight_decay: float,
    neurons: Neurons,
    *,
    damping: float = 0.1,
    tol: float = 1e-14,
    max_iter: int = _MOST_SYSTEMS,
    deadline: float | None = None,
) -> Neurons:
    """A stationary network by Newton's method, never worse than the one that is given.

    Where all variables are too many for one system, blocks of neurons take turns, the heaviest first.
    """
    neurons = neurons.chosen(np.argsort(-neurons.masses)).balanced()
    most = max(1, _MOST_VARIABLES // (rows.shape[1] + loss.targets.shape[1]))
    blocks = [neurons.chosen(slice(start, start + most)) for start in range(0, len(neurons.output), most)]
    for k, block in enumerate(blocks):
        fixed = np.zeros_like(loss.targets)
        for other in blocks[:k] + blocks[k + 1 :]:
            fixed += network_outputs(rows, other)
        newton = KinkNewton(rows, loss, weight_decay, fixed)
        blocks[k] = newton.solve(block, damping=damping, tol=tol, max_iter=max_iter, deadline=deadline)
    return functools.reduce(Neurons.joined, blocks, neurons.chosen(slice(0)))
