"""A network in mini-batch gradient descent, in float32, and how threads share its work.

Threads meet once a batch. Wide layers on rows in memory are model parallel: every thread has some of the neurons, whose
outputs are added up; with the residual that follows it finishes the previous step, moves its weights, and begins the
next. Small filters on images, each of which has as many rows as patches, are data parallel: every thread has some of
the images, and the gradients are added up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from convexbn._threads import Workers
from convexbn._types import Float, FloatMatrix, Index
from convexbn.data.kernels import positive_part
from convexbn.data.row_matrix import row_matrix
from convexbn.program.kernels import relu_ascent
from convexbn.program.neurons import Neurons
from convexbn.program.relu import ReluProgram

_HIDDEN_ENTRIES = 1 << 19  # hidden units of images that are formed at a time: 2 MB


class Batches:
    """Rows times ``root`` in float32, the loss on their cases, and the weight decay of the mean loss.

    ``biased``: whether the outputs have a bias, at first ``bias`` (K,).
    """

    def __init__(self, program: ReluProgram) -> None:
        self.loss, self.readout = program.loss.without_bias, program.readout
        self.biased, self.root = self.loss is not program.loss, float(np.sqrt(program.row_weights.sum()))
        self.unit = program.loss.output_scale
        self.bias = program.loss.best_bias(np.zeros_like(self.loss.targets)) / self.unit
        self.weight_decay = program.weight_decay * self.root / float(self.loss.weights.sum()) / self.unit
        self._rows = row_matrix(program.rows).in_single_precision(self.root)

    def rows(self, cases: Index) -> FloatMatrix:
        """The rows of some cases: one each, or all patches of each image."""
        return self._rows.of_cases(cases, self.readout.rows_per_case)

    def pieces(self, cases: Index, width: int) -> Iterator[tuple[Index, FloatMatrix]]:
        """Parts of the cases whose hidden units stay in the cache, and their rows."""
        at_once = _HIDDEN_ENTRIES // (self.readout.rows_per_case * width) or 1
        for part in np.array_split(cases, -(-len(cases) // at_once)):
            yield part, self.rows(part)

    def scale(self, batch: Index, rate: float) -> float:
        """Factor of the gradient of a batch: the learning rate over its weight, in units of the outputs."""
        return rate / (self.unit * float(self.loss.weights[batch].sum()))


class Weights:
    """Both layers of some neurons and their last steps: ``first`` (q, m), ``output`` (R m, K), region by region."""

    def __init__(self, start: Neurons, batches: Batches, momentum: float) -> None:
        self._batches, self._momentum, self._rate = batches, momentum, 1.0
        self._share = float(np.sqrt(batches.unit))  # of the unit of outputs, in either layer
        self.first = np.ascontiguousarray(start.first / (self._share * batches.root), dtype=np.float32)
        output = batches.readout.by_region(start.output / self._share)
        self.output = np.ascontiguousarray(output, dtype=np.float32)
        self._steps = np.zeros_like(self.first), np.zeros_like(self.output)

    def move(self, ascents: Sequence[FloatMatrix], rate: float) -> None:
        """Step by ``momentum`` times the last step at the new rate, plus ``rate`` times ascent less weight decay.

        The ascents are multiplied by the rate already.
        """
        kept = np.float32(self._momentum * rate / self._rate)
        decay = np.float32(rate * self._batches.weight_decay)
        for weight, step, ascent in zip((self.first, self.output), self._steps, ascents, strict=True):
            step *= kept
            step += ascent
            step -= np.multiply(weight, decay, out=ascent)
            weight += step
        self._rate = rate

    @property
    def neurons(self) -> Neurons:
        """The layers on unscaled rows, in float64."""
        output = self._batches.readout.by_neuron(self.output).astype(np.float64)
        return Neurons(self._share * self._batches.root * self.first.astype(np.float64), self._share * output)


class OutputBias:
    """Bias of the outputs, without weight decay, in gradient descent with momentum; zero if there is none."""

    def __init__(self, batches: Batches, momentum: float) -> None:
        self._moves, self._momentum, self._rate = batches.biased, momentum, 1.0
        self.value, self._step = batches.bias, np.zeros_like(batches.bias)

    def move(self, ascent: Float, rate: float) -> None:
        """Step by ``momentum`` times the last step at the new rate, plus the ascent, which contains the rate."""
        if self._moves:
            self._step = self._momentum * rate / self._rate * self._step + ascent
            self.value, self._rate = self.value + self._step, rate


class ModelParallel:
    """The network, every thread with some of its neurons."""

    def __init__(self, start: Neurons, threads: Workers, batches: Batches, momentum: float) -> None:
        self._threads, self._batches, self._bias = threads, batches, OutputBias(batches, momentum)
        self._residual: tuple[FloatMatrix, FloatMatrix, float] | None = None
        parts = np.array_split(np.arange(len(start.output)), threads.count)
        self._parts = [_Part(start.select(part), batches, momentum) for part in parts]

    def step(self, batch: Index, rate: float) -> Float:
        """One step of gradient descent with momentum and weight decay; returns the outputs before it.

        Its last part is left to the next step, or to ``settle``.
        """
        batches, rows = self._batches, self._batches.rows(batch)
        outputs = batches.unit * (np.array(self._turn(rows)).sum(axis=0, dtype=np.float64) + self._bias.value)
        dual = batches.loss.of_rows(batch).negative_gradient(outputs)
        dual *= batches.scale(batch, rate)
        self._bias.move(dual.sum(axis=0), rate)
        self._residual = rows, dual.astype(np.float32), rate
        return outputs

    def settle(self) -> None:
        """Finish the last step."""
        self._turn(None)

    @property
    def neurons(self) -> Neurons:
        """The network on unscaled rows, in float64."""
        parts = [part.neurons for part in self._parts]
        return Neurons(np.hstack([part.first for part in parts]), np.vstack([part.output for part in parts]))

    def _turn(self, rows: FloatMatrix | None) -> list[FloatMatrix]:
        residual, self._residual = self._residual, None
        return self._threads.each(lambda part: part.turn(residual, rows), self._parts)


class _Part(Weights):
    """Some of the neurons, with their hidden units of the last turn."""

    _hidden: FloatMatrix

    def turn(self, residual: tuple[FloatMatrix, FloatMatrix, float] | None, rows: FloatMatrix | None) -> FloatMatrix:
        """Take the last step, given its rows, dual times rate, and rate; then return outputs on ``rows``."""
        if residual is not None:
            last, dual, rate = residual
            self.move(relu_ascent(last, self._hidden, self._hidden, dual, self.output, self._batches.readout), rate)
        if rows is None:
            return np.zeros(0)
        self._hidden = positive_part(rows @ self.first)
        return self._hidden @ self.output


class DataParallel(Weights):
    """The network, every thread with some of the images of a batch."""

    def __init__(self, start: Neurons, threads: Workers, batches: Batches, momentum: float) -> None:
        super().__init__(start, batches, momentum)
        self._threads, self._width, self._bias = threads, len(start.output), OutputBias(batches, momentum)

    def step(self, batch: Index, rate: float) -> Float:
        """One step of gradient descent with momentum and weight decay; returns the outputs before it."""
        scale = self._batches.scale(batch, rate)
        shares = np.array_split(batch, min(self._threads.count, len(batch)))
        outputs, *found = zip(*self._threads.each(lambda share: self._ascents(share, scale), shares), strict=True)
        *ascents, shifts = (np.sum(parts, axis=0) for parts in found)
        self.move(ascents, rate)
        self._bias.move(shifts, rate)
        return np.concatenate(outputs)

    def settle(self) -> None:
        """Do nothing: no step is left unfinished."""

    def _ascents(self, share: Index, scale: float) -> tuple[Float, FloatMatrix, FloatMatrix, Float]:
        """Outputs of some images and their gradients in both layers and the bias, a few images at a time."""
        batches, outputs, first, output = self._batches, [], np.zeros_like(self.first), np.zeros_like(self.output)
        shift = np.zeros_like(batches.bias)
        for part, rows in batches.pieces(share, self._width):
            hidden = positive_part(rows @ self.first)
            pooled = batches.readout.pool(hidden)
            outputs.append(batches.unit * ((pooled @ self.output).astype(np.float64) + self._bias.value))
            dual = scale * batches.loss.of_rows(part).negative_gradient(outputs[-1])
            ascents = relu_ascent(rows, hidden, pooled, dual.astype(np.float32), self.output, batches.readout)
            first += ascents[0]
            output += ascents[1]
            shift += dual.sum(axis=0)
        return np.concatenate(outputs), first, output, shift
