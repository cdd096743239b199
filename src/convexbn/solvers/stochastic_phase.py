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

from convexbn._typing import Float, FloatMatrix
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
    learning_rate : float, default=0.2
        Largest learning rate of the mean loss. Where the loss is nearly quadratic it is lowered to what is stable for
        the hidden layer at the start.
    momentum : float, default=0.9
    """

    epochs: int = 20
    batch_size: int = 250
    learning_rate: float = 0.2
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
        largest = self.learning_rate
        if loss.nearly_quadratic:
            seen = scaled[rng.permutation(n)[:_SAMPLE]] @ (start.first / root / np.sqrt(loss.output_scale))
            largest = min(largest, _STABLE * (1 + self.momentum) / (loss.curvature * _largest_square(seen)))
        clock = _Clock(self.epochs * -(-n // self.batch_size), deadline)
        with workers() as threads:
            layers = _Layers(start, threads, root, loss, decay=weight_decay / root, momentum=self.momentum)
            for _ in range(self.epochs):
                order, total = rng.permutation(n), 0.0
                for first in range(0, n, self.batch_size):
                    part, rate = order[first : first + self.batch_size], largest * shape(clock.tick())
                    total += layers.step(scaled[part], loss.of_rows(part), rate)
                    if clock.done >= 1:
                        break
                yield layers.neurons, total + loss.constant
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


def _largest_square(response: Float) -> float:
    """Largest eigenvalue of the mean of ``h h'`` over the rows ``h`` of a hidden layer."""
    hidden = np.maximum(response, 0)
    return float(np.linalg.eigvalsh(hidden @ hidden.T)[-1]) / len(hidden)


class _Layers:
    """The network, its neurons dealt out to threads, for rows scaled by ``root`` and outputs in units of the loss."""

    def __init__(
        self, start: Neurons, threads: Workers, root: float, loss: Loss, *, decay: float, momentum: float
    ) -> None:
        self.root, self.unit, self.threads = root, loss.output_scale, threads
        share = np.sqrt(self.unit)  # of the unit, in either layer
        self.parts = [
            _Part(start.first[:, part] / (share * root), start.output[part] / share, decay / self.unit, momentum)
            for part in np.array_split(np.arange(len(start.output)), threads.count)
        ]

    def step(self, rows: FloatMatrix, batch: Loss, rate: float) -> float:
        """One step of gradient descent with momentum and weight decay; returns the loss before it."""
        shares = np.array(self.threads.each(lambda part: part.forward(rows), self.parts))
        outputs: Float = self.unit * shares.sum(axis=0, dtype=np.float64)
        dual = (batch.negative_gradient(outputs) / (self.unit * batch.weights.sum())).astype(np.float32)
        self.threads.each(lambda part: part.backward(rows, dual, np.float32(rate)), self.parts)
        return batch.value(outputs)

    @property
    def neurons(self) -> Neurons:
        """The network on unscaled rows, in float64."""
        first = np.hstack([part.first for part in self.parts]).astype(np.float64)
        output = np.vstack([part.output for part in self.parts]).astype(np.float64)
        return Neurons(np.sqrt(self.unit) * self.root * first, np.sqrt(self.unit) * output)


class _Part:
    """Some of the neurons, both layers and their velocities, in float32; what a step needs is kept between calls."""

    def __init__(self, first: Float, output: Float, decay: float, momentum: float) -> None:
        self.first, self.output = (np.ascontiguousarray(weight, dtype=np.float32) for weight in (first, output))
        self.velocities = np.zeros_like(self.first), np.zeros_like(self.output)
        self.decay, self.momentum = np.float32(decay), np.float32(momentum)

    def forward(self, rows: FloatMatrix) -> FloatMatrix:
        """Outputs of these neurons."""
        self.hidden = rows @ self.first
        np.maximum(self.hidden, 0, out=self.hidden)
        outputs: FloatMatrix = self.hidden @ self.output
        return outputs

    def backward(self, rows: FloatMatrix, dual: FloatMatrix, rate: np.float32) -> None:
        """Move both layers, for the negative gradient in the outputs of the last call of ``forward``."""
        back = dual @ self.output.T
        back *= self.hidden > 0
        ascents = rows.T @ back, self.hidden.T @ dual
        for weight, velocity, ascent in zip((self.first, self.output), self.velocities, ascents, strict=True):
            velocity *= self.momentum
            velocity += ascent
            velocity -= np.multiply(weight, self.decay, out=ascent)
            weight += np.multiply(velocity, rate, out=ascent)
