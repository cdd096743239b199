"""ReLU networks over all patterns: local phase, restricted convex program, pricing, repeated.

A sampled set of patterns is not the program. The local phase trains the balanced network on the whitened
data, which finds patterns that matter; the restricted program makes it optimal for those patterns;
pricing looks for a neuron ``u`` with ``||V'(A u)_+|| > weight_decay ||u||``, which would lower the objective, and
hands it back to the local phase. What pricing does not find is bounded by ``bounds``, not by pricing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from convexbn import bounds
from convexbn._typing import Float
from convexbn.losses import Loss, SquaredLoss
from convexbn.solvers.cone_program import ConeProgram
from convexbn.solvers.solution import Budget, Progress

#: Directions closer than this (cosine) with equal outputs are one neuron.
_SAME = 1 - 1e-4

#: Mass relative to the largest below which a neuron is dropped.
_NEGLIGIBLE = 1e-5


@dataclass(frozen=True)
class Neurons:
    """A network on the whitened data: ``F = (A first)_+ output``, ``first`` (q, m), ``output`` (m, K)."""

    first: Float
    output: Float

    @property
    def masses(self) -> Float:
        """``||s_j|| ||c_j||``."""
        masses: Float = np.linalg.norm(self.first, axis=0) * np.linalg.norm(self.output, axis=1)
        return masses

    def joined(self, other: Neurons) -> Neurons:
        """Both networks side by side."""
        return Neurons(np.hstack([self.first, other.first]), np.vstack([self.output, other.output]))


@dataclass(frozen=True)
class ReluSolution:
    """Neurons, why the solver stopped, and the history of (objective, estimated bound)."""

    neurons: Neurons
    stopped_by: str
    history: list[Progress] = field(default_factory=list)


@dataclass(frozen=True)
class NeuronPricing:
    """Local phase, restricted convex program, pricing, until nothing better is found.

    Parameters
    ----------
    tol : float, default=1e-6
        Relative gap against the estimated bound at which to stop.
    max_iter : int, default=30
        Largest number of rounds.
    width : int, default=50
        Neurons of the first local phase.
    n_starts : int, default=300
        Random starts of each pricing.
    """

    tol: float = 1e-6
    max_iter: int = 30
    width: int = 50
    n_starts: int = 300

    def solve(
        self, rows: Float, loss: Loss, weight_decay: float, rng: np.random.Generator, budget: Budget | None = None
    ) -> ReluSolution:
        """Train on whitened rows; the bounds in the history rest on a local search and prove nothing."""
        budget = budget or Budget()
        root = np.sqrt(loss.weights)[:, None]
        neurons = merge(local_phase(rows, loss, weight_decay, _random(rows, loss, self.width, rng)))
        history: list[Progress] = []
        best, record = neurons, np.inf
        while True:
            neurons = polish(rows, loss, weight_decay, neurons)
            outputs = network_outputs(rows, neurons)
            objective = loss.value(outputs) + weight_decay * float(neurons.masses.sum())
            if objective < record:
                best, record = neurons, objective
            V = loss.negative_gradient(outputs) / root
            values, found = bounds.local_maxima(V, root * rows, self.n_starts, rng, initial=neurons.first.T)
            estimate = loss.dual_value(min(1.0, weight_decay / values[0]) * root * V)
            history.append(Progress(len(history) + 1, record, estimate, neurons.first.shape[1]))
            better = values > weight_decay * (1 + 0.1 * self.tol)
            reason = budget.stop_reason(history[-1], tol=self.tol, max_iter=self.max_iter)
            if reason is None and not better.any():
                reason = "stalled"
            if reason is not None:
                return ReluSolution(best, reason, history)
            new = _newcomers(root * rows, V, found[better].T, neurons)
            together = neurons.joined(new)
            neurons = merge(local_phase(rows, loss, weight_decay, together))
            if isinstance(loss, SquaredLoss):  # the restricted program chooses among all of them
                neurons = neurons.joined(together)


def network_outputs(rows: Float, neurons: Neurons) -> Float:
    """``F = (A first)_+ output``."""
    outputs: Float = np.maximum(rows @ neurons.first, 0) @ neurons.output
    return outputs


def local_phase(rows: Float, loss: Loss, weight_decay: float, neurons: Neurons, max_iter: int = 400) -> Neurons:
    """L-BFGS on ``L(F) + beta / 2 (||first||^2 + ||output||^2)``, the balanced network."""
    import scipy.optimize

    q, m = neurons.first.shape

    def split(x: Float) -> tuple[Float, Float]:
        return x[: q * m].reshape(q, m), x[q * m :].reshape(m, -1)

    def value(x: Float) -> tuple[float, Float]:
        first, output = split(x)
        response = rows @ first
        hidden = np.maximum(response, 0)
        outputs = hidden @ output
        dual = loss.negative_gradient(outputs)
        back = (dual @ output.T) * (response > 0)
        gradient = np.concatenate([(-rows.T @ back).ravel(), (-hidden.T @ dual).ravel()]) + weight_decay * x
        return loss.value(outputs) + 0.5 * weight_decay * float(x @ x), gradient

    start = np.concatenate([neurons.first.ravel(), neurons.output.ravel()])
    options = {"maxiter": max_iter, "maxcor": 20, "ftol": 1e-13, "gtol": 1e-9}
    answer = scipy.optimize.minimize(value, start, jac=True, method="L-BFGS-B", options=options)
    return Neurons(*split(answer.x))


def merge(neurons: Neurons) -> Neurons:
    """Drop negligible neurons, and join those of nearly equal direction and output into their sum."""
    masses = neurons.masses
    order = np.argsort(-masses)
    order = order[masses[order] > _NEGLIGIBLE * masses.max(initial=0.0)]
    first = neurons.first[:, order] / np.linalg.norm(neurons.first[:, order], axis=0)
    output = neurons.output[order] / np.linalg.norm(neurons.output[order], axis=1)[:, None]
    alike = (first.T @ first > _SAME) & (output @ output.T > _SAME)
    leader = alike.argmax(axis=1)  # the heaviest that is alike
    kept = np.flatnonzero(leader == np.arange(len(order)))
    total = np.zeros(len(order))
    np.add.at(total, leader, masses[order])
    root = np.sqrt(total[kept])
    return Neurons(first[:, kept] * root, output[kept] * root[:, None])


def polish(rows: Float, loss: Loss, weight_decay: float, neurons: Neurons) -> Neurons:
    """Optimum of the restricted program on the patterns and output directions of the neurons.

    Never worse than any part of the network that is given, since the patterns of that part are among them.
    """
    if not isinstance(loss, SquaredLoss) or neurons.first.shape[1] == 0:
        return neurons
    neurons, opened = _one_a_cone(rows, neurons)
    directions = neurons.output / np.linalg.norm(neurons.output, axis=1)[:, None]
    start = (neurons.first * np.linalg.norm(neurons.output, axis=1)).T
    root = np.sqrt(loss.weights)[:, None]
    w = ConeProgram(root * rows, root * loss.targets, weight_decay, opened, directions).solve(start)
    sizes = np.linalg.norm(w, axis=1)
    live = sizes > 1e-7 * sizes.max(initial=0.0)
    root = np.sqrt(sizes[live])[:, None]
    return Neurons((w[live] / root).T, directions[live] * root)


def _one_a_cone(rows: Float, neurons: Neurons) -> tuple[Neurons, np.ndarray]:
    """The heaviest neuron of every pattern and output direction, and the patterns (m, n)."""
    order = np.argsort(-neurons.masses, kind="stable")
    opened = (rows @ neurons.first[:, order] >= 0).T
    directions = neurons.output[order] / np.linalg.norm(neurons.output[order], axis=1)[:, None]
    keys = np.hstack([opened, np.round(directions, 6) + 0.0])
    first = np.sort(np.unique(keys, axis=0, return_index=True)[1])
    kept = order[first]
    return Neurons(neurons.first[:, kept], neurons.output[kept]), opened[first]


def _newcomers(rows: Float, V: Float, directions: Float, neurons: Neurons) -> Neurons:
    """New neurons of one per cent of the present weight, with their best outputs."""
    image = V.T @ np.maximum(rows @ directions, 0)
    output = (image / np.maximum(np.linalg.norm(image, axis=0), 1e-300)).T
    size = np.sqrt(0.01 * neurons.masses.sum() / max(directions.shape[1], 1))
    return Neurons(size * directions, size * output)


def _random(rows: Float, loss: Loss, width: int, rng: np.random.Generator) -> Neurons:
    """Random directions, balanced at the size of the targets."""
    q, K = rows.shape[1], loss.targets.shape[1]
    dual = loss.negative_gradient(np.zeros_like(loss.targets)) / np.sqrt(loss.weights)[:, None]
    size = np.sqrt(np.linalg.norm(dual) / width)
    first, output = rng.standard_normal((q, width)), rng.standard_normal((width, K))
    output /= np.linalg.norm(output, axis=1)[:, None]
    return Neurons(size * first / np.linalg.norm(first, axis=0), size * output)
