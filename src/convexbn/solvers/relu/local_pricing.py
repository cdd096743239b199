"""ReLU networks with max pooling: local phase and pricing by turns.

Under max pooling a hidden unit has kinks where the largest row of a region changes, which Newton's method on the kinks
of single rows does not know. L-BFGS ends on them at some 1e-4 of the objective; a neuron that pricing finds above the
weight decay joins, and all are trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convexbn import bounds
from convexbn._types import Float
from convexbn.bounds.local_search import hidden_units, normalise
from convexbn.program.losses import Loss
from convexbn.program.neurons import Neurons, case_outputs, merge
from convexbn.solvers.base import Budget, Progress
from convexbn.solvers.relu.column_generation import ReluSolution
from convexbn.solvers.relu.lbfgs import local_phase, random_neurons


@dataclass(frozen=True)
class LocalPricing:
    """Local phase, pricing by local search, until nothing is found.

    Parameters
    ----------
    tol : float, default=1e-6
        Relative gap against the estimated bound at which to stop.
    max_iter : int, default=10
        Largest number of rounds.
    width : int, default=200
        Neurons of the first local phase.
    n_starts : int, default=100
        Starts of a local search.
    """

    tol: float = 1e-6
    max_iter: int = 10
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
        rows : ndarray (N, q)
        loss : Loss
        weight_decay : float
        rng : numpy.random.Generator
        budget : Budget, optional
        initial : Neurons, optional
            A warm start, which joins the random neurons.
        """
        budget = budget or Budget()
        cases, root = loss.of_cases, np.sqrt(loss.of_cases.weights)[:, None]
        A = loss.arranged(np.sqrt(loss.weights)[:, None] * rows)
        neurons = random_neurons(rows, loss, self.width, rng)
        neurons = neurons if initial is None else initial.joined(neurons)
        history: list[Progress] = []
        while True:
            neurons = merge(local_phase(rows, loss, weight_decay, neurons, 2000, budget.deadline)).balanced()
            outputs = case_outputs(rows, loss, neurons)
            dual = cases.negative_gradient(outputs)
            V = loss.spread(dual / root)
            values, found = bounds.local_maxima(V, A, self.n_starts, rng, initial=neurons.first.T)
            feasible = min(1.0, weight_decay / max(float(values[0]), 1e-300))
            objective = cases.value(outputs) + weight_decay * float(neurons.masses.sum())
            bound = cases.dual_value(feasible * dual)
            history.append(Progress(len(history) + 1, objective, bound, len(neurons.output)))
            reason = budget.stop_reason(history[-1], tol=self.tol, max_iter=self.max_iter)
            found = found[values > weight_decay * (1 + self.tol)]
            if reason is not None or not len(found):
                return ReluSolution(neurons, reason or "stalled", history)
            mass = 1e-2 * float(neurons.masses.mean()) if len(neurons.output) else 1.0
            new = Neurons(found.T, normalise(hidden_units(found, A) @ V))
            neurons = neurons.joined(new.with_masses(np.full(len(found), mass)))
