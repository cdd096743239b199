"""L-BFGS on the balanced network: cheap, and it finds the patterns that matter.

    min  L((A first)_+ output) + beta / 2 (||first||^2 + ||output||^2)

The objective has kinks, on which L-BFGS ends; wide networks find more than narrow ones. Rows are taken in blocks, in
their own precision: ``6 n q m + 6 n m K`` flops an evaluation, and no array of size ``n x m``; with an output bias,
which all rows share, ``8 n q m + 8 n m K``.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.optimize

from convexbn._types import Float, FloatMatrix, is_over
from convexbn.data.blocks import row_blocks
from convexbn.program.neurons import Neurons
from convexbn.program.relu import BLOCK_ENTRIES, LEAST_ROWS, ReluProgram


def lbfgs(program: ReluProgram, neurons: Neurons, max_iter: int = 400, deadline: float | None = None) -> Neurons:
    """Train both layers from given neurons.

    Parameters
    ----------
    program : ReluProgram
        Its rows may be of float32; sums are of float64.
    neurons : Neurons
        Where to begin.
    max_iter : int, default=400
        Largest number of iterations.
    deadline : float, optional
        ``time.monotonic()`` at which to stop.
    """
    dtype, decay = program.rows.dtype, program.weight_decay
    size, shapes = neurons.first.size, (neurons.first.shape, neurons.output.shape)

    def split(x: Float) -> Neurons:
        return Neurons(x[:size].reshape(shapes[0]), x[size:].reshape(shapes[1]))

    def value(x: Float) -> tuple[float, Float]:
        network = split(x.astype(dtype, copy=False))
        total, ascent = 0.5 * decay * float(x @ x), np.zeros(len(x))
        for block, hidden, of_block, dual in _terms(program, network):
            back, by_output = program.readout.pull_back(dual.astype(dtype, copy=False), hidden, network.output)
            total += of_block
            ascent += np.concatenate([(block.T @ (back * (hidden > 0))).ravel(), by_output.ravel()])
        return total, decay * x - ascent

    def stop_when_late(intermediate_result: object) -> None:
        if is_over(deadline):
            raise StopIteration

    start = np.concatenate([neurons.first.ravel(), neurons.output.ravel()])
    options = {"maxiter": max_iter, "maxcor": 20, "ftol": 1e-13, "gtol": 1e-9}
    answer = scipy.optimize.minimize(
        value, start, jac=True, method="L-BFGS-B", options=options, callback=stop_when_late
    )
    return split(answer.x)


def _terms(program: ReluProgram, network: Neurons) -> Iterator[tuple[FloatMatrix, FloatMatrix, float, Float]]:
    """Rows, hidden units, loss and dual point, block by block; a loss that is not a sum takes a pass of its own."""
    rows, loss, together = program.rows, program.loss, program.readout.rows_per_case
    whole = None if loss.separable else program.outputs(network)
    dual = None if whole is None else loss.negative_gradient(whole)
    total = loss.constant if whole is None else loss.value(whole)
    blocks = row_blocks(len(rows), len(network.output), entries=BLOCK_ENTRIES, least=LEAST_ROWS, together=together)
    for part in blocks:
        block, of_part = rows[part], slice(part.start // together, part.stop // together)
        hidden = np.maximum(block @ network.first, 0)
        if dual is not None:
            yield block, hidden, total, dual[of_part]
        else:
            outputs = program.readout.outputs(hidden, network.output).astype(np.float64, copy=False)
            here = loss.of_rows(of_part)
            yield block, hidden, total + here.value(outputs), here.negative_gradient(outputs)
        total = 0.0


def random_neurons(program: ReluProgram, width: int, rng: np.random.Generator) -> Neurons:
    """Random directions and outputs, with norms at the size of the targets.

    Parameters
    ----------
    program : ReluProgram
    width : int
        Neurons.
    rng : numpy.random.Generator
    """
    loss = program.loss
    first = rng.standard_normal((program.n_inputs, width))
    output = rng.standard_normal((width, program.n_outputs))
    dual = loss.negative_gradient(np.zeros_like(loss.targets)) / np.sqrt(loss.weights)[:, None]
    size = np.linalg.norm(dual) * np.sqrt(program.readout.rows_per_case)
    return Neurons(first, output).with_norms(np.full(width, size / width))
