"""The restricted master problem: the ReLU program over the norms of given neurons.

    min over r >= 0   L(sum_j r_j (A u_j)_+ c_j') + beta sum_j r_j,    ||u_j|| = ||c_j|| = 1

It is convex with one variable a neuron. Its solution uses few of them, whatever the starting norms: it tells which of
many neurons are needed, how much of each, and whether new ones are of use.
"""

from __future__ import annotations

import numpy as np

from convexbn._types import Float, is_over
from convexbn.program.neurons import Neurons
from convexbn.program.relu import ReluProgram
from convexbn.solvers.box_qp import minimise_over_box

_DROPPED = 1e-7  # relative to the largest norm: smaller ones are dropped


def with_best_norms(program: ReluProgram, neurons: Neurons, deadline: float | None = None) -> Neurons:
    """Neurons with the norms of least objective at fixed directions and outputs, by Newton's method over ``r >= 0``.

    Parameters
    ----------
    program, neurons, deadline : ReluProgram, Neurons, float or None
        The program has one case a row.
    """
    loss, weight_decay = program.loss, program.weight_decay
    unit = neurons.with_norms(np.ones(len(neurons.output)))
    norms = neurons.norms[neurons.norms > 0]
    hidden = np.maximum(program.rows[:] @ unit.first, 0)

    def objective(r: Float) -> float:
        return loss.value(hidden @ (r[:, None] * unit.output)) + weight_decay * float(r.sum())

    def derivative(half: Float, part: slice) -> Float:
        return np.einsum("ilk,jl->ikj", half, unit.output) * hidden[part][:, None, :]

    value = objective(norms)
    largest = np.full(len(norms), value / weight_decay)  # the losses are nonnegative
    for _ in range(30):
        if not len(norms) or is_over(deadline):
            break
        outputs = hidden @ (norms[:, None] * unit.output)
        slope = weight_decay - np.sum(hidden * (loss.negative_gradient(outputs) @ unit.output.T), axis=0)
        gram = loss.gauss_newton(outputs, derivative, len(norms))
        best = minimise_over_box(gram, gram @ norms - slope, largest, norms, deadline)
        step, length = best - norms, 1.0
        predicted = -float(slope @ step + 0.5 * step @ gram @ step)
        while objective(norms + length * step) > value - 1e-4 * length * predicted and length > 1e-3:
            length *= 0.5
        if objective(norms + length * step) >= value:
            break
        norms = norms + length * step
        value = objective(norms)
        if predicted <= 1e-9 * value:
            break
    norms[norms < _DROPPED * norms.max(initial=0.0)] = 0
    return unit.with_norms(norms)
