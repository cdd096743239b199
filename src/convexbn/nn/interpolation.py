"""Networks between a trained one and the optimum, for validation rows to choose from.

The program is convex in the outputs: the mixture ``(1 - t) s F_0 + t F_1`` of the trained network, at the scale ``s``
of least objective, and the optimum has an objective of at most ``(1 - t) P(s F_0) + t P(F_1)``. It is one network, both
side by side. Near ``t = 0`` it predicts the classes of the trained network, so that there is always a mixture that
costs less and is no less accurate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.optimize

from convexbn._types import Float
from convexbn.program.neurons import Neurons
from convexbn.program.relu import ReluProgram

#: Points of the segment that are tried.
_POINTS = 21


class Point(NamedTuple):
    """Network of the segment: its place from the trained one (0) to the optimum (1), neurons and output bias (K,)."""

    step: float
    neurons: Neurons
    output_bias: Float


@dataclass(frozen=True, eq=False)
class Segment:
    """Mixtures of a trained network at its best scale, with its output bias (K,), and the optimum, which has no bias.

    Both are balanced. The output bias is not penalised.
    """

    program: ReluProgram
    trained: Neurons
    output_bias: Float
    optimum: Neurons

    @classmethod
    def between(cls, program: ReluProgram, trained: Neurons, output_bias: Float, optimum: Neurons) -> Segment:
        """Segment from a trained network, whose best scale is found here, to the optimum.

        Parameters
        ----------
        program, trained, optimum : ReluProgram, Neurons, Neurons
        output_bias : ndarray (K,)
            Of the trained network.
        """
        outputs = program.outputs(trained) + output_bias
        price = program.objective_at(0.0, trained)

        def objective(scale: float) -> float:
            return program.loss.value(scale * outputs) + scale * price

        largest = objective(1.0) / price if price > 0 else 1.0  # no loss is negative: beyond, the penalty costs more
        options = {"xatol": 1e-8 * largest}
        found = scipy.optimize.minimize_scalar(objective, bounds=(0.0, largest), method="bounded", options=options)
        scale = min((1.0, float(found.x)), key=objective)
        return cls(program, trained.with_norms(scale * trained.norms), scale * output_bias, optimum.balanced())

    def points(self) -> Iterator[Point]:
        """Yield networks of the segment, that of least objective first."""
        program, steps = self.program, np.linspace(0, 1, _POINTS)
        start, end = program.outputs(self.trained) + self.output_bias, program.outputs(self.optimum)
        prices = np.array([program.objective_at(0.0, self.trained), program.objective_at(0.0, self.optimum)])
        values = [program.loss.value((1 - t) * start + t * end) + prices @ [1 - t, t] for t in steps]
        yield from (self.at(float(step)) for step in steps[np.argsort(values, kind="stable")])

    def at(self, step: float) -> Point:
        """Network at a place of the segment: 0 the trained one, 1 the optimum."""
        trained = self.trained.with_norms((1 - step) * self.trained.norms)
        optimum = self.optimum.with_norms(step * self.optimum.norms)
        return Point(step, trained.joined(optimum), (1 - step) * self.output_bias)
