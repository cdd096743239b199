"""ReLU networks on many rows: mini-batch descents, merging, their mean, a full-batch polish.

Pricing and Newton's method take seconds an iteration there, so that what is returned is a good network, not an
optimum: its certificate says how good.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from convexbn._types import Float
from convexbn.data.row_matrix import MappedRows
from convexbn.program.losses import Loss
from convexbn.program.neurons import Neurons, case_outputs, mean, merge
from convexbn.solvers.base import Budget, Progress
from convexbn.solvers.relu.column_generation import ReluSolution
from convexbn.solvers.relu.lbfgs import local_phase
from convexbn.solvers.relu.sgd import StochasticPhase, random_start

#: Share of a time limit that the descents may take before the polish begins.
_DESCENT_SHARE = 0.7

#: Share of the epochs that a warm start takes. On a path of 20 weight decays on 10,000 images the objectives are within
#: .2 per cent of those of cold starts down to a thirtieth of the largest decay, 2 per cent above at a fiftieth and 16
#: at a hundredth; with a fifth of the epochs at a third of the learning rate 7 per cent above at an eighteenth already.
_WARM = 0.6


@dataclass(frozen=True)
class ManyRows:
    """Mini-batch descents, merging, their mean, and full-batch L-BFGS.

    Parameters
    ----------
    width : int, default=1000
        Neurons of a descent.
    n_starts : int, default=1
        Descents, each from a random start.
    polish : int, default=5
        Iterations of L-BFGS on all rows, in float32; 0 for none.
    descent : StochasticPhase
    """

    width: int = 1000
    n_starts: int = 1
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
            A warm start in place of the random ones, filled up to ``width`` with random neurons whose outputs are
            zero; it takes fewer epochs.
        """
        budget = budget or Budget()
        history: list[Progress] = []
        networks, reason = self._descended(rows, loss, weight_decay, rng, budget, initial, history)
        network = mean(networks)
        deadline = budget.until(_DESCENT_SHARE)
        end = reason or ("time_limit" if deadline is not None and time.monotonic() >= deadline else "max_iter")
        if reason or not self.polish:
            return ReluSolution(network.balanced(), end, history)
        single = rows.in_single_precision() if isinstance(rows, MappedRows) else rows.astype(np.float32)
        polished = local_phase(
            single, loss, weight_decay, network, max_iter=self.polish, deadline=budget.deadline
        ).balanced()
        value = loss.of_cases.value(case_outputs(single, loss, polished))
        return ReluSolution(polished, self._reported(history, budget, value, weight_decay, polished) or end, history)

    def _descended(
        self,
        rows: Float | MappedRows,
        loss: Loss,
        weight_decay: float,
        rng: np.random.Generator,
        budget: Budget,
        initial: Neurons | None,
        history: list[Progress],
    ) -> tuple[list[Neurons], str | None]:
        """The network of each descent that has ended, or of the first if none has; and why all have to stop."""
        descent = self.descent
        starts: Sequence[Neurons | None] = [None] * self.n_starts
        if initial is not None and len(initial.output):
            descent = replace(descent, epochs=math.ceil(_WARM * descent.epochs))
            starts = [initial]
        networks: list[Neurons] = []
        for turn, given in enumerate(starts, start=1):
            start = self._start(rows, loss, rng, given)
            deadline, neurons = budget.until(_DESCENT_SHARE * turn / len(starts)), start
            for neurons, seen in descent.run(rows, loss, weight_decay, start, rng, deadline):
                reason = self._reported(history, budget, seen, weight_decay, neurons)
                if reason is not None:
                    return networks or [neurons], reason
            networks.append(merge(neurons))
        return networks, None

    def _start(self, rows: Float | MappedRows, loss: Loss, rng: np.random.Generator, given: Neurons | None) -> Neurons:
        """Random neurons, or those that are given and as many random ones as they lack."""
        missing = self.width - (0 if given is None else len(given.output))
        if given is not None and missing <= 0:
            return given
        drawn = random_start(rng.standard_normal((rows.shape[1], missing)), loss, rng)
        return drawn if given is None else given.joined(Neurons(drawn.first, np.zeros_like(drawn.output)))

    def _reported(
        self, history: list[Progress], budget: Budget, value: float, weight_decay: float, neurons: Neurons
    ) -> str | None:
        """Add to the history and ask whether to stop."""
        objective = value + weight_decay * float(neurons.masses.sum())
        history.append(Progress(len(history) + 1, objective, 0.0, len(neurons.output)))
        return budget.stop_reason(history[-1], tol=0.0, max_iter=self.n_starts * self.descent.epochs + 1)
