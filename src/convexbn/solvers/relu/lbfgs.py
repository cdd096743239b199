"""The local phase: L-BFGS on the balanced network, from random neurons, finds the patterns that matter.

    min  L((A first)_+ output) + beta / 2 (||first||^2 + ||output||^2)

The objective has kinks, on which L-BFGS ends; it is cheap, and wide networks find more than narrow ones. Rows are taken
in blocks, in their own precision: ``6 n q m + 6 n m K`` flops an evaluation, and no array of size ``n x m``; with an
output bias, which all rows share, ``8 n q m + 8 n m K``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import scipy.optimize

from convexbn._types import Float, FloatMatrix
from convexbn.data.row_matrix import MappedRows
from convexbn.program.losses import Loss
from convexbn.program.neurons import Neurons, case_outputs
from convexbn.program.relu import row_blocks


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
        for block, hidden, of_block, dual in _terms(rows, loss, network):
            back, by_output = loss.pull_back(dual.astype(rows.dtype, copy=False), hidden, network.output)
            total += of_block
            ascent += np.concatenate([(block.T @ (back * (hidden > 0))).ravel(), by_output.ravel()])
        return total, weight_decay * x - ascent

    def stop_when_late(intermediate_result: object) -> None:
        if deadline is not None and time.monotonic() >= deadline:
            raise StopIteration

    start = np.concatenate([neurons.first.ravel(), neurons.output.ravel()])
    options = {"maxiter": max_iter, "maxcor": 20, "ftol": 1e-13, "gtol": 1e-9}
    answer = scipy.optimize.minimize(
        value, start, jac=True, method="L-BFGS-B", options=options, callback=stop_when_late
    )
    return split(answer.x)


def _terms(
    rows: FloatMatrix | MappedRows, loss: Loss, network: Neurons
) -> Iterator[tuple[FloatMatrix, FloatMatrix, float, Float]]:
    """Rows, hidden units, loss and dual point, block by block; of a loss that is no sum the outputs are made twice."""
    cases, together = loss.of_cases, loss.rows_together
    whole = None if cases.separable else case_outputs(rows, loss, network)
    dual = None if whole is None else cases.negative_gradient(whole)
    total = cases.constant if whole is None else cases.value(whole)
    for part in row_blocks(len(rows), len(network.output), together):
        block, of_part = rows[part], slice(part.start // together, part.stop // together)
        hidden = np.maximum(block @ network.first, 0)
        if dual is not None:
            yield block, hidden, total, dual[of_part]
        else:
            outputs, here = loss.outputs(hidden, network.output).astype(np.float64, copy=False), cases.of_rows(of_part)
            yield block, hidden, total + here.value(outputs), here.negative_gradient(outputs)
        total = 0.0


def random_neurons(rows: Float, loss: Loss, width: int, rng: np.random.Generator) -> Neurons:
    """Random directions and outputs, with masses at the size of the targets."""
    first = rng.standard_normal((rows.shape[1], width))
    output = rng.standard_normal((width, loss.targets.shape[1]))
    cases = loss.of_cases
    dual = cases.negative_gradient(np.zeros_like(cases.targets)) / np.sqrt(cases.weights)[:, None]
    size = np.linalg.norm(dual) * np.sqrt(loss.rows_together)
    return Neurons(first, output).with_masses(np.full(width, size / width))
