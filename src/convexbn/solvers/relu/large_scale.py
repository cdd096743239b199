"""ReLU networks on many rows: mini-batch descents, merging, their mean, a full-batch polish.

Column generation and Newton's method would take seconds an iteration. The result is a good network, not an optimum; its
certificate says how good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from convexbn._types import is_over
from convexbn.program.neurons import Neurons, mean, merge
from convexbn.program.relu import ReluProgram
from convexbn.solvers.base import Budget, Progress, Solution, Solver
from convexbn.solvers.relu.lbfgs import lbfgs
from convexbn.solvers.relu.sgd import SGD, random_start

_DESCENT_SHARE = 0.7  # of a time limit that the descents may take before the polish begins

#: Share of the epochs that a warm start takes. On a path of 20 weight decays on 10,000 images the objectives are within
#: .2 per cent of those of cold starts down to a thirtieth of the largest decay, 2 per cent above at a fiftieth and 16
#: at a hundredth; with a fifth of the epochs at a third of the learning rate 7 per cent above at an eighteenth already.
_WARM = 0.6


@dataclass(frozen=True)
class LargeScale(Solver[ReluProgram, Neurons]):
    """Mini-batch descents, merging, their mean, and full-batch L-BFGS.

    A warm start replaces the random starts and takes fewer epochs; it is filled up to ``width`` with random neurons of
    zero output. The history has the objective as the batches saw it and the trivial bound 0.

    Parameters
    ----------
    width, n_starts : int
        Neurons of a descent, and number of descents, each from a random start.
    polish, descent : int, SGD
        Iterations of L-BFGS on all rows, in float32 (may be 0), and settings of a descent.
    """

    width: int = 1000
    n_starts: int = 1
    polish: int = 5
    descent: SGD = field(default_factory=SGD)

    def _solve(
        self, program: ReluProgram, start: Neurons | None, budget: Budget, rng: np.random.Generator
    ) -> Solution[Neurons]:
        networks, history, reason = self._descend(program, start, budget, rng)
        network = mean(networks)
        end = reason or ("time_limit" if is_over(budget.until(_DESCENT_SHARE)) else "max_iter")
        if reason or not self.polish:
            return Solution(network.balanced(), end, history)
        single = program.in_single_precision
        polished = lbfgs(single, network, self.polish, budget.deadline).balanced()
        reason = self._report(history, budget, single.objective(polished), polished)
        return Solution(polished, reason or end, history)

    def _descend(
        self, program: ReluProgram, warm: Neurons | None, budget: Budget, rng: np.random.Generator
    ) -> tuple[list[Neurons], list[Progress], str | None]:
        """The network of each completed descent, or of the first if none has; the history, and why to stop early."""
        descent = self.descent
        starts: Sequence[Neurons | None] = [None] * self.n_starts
        if warm is not None and len(warm.output):
            descent, starts = replace(descent, epochs=math.ceil(_WARM * descent.epochs)), [warm]
        networks: list[Neurons] = []
        history: list[Progress] = []
        for turn, given in enumerate(starts, start=1):
            neurons = first = self._start(program, given, rng)
            for neurons, seen in descent.run(program, first, rng, budget.until(_DESCENT_SHARE * turn / len(starts))):
                reason = self._report(history, budget, program.objective_at(seen, neurons), neurons)
                if reason is not None:
                    return networks or [neurons], history, reason
            networks.append(merge(neurons))
        return networks, history, None

    def _start(self, program: ReluProgram, given: Neurons | None, rng: np.random.Generator) -> Neurons:
        """Random neurons, or the given ones filled up with random ones."""
        missing = self.width - (0 if given is None else len(given.output))
        if given is not None and missing <= 0:
            return given
        drawn = random_start(program, rng.standard_normal((program.n_inputs, missing)), rng)
        return drawn if given is None else given.joined(Neurons(drawn.first, np.zeros_like(drawn.output)))

    def _report(self, history: list[Progress], budget: Budget, objective: float, neurons: Neurons) -> str | None:
        """Add to the history; why to stop, or None."""
        history.append(Progress(len(history) + 1, objective, 0.0, len(neurons.output)))
        return budget.stop_reason(history[-1], tol=0.0, max_iter=self.n_starts * self.descent.epochs + 1)
