"""Mini-batch gradient descent on many rows, with momentum on the whitened data, in float32.

On whitened rows batch normalisation has become plain weight decay (mathematics, section 0). So no statistics are needed
and a batch is two layers,

    min  1/W sum_i w_i l((a_i'first)_+ output, y_i) + lam / 2 (||first||^2 + ||output||^2),

with rows scaled by ``sqrt(W)``, ``W`` the total weight, and the weight decay ``lam = beta / sqrt(W)`` of the mean loss.
Outputs are in units of ``loss.output_scale``, so that units of the targets do not matter. A step takes four matrix
products, ``4 b (q + K) m + 2 b K m`` flops. The network has the statistics of all rows; training with the statistics of
each batch adds their noise.

Images of a convolutional network are batches of whitened patches, ``4 b Kp q m`` flops; some images at a time, so that
their hidden units, which are written and read five times, stay in the cache. See ``sgd_workers`` for the threads.

On two cores with 158 GFLOP/s in float32 a step of 250 rows in 201 directions runs at 74 (1000 neurons) to 91 GFLOP/s
(2000). On one core with 93, images of 196 patches run at 47 (109 directions, 300 filters, 3 x 3 regions; their two
products alone at 70); beside another job, with 73, at 37 (70), and images of 784 patches at 26 (50, 200, 7 x 7; 41):
patches, rectifiers and pooling take the rest (``benchmarks/convolution.py kernel``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from convexbn._threads import workers
from convexbn._types import Float, is_over, now
from convexbn.program.losses import Loss
from convexbn.program.neurons import Neurons
from convexbn.program.relu import ReluProgram
from convexbn.solvers.relu.sgd_workers import Batches, DataParallel, ModelParallel

_WARM_UP, _FIRST = 0.25, 0.04  # share of the training in which the learning rate rises, and its relative start
_OF_ZERO, _OF_START = 10.0, 2.0  # a descent diverges above so many times both the loss of zero and that of its start
_SLOWER = 4.0  # divisor of the learning rate after a divergence
_SAMPLE, _FEWEST = 1000, 50  # rows, and fewest images, that estimate the size of the hidden layer
_STABLE = 1.0  # share of the stable learning rate, 2 (1 + momentum) over the top eigenvalue of the output Hessian


@dataclass(frozen=True)
class SGD:
    """Settings of the descent; the learning rate rises linearly and falls as a cosine (Smith and Topin 2019).

    Parameters
    ----------
    epochs, batch_size : int
        Passes over the rows, and rows of a batch.
    learning_rate, momentum : float
        The largest learning rate of the mean loss is lowered for a nearly quadratic loss, to what is stable for the
        hidden layer at the start.
    """

    epochs: int = 20
    batch_size: int = 250
    learning_rate: float = 0.2
    momentum: float = 0.9

    def run(
        self, program: ReluProgram, start: Neurons, rng: np.random.Generator, deadline: float | None = None
    ) -> Iterator[tuple[Neurons, float]]:
        """Yield the network after each epoch and the loss on its way; a descent that diverges begins again slower.

        Parameters
        ----------
        program, start, rng : ReluProgram, Neurons, numpy.random.Generator
            The generator orders the batches.
        deadline : float, optional
            ``now()`` by which the learning rate falls to zero.
        """
        with workers() as threads:
            batches, most = Batches(program), _OF_ZERO * program.loss.value(np.zeros_like(program.loss.targets))
            parallel = ModelParallel if batches.readout.rows_per_case == 1 else DataParallel
            largest, late = self._largest_rate(batches, start, rng), False
            while not late:
                clock = _Clock(self.epochs * -(-len(program.loss.targets) // self.batch_size), deadline)
                layers = parallel(start, threads, batches, self.momentum)
                for neurons, value in self._epochs(layers, batches.loss, largest, clock, rng):
                    late = is_over(deadline)
                    if not value <= most:
                        at_start = program.outputs(start) + batches.unit * batches.bias
                        most = max(most, _OF_START * batches.loss.value(at_start))
                    if not (value <= most and np.isfinite(neurons.norms).all()):
                        largest /= _SLOWER
                        break
                    yield neurons, value
                else:
                    return

    def _epochs(
        self, layers: ModelParallel | DataParallel, loss: Loss, largest: float, clock: _Clock, rng: np.random.Generator
    ) -> Iterator[tuple[Neurons, float]]:
        """The network after each epoch and the loss on its way, at a largest learning rate."""
        outputs = np.zeros_like(loss.targets)
        for _ in range(self.epochs):
            order, seen = rng.permutation(len(outputs)), 0
            while seen < len(outputs) and clock.done < 1:
                batch = order[seen : seen + self.batch_size]
                outputs[batch] = layers.step(batch, largest * shape(clock.tick()))
                seen += len(batch)
            layers.settle()
            value = loss.of_rows(order[:seen]).value(outputs[order[:seen]])
            yield layers.neurons, value + loss.constant
            if clock.done >= 1:
                return

    def _largest_rate(self, batches: Batches, start: Neurons, rng: np.random.Generator) -> float:
        """The learning rate; for a nearly quadratic loss at most what is stable for the hidden layer."""
        loss, readout = batches.loss, batches.readout
        if not loss.nearly_quadratic:
            return self.learning_rate
        first = start.first / batches.root / np.sqrt(loss.output_scale)
        sample = rng.permutation(len(loss.targets))[: max(_SAMPLE // readout.rows_per_case, _FEWEST)]
        blocks = (np.maximum(rows @ first, 0) for _, rows in batches.pieces(sample, len(start.output)))
        hidden = np.concatenate([readout.pool(block) for block in blocks])
        hidden = np.hstack([hidden, np.full((len(hidden), 1), float(batches.biased))])
        square = float(np.linalg.eigvalsh(hidden @ hidden.T)[-1]) / len(hidden)  # of the mean of h h' over its rows h
        if square == 0:  # no hidden unit is positive on any row
            return self.learning_rate
        return min(self.learning_rate, _STABLE * (1 + self.momentum) / (loss.curvature * square))


def shape(done: float) -> float:
    """Learning rate relative to the largest after a share of the training."""
    if done < _WARM_UP:
        return _FIRST + (1 - _FIRST) * done / _WARM_UP
    return 0.5 * (1 + float(np.cos(np.pi * min((done - _WARM_UP) / (1 - _WARM_UP), 1.0))))


def random_start(program: ReluProgram, directions: Float, rng: np.random.Generator) -> Neurons:
    """Neurons along normal directions, with hidden units of order one and outputs of the size that the loss asks for.

    Parameters
    ----------
    program, directions, rng : ReluProgram, ndarray (q, m), numpy.random.Generator
        The directions are standard normal; the generator draws the output layer.
    """
    (q, m), scale = directions.shape, program.loss.output_scale
    first = directions * np.sqrt(2 * program.row_weights.sum() / q * scale)
    output = rng.standard_normal((m, program.n_outputs)) * np.sqrt(scale / (m * program.readout.n_regions))
    return Neurons(first, output)


class _Clock:
    """Completed share of the training, by steps or by time, whichever ends first."""

    def __init__(self, steps: int, deadline: float | None) -> None:
        self.steps, self.deadline, self.started = steps, deadline, now()
        self.done, self._ticks = 0.0, 0

    def tick(self) -> float:
        """Share at the beginning of a step."""
        self.done = self._ticks / self.steps
        if self.deadline is not None:
            spent = (now() - self.started) / max(self.deadline - self.started, 1e-9)
            self.done = max(self.done, min(spent, 1.0))
        self._ticks += 1
        return self.done
