"""L-BFGS on the balanced network: cheap, and it finds the patterns that matter.

    min  L((A first)_+ output) + beta / 2 (||first||^2 + ||output||^2)

L-BFGS ends on the kinks of the objective; wide networks find more than narrow ones. Rows are taken in blocks, in their
own precision: ``6 n q m + 6 n m K`` flops an evaluation, and no array of size ``n x m``; with an output bias, which all
rows share, ``8 n q m + 8 n m K``.
"""

from __future__ import annotations

import numpy as np

from convexbn._types import Float
from convexbn.bounds import descent
from convexbn.data.row_matrix import row_matrix
from convexbn.program import kernels
from convexbn.program.neurons import Neurons
from convexbn.program.relu import ReluProgram, hidden_block


def lbfgs(program: ReluProgram, neurons: Neurons, max_iter: int = 400, deadline: float | None = None) -> Neurons:
    """Train both layers from given neurons.

    Parameters
    ----------
    program, neurons, max_iter, deadline : ReluProgram, Neurons, int, float or None
        Rows may be in float32; sums are in float64.
    """
    decay, size, shapes = program.weight_decay, neurons.first.size, (neurons.first.shape, neurons.output.shape)

    def split(x: Float) -> Neurons:
        return Neurons(x[:size].reshape(shapes[0]), x[size:].reshape(shapes[1]))

    def value(x: Float) -> tuple[float, Float]:
        loss, ascent = _loss_and_ascent(program, split(x))
        return loss + 0.5 * decay * float(x @ x), decay * x - ascent

    start = np.concatenate([neurons.first.ravel(), neurons.output.ravel()])
    return split(descent.minimise(value, start, max_iter=max_iter, deadline=deadline, ftol=1e-13)[0])


def _loss_and_ascent(program: ReluProgram, network: Neurons) -> tuple[float, Float]:
    """Loss and its negative gradient in both layers; a loss that is not a sum over rows takes a second pass."""
    rows, loss, readout = row_matrix(program.rows), program.loss, program.readout
    first, output = (layer.astype(rows.dtype, copy=False) for layer in (network.first, network.output))
    size, shared = hidden_block(len(output), readout), [first, output, readout]
    if loss.separable:
        value, *ascents = rows.reduce(kernels.loss_and_ascent, size, along=[loss], shared=shared)
        value += loss.constant
    else:
        outputs = program.outputs(Neurons(first, output))
        value, dual = loss.value(outputs), loss.negative_gradient(outputs)
        ascents = [*rows.reduce(kernels.ascent, size, along=[dual], shared=shared)]
    return value, np.concatenate([ascent.ravel() for ascent in ascents])


def random_neurons(program: ReluProgram, width: int, rng: np.random.Generator) -> Neurons:
    """Random directions and outputs, with norms at the size of the targets.

    Parameters
    ----------
    program, width, rng : ReluProgram, int, numpy.random.Generator
    """
    loss = program.loss
    first = rng.standard_normal((program.n_inputs, width))
    output = rng.standard_normal((width, program.n_outputs))
    dual = loss.negative_gradient(np.zeros_like(loss.targets)) / np.sqrt(loss.weights)[:, None]
    size = np.linalg.norm(dual) * np.sqrt(program.readout.rows_per_case)
    return Neurons(first, output).with_norms(np.full(width, size / width))
