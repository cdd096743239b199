"""Newton's method on a ReLU network with its kinks: first layer, output layer and resting rows jointly.

Each step minimises the convex model of ``newton_model``, whose hinges hold rows on the kinks where they belong; the
steps are damped (Levenberg 1944, Marquardt 1963) and searched along. The method converges quadratically to a point that
is stationary over all directions and outputs of the neurons, for any smooth loss, and drops useless neurons. Pricing
decides whether the network is optimal among all.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import scipy.linalg

from convexbn._types import is_over
from convexbn.program.neurons import Neurons
from convexbn.program.relu import ReluProgram
from convexbn.solvers.relu.newton_model import NewtonModel, NewtonStep

_DROPPED = 1e-9  # relative to the largest norm: smaller ones are dropped
_LEAST_DAMPING, _MOST_DAMPING = 1e-8, 1e6
MOST_VARIABLES = 3000  # of one Newton system; more are taken in blocks, which keeps memory at some 100 MB a matrix
MOST_SYSTEMS = 100  # Newton systems that a polish may take by default


def polish(
    program: ReluProgram, neurons: Neurons, *, damping: float = 0.1, tol: float = 1e-14, max_iter: int = MOST_SYSTEMS,
    deadline: float | None = None,
) -> Neurons:  # fmt: skip
    """A stationary network by Newton's method, never worse than the given one.

    If all variables are too many for one system, blocks of neurons take turns, the heaviest first.

    Parameters
    ----------
    program, neurons : ReluProgram, Neurons
        The program has one case a row.
    damping : float
        First multiple of ``weight_decay`` on the diagonal: less when the neurons are nearly stationary.
    tol, max_iter : float, int
        Predicted decrease relative to the objective at which to stop, and largest number of models of a block.
    deadline : float, optional
    """
    neurons = neurons.select(np.argsort(-neurons.norms)).balanced()
    most = max(1, MOST_VARIABLES // (program.n_inputs + program.n_outputs))
    blocks = [neurons.select(slice(start, start + most)) for start in range(0, len(neurons.output), most)]
    for k, block in enumerate(blocks):
        others = (program.outputs(other) for other in blocks[:k] + blocks[k + 1 :])
        fixed = sum(others, np.zeros_like(program.loss.targets))
        blocks[k] = _newton(replace(program, fixed=fixed), block, damping, tol, max_iter, deadline)
    return functools.reduce(Neurons.joined, blocks, neurons.select(slice(0)))


def _newton(
    program: ReluProgram, neurons: Neurons, damping: float, tol: float, max_iter: int, deadline: float | None
) -> Neurons:
    """Descend until the model predicts a decrease of at most ``tol`` relative to the objective."""
    neurons = neurons.balanced()
    value = program.objective(neurons)
    for _ in range(max_iter):
        if is_over(deadline) or damping > _MOST_DAMPING or not len(neurons.output):
            break
        try:
            step = NewtonModel(program, neurons, damping).minimise(deadline)
        except scipy.linalg.LinAlgError:  # rounding made the model indefinite
            step = None
        if step is None:
            damping = max(10 * damping, 1e-4)
            continue
        length, moved, at_moved = _search(program, neurons, value, step)
        if at_moved < value:
            damping = max((0.2 if length == 1 else 4.0) * damping, _LEAST_DAMPING)
            neurons, value = moved, at_moved
        else:
            damping = max(10 * damping, 1e-4)
        if abs(step.predicted) <= tol * value:
            break
    return neurons


def _search(program: ReluProgram, neurons: Neurons, value: float, step: NewtonStep) -> tuple[float, Neurons, float]:
    """Halve the step until the objective decreases by a share of the prediction, ten times at most.

    Neurons turn along the step; their norms change linearly, so that they can leave in one step.
    """
    length = 1.0
    for _ in range(10):
        norms = np.maximum(neurons.norms * (1 + length * step.growth), 0)
        norms[norms < _DROPPED * norms.max(initial=0.0)] = 0
        moved = Neurons(neurons.first + length * step.first, neurons.output + length * step.output).with_norms(norms)
        at_moved = program.objective(moved)
        if at_moved <= value - 1e-4 * length * step.predicted:
            break
        length *= 0.5
    return length, moved, at_moved
