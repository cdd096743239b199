"""ReLU networks on many rows: mini-batch descent, merging, a full-batch polish.

Pricing and Newton's method take seconds an iteration there, so that what is returned is a good network, not an
optimum: its certificate says how good.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import numpy as np

from convexbn._typing import Float
from convexbn.losses import Loss
from convexbn.mapped_rows import MappedRows
from convexbn.solvers.local_phase import local_phase
from convexbn.solvers.neuron_pricing import ReluSolution
from convexbn.solvers.neurons import Neurons, case_outputs, merge
from convexbn.solvers.solution import Budget, Progress
from convexbn.solvers.stochastic_phase import StochasticPhase, random_start

#: Share of a time limit that the descent may take before the polish begins.
_DESCENT_SHARE = 0.7


@dataclass(frozen=True)
class ManyRows:
    """Mini-batch descent, merging, and full-batch L-BFGS.

    Parameters
    ----------
    width : int, default=1000
        Neurons.
    polish : int, default=5
        Iterations of L-BFGS on all rows, in float32; 0 for none.
    descent : StochasticPhase
    """

    width: int = 1000
    polish: int = 5
    descent: StochasticPhase = field(default_factory=StochasticPhase)

    def solve(
        self,
        rows: Float | MappedRows,
        loss: Loss,
        weight_decay: float,
        rng: np.random.Generator,
        budget: Budget | None = None,
        initial: Neurons | None = None,
    ) -> ReluSolution:
        """Train on whitened rows; the history has the objective as the batches saw it and the trivial bound 0.

        Parameters
        ----------
        rows : ndarray (n, q)
        loss : Loss
        weight_decay : float
        rng : numpy.random.Generator
        budget : Budget, optional
        initial : Neurons, optional
            A warm start, which is trained for a fifth of the epochs at a third of the learning rate.
        """
        budget = budget or Budget()
        share = None if budget.time_limit is None else budget.started + _DESCENT_SHARE * budget.time_limit
        descent, start = self._beginning(rows, loss, rng, initial)
        history: list[Progress] = []
        neurons = start
        for neurons, seen in descent.run(rows, loss, weight_decay, start, rng, share):
            reason = self._reported(history, budget, seen, weight_decay, neurons)
            if reason is not None:
                return ReluSolution(neurons.balanced(), reason, history)
        end = "time_limit" if share is not None and time.monotonic() >= share else "max_iter"
        merged = merge(neurons)
        if not self.polish:
            return ReluSolution(merged.balanced(), end, history)
        single = rows.in_single_precision() if isinstance(rows, MappedRows) else rows.astype(np.float32)
        polished = local_phase(
            single, loss, weight_decay, merged, max_iter=self.polish, deadline=budget.deadline
        ).balanced()
        value = loss.of_cases.value(case_outputs(single, loss, polished))
        return ReluSolution(polished, self._reported(history, budget, value, weight_decay, polished) or end, history)

    def _beginning(
        self, rows: Float | MappedRows, loss: Loss, rng: np.random.Generator, initial: Neurons | None
    ) -> tuple[StochasticPhase, Neurons]:
        """The descent and its start, cold or warm."""
        if initial is None or not len(initial.output):
            return self.descent, random_start(rng.standard_normal((rows.shape[1], self.width)), loss, rng)
        epochs, rate = max(1, self.descent.epochs // 5), self.descent.learning_rate / 3
        return replace(self.descent, epochs=epochs, learning_rate=rate), initial

    def _reported(
        self, history: list[Progress], budget: Budget, value: float, weight_decay: float, neurons: Neurons
    ) -> str | None:
        """Add to the history and ask whether to stop."""
        objective = value + weight_decay * float(neurons.masses.sum())
        history.append(Progress(len(history) + 1, objective, 0.0, len(neurons.output)))
        return budget.stop_reason(history[-1], tol=0.0, max_iter=self.descent.epochs + 1)
