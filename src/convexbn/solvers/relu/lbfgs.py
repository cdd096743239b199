"""L-BFGS on the balanced network: cheap, and it finds the patterns that matter.

    min  L((A first)_+ output) + beta / 2 (||first||^2 + ||output||^2)

L-BFGS ends on the kinks of the objective; wide networks find more than narrow ones. Rows are taken in blocks, in their
own precision: ``6 n q m + 6 n m K`` flops an evaluation, and no array of size ``n x m``. An output bias is one more
variable, in units in which the loss has curvature 1.
"""

from __future__ import annotations

from typing import Any

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
    layers, loss = (neurons.first, neurons.output), program.loss
    ends, unit = np.cumsum([layer.size for layer in layers]), 1 / np.sqrt(loss.weights.sum())
    decays = np.full(ends[1], program.weight_decay)
    start = np.concatenate([layer.ravel() for layer in layers])
    if biased := loss is not loss.without_bias:
        start = np.concatenate([start, loss.best_bias(program.outputs(neurons)) / unit])
        decays = np.append(decays, np.full(len(start) - len(decays), loss.bias_decay * unit**2))

    def split(x: Float) -> Neurons:
        return Neurons(*(part.reshape(layer.shape) for part, layer in zip(np.split(x, ends), layers, strict=False)))

    def value(x: Float) -> tuple[float, Float]:
        bias = unit * x[ends[1] :] if biased else np.zeros(loss.targets.shape[1])
        found, *ascents = _loss_and_ascent(program, split(x), bias)
        ascent = np.concatenate([part.ravel() for part in ascents[: 2 + biased]])
        ascent[ends[1] :] *= unit
        return found + 0.5 * float(decays @ x**2), decays * x - ascent

    return split(descent.minimise(value, start, max_iter=max_iter, deadline=deadline, ftol=1e-13)[0])


def _loss_and_ascent(program: ReluProgram, network: Neurons, bias: Float) -> tuple[Any, ...]:
    """Loss, and its negative gradient in both layers and the output bias."""
    rows, loss, readout = row_matrix(program.rows), program.loss.without_bias, program.readout
    first, output = (layer.astype(rows.dtype, copy=False) for layer in (network.first, network.output))
    size, shared = hidden_block(len(output), readout), [first, output, bias, readout]
    value, *ascents = rows.reduce(kernels.loss_and_ascent, size, along=[loss], shared=shared)
    return value + loss.constant, *ascents


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
