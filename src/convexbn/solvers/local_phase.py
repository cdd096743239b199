"""The local phase: L-BFGS on the balanced network, from random neurons, finds the patterns that matter.

    min  L((A first)_+ output) + beta / 2 (||first||^2 + ||output||^2)

The objective has kinks, on which L-BFGS ends; it is cheap, and wide networks find more than narrow ones. Rows are taken
in blocks, in their own precision: ``6 n q m + 6 n m K`` flops an evaluation, and no array of size ``n x m``.
"""

from __future__ import annotations

import time

import numpy as np
import scipy.optimize

from convexbn._typing import Float, FloatMatrix
from convexbn.losses import Loss
from convexbn.mapped_rows import MappedRows
from convexbn.solvers.neurons import Neurons, row_blocks


def local_phase(
    rows: FloatMatrix | MappedRows,
    loss: Loss,
    weight_decay: float,
    neurons: Neurons,
    max_iter: int = 400,
    deadline: float | None = None,
) -> Neurons:
    """Train both layers; ``deadline`` is a ``time.monotonic()``."""
    size, shapes = neurons.first.size, (neurons.first.shape, neurons.output.shape)

    def split(x: Float) -> Neurons:
        return Neurons(x[:size].reshape(shapes[0]), x[size:].reshape(shapes[1]))

    def value(x: Float) -> tuple[float, Float]:
        network = split(x.astype(rows.dtype, copy=False))
        total, ascent = 0.5 * weight_decay * float(x @ x), np.zeros(len(x))
        for part in row_blocks(len(rows), shapes[0][1], loss.rows_together):
            here, block = loss.of_rows(part), rows[part]
            hidden = np.maximum(block @ network.first, 0)
            outputs = here.outputs(hidden, network.output).astype(np.float64, copy=False)
            dual = here.of_cases.negative_gradient(outputs).astype(rows.dtype, copy=False)
            back, by_output = here.pull_back(dual, hidden, network.output)
            total += here.of_cases.value(outputs)
            ascent += np.concatenate([(block.T @ (back * (hidden > 0))).ravel(), by_output.ravel()])
        return total + loss.of_cases.constant, weight_decay * x - ascent

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
    cases = loss.of_cases
    dual = cases.negative_gradient(np.zeros_like(cases.targets)) / np.sqrt(cases.weights)[:, None]
    size = np.linalg.norm(dual) * np.sqrt(loss.rows_together)
    return Neurons(first, output).with_masses(np.full(width, size / width))
