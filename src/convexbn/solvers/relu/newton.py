"""Newton's method on a ReLU network with its kinks: first layer, output layer and resting rows jointly.

Each step minimises the convex model of ``newton_model``, whose hinges hold rows on the kinks where they belong; the
steps are damped (Levenberg 1944, Marquardt 1963) and searched along. It converges quadratically to a point that
is stationary over all directions and outputs of the neurons, for any smooth loss, and drops the neurons that the
program has no use for. Optimality among all networks is for the pricing to find out.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import scipy.linalg

from convexbn._types import is_over
from convexbn.program.neurons import Neurons
from convexbn.program.relu import ReluProgram
from convexbn.solvers.relu.newton_model import NewtonModel, NewtonStep

#: Norms are dropped below this multiple of the largest.
_DROPPED = 1e-9

_LEAST_DAMPING = 1e-8
_MOST_DAMPING = 1e6

#: Variables of one Newton system; more are taken in blocks, which keeps memory at some 100 MB a matrix.
_MOST_VARIABLES = 3000

#: Newton systems that a polish may take by default.
MOST_SYSTEMS = 100


class _Trial(NamedTuple):
    neurons: Neurons
    value: float


def newton(
    program: ReluProgram,
    neurons: Neurons,
    *,
    damping: float = 0.1,
    tol: float = 1e-14,
    max_iter: int = MOST_SYSTEMS,
    deadline: float | None = None,
) -> Neurons:
    """Descend from given neurons until the model predicts a decrease of at most ``tol`` relative to the objective.

    Parameters
    ----------
    program : ReluProgram
        With one case a row.
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
    point = _Trial(neurons, program.objective(neurons))
    for _ in range(max_iter):
        if is_over(deadline) or damping > _MOST_DAMPING or not len(point.neurons.output):
            break
        step = _model_step(program, point.neurons, damping, deadline)
        if step is None:
            damping = max(10 * damping, 1e-4)
            continue
        length, following = _search(program, point, step)
        if following.value < point.value:
            damping = max((0.2 if length == 1 else 4.0) * damping, _LEAST_DAMPING)
            point = following
        else:
            damping = max(10 * damping, 1e-4)
        if abs(step.predicted) <= tol * point.value:
            break
    return point.neurons


def polish(
    program: ReluProgram,
    neurons: Neurons,
    *,
    damping: float = 0.1,
    tol: float = 1e-14,
    max_iter: int = MOST_SYSTEMS,
    deadline: float | None = None,
) -> Neurons:
    """A stationary network by Newton's method, never worse than the one that is given.

    Where all variables are too many for one system, blocks of neurons take turns, the heaviest first.

    Parameters
    ----------
    program, neurons, damping, tol, max_iter, deadline
        As in ``newton``.
    """
    neurons = neurons.select(np.argsort(-neurons.norms)).balanced()
    most = max(1, _MOST_VARIABLES // (program.n_inputs + program.n_outputs))
    blocks = [neurons.select(slice(start, start + most)) for start in range(0, len(neurons.output), most)]
    for k, block in enumerate(blocks):
        fixed = np.zeros_like(program.loss.targets)
        for other in blocks[:k] + blocks[k + 1 :]:
            fixed += program.outputs(other)
        apart = replace(program, fixed=fixed)
        blocks[k] = newton(apart, block, damping=damping, tol=tol, max_iter=max_iter, deadline=deadline)
    return functools.reduce(Neurons.joined, blocks, neurons.select(slice(0)))


def _model_step(program: ReluProgram, neurons: Neurons, damping: float, deadline: float | None) -> NewtonStep | None:
    try:
        model = NewtonModel(program, neurons, damping)
    except scipy.linalg.LinAlgError:  # rounding made the model indefinite
        return None
    return model.minimise(deadline)


def _search(program: ReluProgram, point: _Trial, step: NewtonStep) -> tuple[float, _Trial]:
    """Halve the step until the objective decreases by a share of the prediction, ten times at most."""
    length = 1.0
    for _ in range(10):
        following = _moved(program, point.neurons, step, length)
        if following.value <= point.value - 1e-4 * length * step.predicted:
            break
        length *= 0.5
    return length, following


def _moved(program: ReluProgram, neurons: Neurons, step: NewtonStep, length: float) -> _Trial:
    """Turn the neurons along the step; their norms change linearly, so that they can leave in one step."""
    norms = np.maximum(neurons.norms * (1 + length * step.growth), 0)
    norms[norms < _DROPPED * norms.max(initial=0.0)] = 0
    turned = Neurons(neurons.first + length * step.first, neurons.output + length * step.output).with_norms(norms)
    return _Trial(turned, program.objective(turned))
