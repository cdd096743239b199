"""The local phase: L-BFGS on the balanced network, from random neurons, finds the patterns that matter.

    min  L((A first)_+ output) + beta / 2 (||first||^2 + ||output||^2)

The objective has kinks, on which L-BFGS ends; it is cheap, and wide networks find more than narrow ones.
"""

from __future__ import annotations

import time

import numpy as np
import scipy.optimize

from convexbn._typing import Float
from convexbn.losses import Loss
from convexbn.solvers.neurons import Neurons


def local_phase(
    rows: Float, loss: Loss, weight_decay: float, neurons: Neurons, max_iter: int = 400, deadline: float | None = None
) -> Neurons:
    """Train both layers; ``deadline`` is a ``time.monotonic()``."""
    size, shapes = neurons.first.size, (neurons.first.shape, neurons.output.shape)

    def split(x: Float) -> Neurons:
        return Neurons(x[:size].reshape(shapes[0]), x[size:].reshape(shapes[1]))

    def value(x: Float) -> tuple[float, Float]:
        network = split(x)
        response = rows @ network.first
        hidden = np.maximum(response, 0)
        outputs = hidden @ network.output
        dual = loss.negative_gradient(outputs)
        back = (dual @ network.output.T) * (response > 0)
        gradient = weight_decay * x - np.concatenate([(rows.T @ back).ravel(), (hidden.T @ dual).ravel()])
        return loss.value(outputs) + 0.5 * weight_decay * float(x @ x), gradient

    def stop_when_late(intermediate_result: object) -> None:
        if deadline is not None and time.monotonic() >= deadline:
            raise StopIteration

    start = np.concatenate([neurons.first.ravel(), neurons.output.ravel()])
    options = {"maxiter": max_iter, "maxcor": 20, "ftol": 1e-13, "gtol": 1e-9}
    answer = scipy.optimize.minimize(
        value, start, jac=True, method="L-BFGS-B", options=options, callback=stop_when_late
    )
    return split(answer.x)


def random_neurons(rows: Float, loss: Loss, width: int, rng: np.random.Generator) -> Neurons:
    """Random directions and outputs, with masses at the size of the targets."""
    first = rng.standard_normal((rows.shape[1], width))
    output = rng.standard_normal((width, loss.targets.shape[1]))
    dual = loss.negative_gradient(np.zeros_like(loss.targets)) / np.sqrt(loss.weights)[:, None]
    return Neurons(first, output).with_masses(np.full(width, np.linalg.norm(dual) / width))
