"""The local phase on many rows: mini-batch gradient descent with momentum on the whitened data, in float32.

On whitened rows batch normalisation has become plain weight decay (mathematics, section 0), so that no statistics
are needed and a batch is two layers,

    min  1/W sum_i w_i l((a_i'first)_+ output, y_i) + lam / 2 (||first||^2 + ||output||^2),

with rows scaled by ``sqrt(W)``, ``W`` the total weight, and ``lam = beta / sqrt(W)``: what a trainer calls the weight
decay of the mean loss. Outputs are in units of ``loss.output_scale``, so that units of the targets do not matter. A
step takes four matrix products, ``4 b (q + K) m + 2 b K m`` flops. It is the network whose statistics are those of all
rows; one that is trained with the statistics of each batch has their noise besides.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from convexbn._typing import Float, FloatMatrix, Index
from convexbn.environment import Workers, workers
from convexbn.losses import Loss
from convexbn.solvers.neurons import Neurons

#: Share of the training in which the learning rate rises, and where it begins relative to the largest.
_WARM_UP, _FIRST = 0.25, 0.04

#: Rows that show how large the hidden layer is, and the share taken of the learning rate that is stable there, which
#: is ``2 (1 + momentum)`` over the largest eigenvalue of the Hessian of the output layer.
_SAMPLE, _STABLE = 1000, 1.0


@dataclass(frozen=True)
class StochasticPhase:
    """Settings of the descent; the learning rate rises linearly and falls as a cosine (Smith and Topin 2019).

    Parameters
    ----------
    epochs : int, default=20
        Passes over the rows.
    batch_size : int, default=250
    learning_rate : float, default=0.1
        Largest learning rate of the mean loss. Where the gradient of the loss is not bounded it is lowered to what is
        stable for the hidden layer at the start.
    momentum : float, default=0.9
    """

    epochs: int = 20
    batch_size: int = 250
    learning_rate: float = 0.1
    momentum: float = 0.9

    def run(
        self,
        rows: Float,
        loss: Loss,
        weight_decay: float,
        start: Neurons,
        rng: np.random.Generator,
        deadline: float | None = None,
    ) -> Iterator[tuple[Neurons, float]]:
        """Train given neurons; yields the network after each epoch and the loss on its way.

        With a ``deadline``, a ``time.monotonic()``, the learning rate falls as fast as it needs to be there in time.
        """
        n, root = len(rows), float(np.sqrt(loss.weights.sum()))
        scaled = (root * rows).astype(np.float32)
        layers = _Layers(start, root, loss.output_scale, decay=weight_decay / root, momentum=self.momentum)
        largest = self.learning_rate
        if not loss.bounded_gradient:
            sharpness = loss.curvature * layers.largest_square(scaled[rng.permutation(n)[:_SAMPLE]])
            largest = min(largest, _STABLE * (1 + self.momentum) / sharpness)
        clock = _Clock(self.epochs * -(-n // self.batch_size), deadline)
        with workers() as threads:
            for _ in range(self.epochs):
                order, seen = rng.permutation(n), 0.0
                for first in range(0, n, self.batch_size):
                    part, rate = order[first : first + self.batch_size], largest * shape(clock.tick())
                    seen += layers.step(scaled, loss, part, rate, threads)
                    if clock.done >= 1:
                        break
                yield layers.neurons, seen + loss.constant
                if clock.done >= 1:
                    return


def shape(done: float) -> float:
    """Learning rate relative to the largest after a share of the training."""
    if done < _WARM_UP:
        return _FIRST + (1 - _FIRST) * done / _WARM_UP
    return 0.5 * (1 + float(np.cos(np.pi * min((done - _WARM_UP) / (1 - _WARM_UP), 1.0))))


def random_start(directions: Float, loss: Loss, rng: np.random.Generator) -> Neurons:
    """Neurons along normal directions (q, m): hidden units of order one, outputs of the size that the loss asks for."""
    q, m = directions.shape
    first = directions * np.sqrt(2 * loss.weights.sum() / q * loss.output_scale)
    return Neurons(first, rng.standard_normal((m, loss.targets.shape[1])) * np.sqrt(loss.output_scale / m))


class _Clock:
    """Share of the training that is over, by steps or by time, whichever ends first."""

    def __init__(self, steps: int, deadline: float | None) -> None:
        self.steps, self.deadline, self.started = steps, deadline, time.monotonic()
        self.done, self._ticks = 0.0, 0

    def tick(self) -> float:
        """Share at the beginning of a step."""
        self.done = self._ticks / self.steps
        if self.deadline is not None:
            spent = (time.monotonic() - self.started) / max(self.deadline - self.started, 1e-9)
            self.done = max(self.done, min(spent, 1.0))
        self._ticks += 1
        return self.done


class _Layers:
    """Both layers and their velocities, float32, for rows scaled by ``root`` and outputs in units of ``unit``."""

    def __init__(self, start: Neurons, root: float, unit: float, *, decay: float, momentum: float) -> None:
        share = np.sqrt(unit)  # of the unit, in either layer
        self.weights = (start.first / (share * root)).astype(np.float32), (start.output / share).astype(np.float32)
        self.velocities = tuple(np.zeros_like(weight) for weight in self.weights)
        self.root, self.unit = root, unit
        self.decay, self.momentum = np.float32(decay / unit), np.float32(momentum)

    def largest_square(self, rows: FloatMatrix) -> float:
        """Largest eigenvalue of the mean of ``h h'`` over the hidden layers ``h`` of some rows."""
        hidden = np.maximum(rows @ self.weights[0], 0).astype(np.float64)
        return float(np.linalg.eigvalsh(hidden @ hidden.T)[-1]) / len(rows)

    def step(self, scaled: FloatMatrix, loss: Loss, part: Index, rate: float, threads: Workers) -> float:
        """One step of gradient descent with momentum and weight decay; returns the loss before it."""
        total = loss.weights[part].sum()
        found = threads.shared(lambda share: self.ascent(scaled[share], loss.of_rows(share), total), part)
        for k, (weight, velocity) in enumerate(zip(self.weights, self.velocities, strict=True)):
            velocity *= self.momentum
            velocity -= self.decay * weight
            for _, ascents in found:
                velocity += ascents[k]
            weight += np.float32(rate) * velocity
        return sum(value for value, _ in found)

    def ascent(self, rows: FloatMatrix, batch: Loss, total: float) -> tuple[float, tuple[FloatMatrix, FloatMatrix]]:
        """Loss of some rows, and its negative gradients over the total weight of the batch."""
        first, output = self.weights
        hidden = rows @ first
        np.maximum(hidden, 0, out=hidden)
        outputs = self.unit * (hidden @ output).astype(np.float64)
        dual = (batch.negative_gradient(outputs) / (self.unit * total)).astype(np.float32)
        back = dual @ output.T
        back *= hidden > 0
        return batch.value(outputs), (rows.T @ back, hidden.T @ dual)

    @property
    def neurons(self) -> Neurons:
        """The network on unscaled rows, in float64."""
        first, output = (np.sqrt(self.unit) * weight.astype(np.float64) for weight in self.weights)
        return Neurons(first * self.root, output)
