"""ReLU networks over all patterns: local phase, restricted convex program, pricing, repeated.

A sampled set of patterns is not the program. The local phase trains the balanced network on the whitened
data, which finds patterns that matter; the restricted program makes it optimal for those patterns;
pricing looks for a neuron ``u`` with ``||V'(A u)_+|| > weight_decay ||u||``, which would lower the objective, and
hands it back to the local phase. What pricing does not find is bounded by ``bounds``, not by pricing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

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
    estimated_gap: float
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
        self,
        rows: Float,
        loss: Loss,
        weight_decay: float,
        random_state: np.random.RandomState,
        budget: Budget | None = None,
    ) -> ReluSolution:
        """Train on orthonormal rows; the estimated gap rests on a local search and is not a certificate."""
        budget = budget or Budget()
        neurons = local_phase(rows, loss, weight_decay, _random(rows, loss, self.width, random_state))
        history: list[Progress] = []
        while True:
            neurons = polish(rows, loss, weight_decay, neurons)
            outputs = network_outputs(rows, neurons)
            objective = loss.value(outputs) + weight_decay * float(neurons.masses.sum())
            dual = loss.negative_gradient(outputs)
            found, values = price(rows, dual, neurons, self.n_starts, random_state)
            largest = max(float(values.max(initial=0.0)), weight_decay)
            estimate = loss.dual_value(weight_decay / largest * dual)
            history.append(Progress(len(history) + 1, objective, estimate, neurons.first.shape[1]))
            reason = budget.stop_reason(history[-1], tol=self.tol, max_iter=self.max_iter)
            if reason is not None:
                return ReluSolution(neurons, reason, history[-1].relative_gap, history)
            better = values > weight_decay * (1 + 0.1 * self.tol)
            new = _newcomers(rows, dual, found[:, better], neurons)
            neurons = local_phase(rows, loss, weight_decay, neurons.joined(new))


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
    """Optimum of the restricted program on the patterns and output directions of the neurons."""
    neurons = merge(neurons)
    if not isinstance(loss, SquaredLoss) or neurons.first.shape[1] == 0:
        return neurons
    directions = neurons.output / np.linalg.norm(neurons.output, axis=1)[:, None]
    opened = (rows @ neurons.first >= 0).T
    start = (neurons.first * np.linalg.norm(neurons.output, axis=1)).T
    w = ConeProgram(rows, loss.targets, weight_decay, opened, directions).solve(start)
    sizes = np.linalg.norm(w, axis=1)
    live = sizes > 1e-7 * sizes.max(initial=0.0)
    root = np.sqrt(sizes[live])[:, None]
    return Neurons((w[live] / root).T, directions[live] * root)


def price(
    rows: Float, dual: Float, neurons: Neurons, n_starts: int, random_state: np.random.RandomState
) -> tuple[Float, Float]:
    """Unit directions (q, s) of large ``||V'(A u)_+||`` and their values, best first, no two alike."""
    q, K = rows.shape[1], dual.shape[1]
    random = random_state.standard_normal((q, n_starts))
    starts = np.hstack([neurons.first, random])
    best, values = ascend(rows, dual, starts, 30)
    order = np.argsort(-values)
    best, values = best[:, order], values[order]
    alike = np.triu(best.T @ best > 1 - 1e-6, 1).any(axis=0)
    kept = np.flatnonzero(~alike)[:30]
    return best[:, kept], values[kept]


def ascend(rows: Float, dual: Float, starts: Float, steps: int) -> tuple[Float, Float]:
    """Sign-pattern fixed point ``u <- A'(V c o 1[A u > 0])`` from many starts, the best point of each."""
    u = starts / np.linalg.norm(starts, axis=0)
    best, record = u, np.full(u.shape[1], -np.inf)
    for _ in range(steps):
        response = rows @ u
        image = dual.T @ np.maximum(response, 0)  # (K, s)
        value = np.linalg.norm(image, axis=0)
        better = value > record
        best, record = np.where(better, u, best), np.where(better, value, record)
        c = image / np.maximum(value, 1e-300)
        u = rows.T @ ((dual @ c) * (response > 0))
        u = u / np.maximum(np.linalg.norm(u, axis=0), 1e-300)
    return best, record


def _newcomers(rows: Float, dual: Float, directions: Float, neurons: Neurons) -> Neurons:
    """New neurons of one per cent of the present weight, with their best outputs."""
    image = dual.T @ np.maximum(rows @ directions, 0)
    output = (image / np.maximum(np.linalg.norm(image, axis=0), 1e-300)).T
    size = np.sqrt(0.01 * neurons.masses.sum() / max(directions.shape[1], 1))
    return Neurons(size * directions, size * output)


def _random(rows: Float, loss: Loss, width: int, random_state: np.random.RandomState) -> Neurons:
    """Random directions, balanced at the size of the targets."""
    q, K = rows.shape[1], loss.targets.shape[1]
    size = np.sqrt(np.linalg.norm(loss.negative_gradient(np.zeros_like(loss.targets))) / width)
    first, output = random_state.standard_normal((q, width)), random_state.standard_normal((width, K))
    output /= np.linalg.norm(output, axis=1)[:, None]
    return Neurons(size * first / np.linalg.norm(first, axis=0), size * output)
