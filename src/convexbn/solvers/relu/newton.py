"""Newton's method on a ReLU network with its kinks: first layer, output layer and resting rows jointly.

Each step minimises the convex model of ``newton_model``, whose hinges hold rows on the kinks where they belong; the
steps are damped (Levenberg 1944, Marquardt 1963) and searched along. It converges quadratically to a point that
is stationary over all directions and outputs of the neurons, for any smooth loss, and drops the neurons that the
program has no use for. Optimality among all networks is for the pricing to find out.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import scipy.linalg

from convexbn._types import Float
from convexbn.program.losses import Loss
from convexbn.program.neurons import Neurons, network_outputs
from convexbn.solvers.relu.newton_model import KinkModel, Step

#: Masses are dropped below this multiple of the largest.
_DROPPED = 1e-9

_LEAST_DAMPING = 1e-8
_MOST_DAMPING = 1e6


class _Trial(NamedTuple):
    neurons: Neurons
    value: float


class KinkNewton:
    """Minimise ``L(fixed + (A first)_+ output) + weight_decay sum ||s_j|| ||c_j||`` from given neurons.

    Parameters
    ----------
    rows : ndarray (n, q)
    loss : Loss
    weight_decay : float
    fixed : ndarray (n, K)
        Outputs of neurons that stay as they are.
    """

    def __init__(self, rows: Float, loss: Loss, weight_decay: float, fixed: Float) -> None:
        self.rows, self.loss, self.weight_decay, self.fixed = rows, loss, weight_decay, fixed

    def objective(self, neurons: Neurons) -> float:
        """Loss and penalty."""
        outputs = self.fixed + network_outputs(self.rows, neurons)
        return self.loss.value(outputs) + self.weight_decay * float(neurons.masses.sum())

    def solve(
        self, neurons: Neurons, *, damping: float = 0.1, tol: float = 1e-14, max_iter: int = 100,
        deadline: float | None = None,
    ) -> Neurons:  # fmt: skip
        """Descend until the model predicts a decrease of at most ``tol`` relative to the objective.

        Parameters
        ----------
        neurons : Neurons
        damping : float
            First multiple of ``weight_decay`` on the diagonal: less when the neurons are nearly stationary.
        tol : float
        max_iter : int
            Largest number of models.
        deadline : float, optional
            ``time.monotonic()`` after which no model is built.
        """
        neurons = neurons.balanced()
        point = _Trial(neurons, self.objective(neurons))
        for _ in range(max_iter):
            late = deadline is not None and time.monotonic() >= deadline
            if late or damping > _MOST_DAMPING or not len(point.neurons.output):
                break
            step = self._model_step(point, damping, deadline)
            if step is None:
                damping = max(10 * damping, 1e-4)
                continue
            length, following = self._search(point, step)
            if following.value < point.value:
                damping = max((0.2 if length == 1 else 4.0) * damping, _LEAST_DAMPING)
                point = following
            else:
                damping = max(10 * damping, 1e-4)
            if abs(step.predicted) <= tol * point.value:
                break
        return point.neurons

    def _model_step(self, point: _Trial, damping: float, deadline: float | None) -> Step | None:
        try:
            model = KinkModel(self.rows, self.loss, self.weight_decay, self.fixed, point.neurons, damping)
        except scipy.linalg.LinAlgError:  # rounding made the model indefinite
            return None
        return model.minimise(deadline)

    def _search(self, point: _Trial, step: Step) -> tuple[float, _Trial]:
        """Halve the step until the objective decreases by a share of the prediction, ten times at most."""
        length = 1.0
        for _ in range(10):
            following = self._moved(point, step, length)
            if following.value <= point.value - 1e-4 * length * step.predicted:
                break
            length *= 0.5
        return length, following

    def _moved(self, point: _Trial, step: Step, length: float) -> _Trial:
        """Turn the neurons along the step; their masses change linearly, so that they can leave in one step."""
        masses = np.maximum(point.neurons.masses * (1 + length * step.growth), 0)
        masses[masses < _DROPPED * masses.max(initial=0.0)] = 0
        turned = Neurons(point.neurons.first + length * step.first, point.neurons.output + length * step.output)
        neurons = turned.with_masses(masses)
        return _Trial(neurons, self.objective(neurons))
