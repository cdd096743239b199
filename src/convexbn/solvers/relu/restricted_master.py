"""The ReLU program over the masses of given neurons: which of them are needed, and how much of each.

    min over r >= 0   L(sum_j r_j (A u_j)_+ c_j') + beta sum_j r_j,    ||u_j|| = ||c_j|| = 1

It is convex, has one variable a neuron, and its solution uses few of them, whatever the starting masses: what many
neurons of a trained network say together, and whether new ones are of use.
"""

from __future__ import annotations

import time

import numpy as np

from convexbn._types import Float
from convexbn.program.gauss_newton import gauss_newton
from convexbn.program.losses import Loss
from convexbn.program.neurons import Neurons
from convexbn.solvers.box_qp import minimise_over_box

#: Masses are dropped below this multiple of the largest.
_DROPPED = 1e-7


def with_best_masses(
    rows: Float, loss: Loss, weight_decay: float, neurons: Neurons, max_iter: int = 30, deadline: float | None = None
) -> Neurons:
    """The same directions and outputs with the masses of least objective, by Newton's method over ``r >= 0``."""
    unit = neurons.with_masses(np.ones(len(neurons.output)))
    masses = neurons.masses[neurons.masses > 0]
    hidden = np.maximum(rows @ unit.first, 0)

    def objective(r: Float) -> float:
        return loss.value(hidden @ (r[:, None] * unit.output)) + weight_decay * float(r.sum())

    def derivative(half: Float, part: slice) -> Float:
        change: Float = np.einsum("ilk,jl->ikj", half, unit.output) * hidden[part][:, None, :]
        return change

    value = objective(masses)
    largest = np.full(len(masses), value / weight_decay)  # the losses are nonnegative
    for _ in range(max_iter):
        if not len(masses) or (deadline is not None and time.monotonic() >= deadline):
            break
        outputs = hidden @ (masses[:, None] * unit.output)
        slope = weight_decay - np.sum(hidden * (loss.negative_gradient(outputs) @ unit.output.T), axis=0)
        gram = gauss_newton(loss, outputs, derivative, len(masses))
        best = minimise_over_box(gram, gram @ masses - slope, largest, masses, deadline)
        step, length = best - masses, 1.0
        predicted = -float(slope @ step + 0.5 * step @ gram @ step)
        while objective(masses + length * step) > value - 1e-4 * length * predicted and length > 1e-3:
            length *= 0.5
        if objective(masses + length * step) >= value:
            break
        masses = masses + length * step
        value = objective(masses)
        if predicted <= 1e-9 * value:
            break
    masses[masses < _DROPPED * masses.max(initial=0.0)] = 0
    return unit.with_masses(masses)
