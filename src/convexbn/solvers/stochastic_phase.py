"""The local phase on many rows: mini-batch gradient descent with momentum on the whitened data, in float32.

On whitened rows batch normalisation has become plain weight decay (mathematics, section 0), so that no statistics
are needed and a batch is two layers,

    min  1/W sum_i w_i l((a_i'first)_+ output, y_i) + lam / 2 (||first||^2 + ||output||^2),

with rows scaled by ``sqrt(W)``, ``W`` the total weight, and ``lam = beta / sqrt(W)``: what a trainer calls the weight
decay of the mean loss. A step takes four matrix products, ``4 b (q + K) m + 2 b K m`` flops. It is the network whose
statistics are those of all rows; one that is trained with the statistics of each batch has their noise besides.

Images of a convolutional network are batches of whitened patches, ``4 b Kp q m`` flops; some images at a time, so that
their hidden units, which are written and read five times, stay in the cache.
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
from convexbn.whitening import MappedRows

#: Share of the training in which the learning rate rises, and where it begins relative to the largest.
_WARM_UP, _FIRST = 0.25, 0.04

#: Hidden units of images that are formed at a time: 2 MB.
_HIDDEN_ENTRIES = 1 << 19


@dataclass(frozen=True)
class StochasticPhase:
    """Settings of the descent; the learning rate rises linearly and falls as a cosine (Smith and Topin 2019).

    Parameters
    ----------
    epochs : int, default=20
        Passes over the rows.
    batch_size : int, default=250
    learning_rate : float, default=0.1
        Largest learning rate of the mean loss.
    momentum : float, default=0.9
    """

    epochs: int = 20
    batch_size: int = 250
    learning_rate: float = 0.1
    momentum: float = 0.9

    def run(
        self,
        rows: Float | MappedRows,
        loss: Loss,
        weight_decay: float,
        start: Neurons,
        rng: np.random.Generator,
        deadline: float | None = None,
    ) -> Iterator[tuple[Neurons, float]]:
        """Train given neurons; yields the network after each epoch and the loss on its way.

        With a ``deadline``, a ``time.monotonic()``, the learning rate falls as fast as it needs to be there in time.
        """
        n, root = len(loss.of_cases.targets), float(np.sqrt(loss.weights.sum()))
        scaled = _Scaled(rows, root, loss.rows_together)
        decay = weight_decay * root / float(loss.of_cases.weights.sum())
        layers = _Layers(start, root, decay=decay, momentum=self.momentum)
        clock = _Clock(self.epochs * -(-n // self.batch_size), deadline)
        with workers() as threads:
            for _ in range(self.epochs):
                order, seen = rng.permutation(n), 0.0
                for first in range(0, n, self.batch_size):
                    part, rate = order[first : first + self.batch_size], self.learning_rate * shape(clock.tick())
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


def random_start(q: int, width: int, n_outputs: int, total_weight: float, rng: np.random.Generator) -> Neurons:
    """Neurons of hidden units of order one and outputs of order one, for weighted rows."""
    first = rng.standard_normal((q, width)) * np.sqrt(2 * total_weight / q)
    return Neurons(first, rng.standard_normal((width, n_outputs)) / np.sqrt(width))


class _Scaled:
    """Rows of cases times a factor, in float32."""

    def __init__(self, rows: Float | MappedRows, factor: float, together: int) -> None:
        self.together, self.width = together, rows.shape[1]
        self._mapped = rows.in_single_precision(factor) if isinstance(rows, MappedRows) else None
        self._rows = None if isinstance(rows, MappedRows) else (factor * rows).astype(np.float32)

    def __getitem__(self, cases: Index) -> FloatMatrix:
        if self._rows is None:
            assert self._mapped is not None
            return self._mapped.of_images(cases)
        if self.together == 1:
            return self._rows[cases]
        return self._rows.reshape(-1, self.together, self.width)[cases].reshape(-1, self.width)


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
    """Both layers and their velocities, float32, for rows scaled by ``root``."""

    def __init__(self, start: Neurons, root: float, *, decay: float, momentum: float) -> None:
        self.weights = (start.first / root).astype(np.float32), start.output.astype(np.float32)
        self.velocities = tuple(np.zeros_like(weight) for weight in self.weights)
        self.root = root
        self.decay, self.momentum = np.float32(decay), np.float32(momentum)

    def step(self, scaled: _Scaled, loss: Loss, part: Index, rate: float, threads: Workers) -> float:
        """One step of gradient descent with momentum and weight decay; returns the loss before it."""
        total = loss.of_cases.weights[part].sum()
        found = threads.shared(lambda share: self.ascent(scaled, loss, share, total), part)
        for k, (weight, velocity) in enumerate(zip(self.weights, self.velocities, strict=True)):
            velocity *= self.momentum
            velocity -= self.decay * weight
            for _, ascents in found:
                velocity += ascents[k]
            weight += np.float32(rate) * velocity
        return sum(value for value, _ in found)

    def ascent(
        self, scaled: _Scaled, loss: Loss, share: Index, total: float
    ) -> tuple[float, tuple[FloatMatrix, FloatMatrix]]:
        """Loss of some cases, and its negative gradients over the total weight of the batch."""
        width = scaled.together * self.weights[0].shape[1]
        pieces = -(-len(share) * width // _HIDDEN_ENTRIES) if scaled.together > 1 else 1
        first, output = (np.zeros_like(weight) for weight in self.weights)
        value = 0.0
        for part in np.array_split(share, max(min(pieces, len(share)), 1)):
            seen, found = self._ascent(scaled[part], loss, loss.of_cases.of_rows(part), total)
            value += seen
            first += found[0]
            output += found[1]
        return value, (first, output)

    def _ascent(
        self, rows: FloatMatrix, loss: Loss, batch: Loss, total: float
    ) -> tuple[float, tuple[FloatMatrix, FloatMatrix]]:
        first, output = self.weights
        hidden = rows @ first
        np.maximum(hidden, 0, out=hidden)
        outputs = loss.outputs(hidden, output).astype(np.float64)
        dual = (batch.negative_gradient(outputs) / total).astype(np.float32)
        back, by_output = loss.pull_back(dual, hidden, output)
        back *= hidden > 0
        return batch.value(outputs), (rows.T @ back, by_output)

    @property
    def neurons(self) -> Neurons:
        """The network on unscaled rows, in float64."""
        first, output = (weight.astype(np.float64) for weight in self.weights)
        return Neurons(first * self.root, output)
