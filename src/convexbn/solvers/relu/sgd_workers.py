"""A network in mini-batch gradient descent, in float32, and how threads share its work.

Threads meet once a batch. Wide layers on rows that are kept are model parallel: every thread has some of the neurons,
whose outputs are added up; with the residual that follows it finishes the step before, moves its weights, and begins
the next. Small filters on images, each of which has as many rows as patches, are data parallel: every thread has some
of the images, and what is added up is the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from convexbn._threads import Workers
from convexbn._types import Float, FloatMatrix, Index
from convexbn.data.kernels import positive_part
from convexbn.data.row_matrix import row_matrix
from convexbn.program.kernels import relu_ascent
from convexbn.program.neurons import Neurons
from convexbn.program.relu import ReluProgram

#: Hidden units of images that are formed at a time: 2 MB.
_HIDDEN_ENTRIES = 1 << 19


class Batches:
    """Rows times ``root`` in float32, and the loss on their cases.

    Parameters
    ----------
    program : ReluProgram
    root : float
    """

    def __init__(self, program: ReluProgram, root: float) -> None:
        self.root, self.loss, self.readout = root, program.loss, program.readout
        self._rows = row_matrix(program.rows).in_single_precision(root)

    def rows(self, cases: Index) -> FloatMatrix:
        """The rows of some cases: one each, or all patches of each image."""
        return self._rows.of_cases(cases, self.readout.rows_per_case)

    def pieces(self, cases: Index, width: int) -> Iterator[tuple[Index, FloatMatrix]]:
        """Some of the cases, so many that their hidden units stay in the cache, and their rows."""
        at_once = _HIDDEN_ENTRIES // (self.readout.rows_per_case * width) or 1
        for part in np.array_split(cases, -(-len(cases) // at_once)):
            yield part, self.rows(part)


@dataclass(frozen=True)
class StepSettings:
    """What steps have in common: ``root`` scales the rows, weight decay and momentum are those of the mean loss."""

    root: float
    weight_decay: float
    momentum: float


class Weights:
    """Both layers of some neurons and their last steps: ``first`` (q, m), ``output`` (R m, K), region by region."""

    def __init__(self, start: Neurons, program: ReluProgram, step: StepSettings) -> None:
        share, self._readout, self._step = float(np.sqrt(program.loss.output_scale)), program.readout, step
        self._share = share  # of the unit of outputs, in either layer
        self.first = np.ascontiguousarray(start.first / (share * step.root), dtype=np.float32)
        self.output = np.ascontiguousarray(self._readout.by_region(start.output / share), dtype=np.float32)
        self._steps, self._rate = (np.zeros_like(self.first), np.zeros_like(self.output)), 1.0

    def hidden(self, rows: FloatMatrix) -> FloatMatrix:
        """Hidden units of rows."""
        return positive_part(rows @ self.first)

    def ascent(
        self, rows: FloatMatrix, hidden: FloatMatrix, pooled: FloatMatrix, dual: FloatMatrix
    ) -> tuple[FloatMatrix, FloatMatrix]:
        """``<dual, outputs>`` differentiated by both layers."""
        return relu_ascent(rows, hidden, pooled, dual, self.output, self._readout)

    def move(self, ascents: Sequence[FloatMatrix], rate: float) -> None:
        """A step is ``momentum`` times the last one at the new rate, and ``rate`` times ascent less weight decay.

        The ascents have the rate in them.
        """
        kept = np.float32(self._step.momentum * rate / self._rate)
        decay = np.float32(rate * self._step.weight_decay)
        for weight, step, ascent in zip((self.first, self.output), self._steps, ascents, strict=True):
            step *= kept
            step += ascent
            step -= np.multiply(weight, decay, out=ascent)
            weight += step
        self._rate = rate

    @property
    def neurons(self) -> Neurons:
        """The layers on unscaled rows, in float64."""
        first, output = self.first.astype(np.float64), self._readout.by_neuron(self.output).astype(np.float64)
        return Neurons(self._share * self._step.root * first, self._share * output)


class ModelParallel:
    """The network, every thread with some of its neurons."""

    def __init__(self, start: Neurons, threads: Workers, program: ReluProgram, step: StepSettings) -> None:
        self._threads, self._unit = threads, program.loss.output_scale
        self._residual: _Residual | None = None
        self._parts = [
            _Part(Weights(start.select(part), program, step))
            for part in np.array_split(np.arange(len(start.output)), threads.count)
        ]

    def step(self, batches: Batches, batch: Index, rate: float, outputs: Float) -> None:
        """One step of gradient descent with momentum and weight decay.

        The outputs before it are written to ``outputs``. Its last part is left to the next step, or to ``settle``.
        """
        rows, loss = batches.rows(batch), batches.loss
        outputs[batch] = self._unit * np.array(self._turn(rows)).sum(axis=0, dtype=np.float64)
        dual = loss.of_rows(batch).negative_gradient(outputs[batch])
        dual *= rate / (self._unit * float(loss.weights[batch].sum()))
        self._residual = _Residual(rows, dual.astype(np.float32), rate)

    def settle(self) -> None:
        """Do what is left of the last step."""
        self._turn(None)

    @property
    def neurons(self) -> Neurons:
        """The network on unscaled rows, in float64."""
        parts = [part.weights.neurons for part in self._parts]
        return Neurons(np.hstack([part.first for part in parts]), np.vstack([part.output for part in parts]))

    def _turn(self, rows: FloatMatrix | None) -> list[FloatMatrix]:
        residual, self._residual = self._residual, None
        return self._threads.each(lambda part: part.turn(residual, rows), self._parts)


@dataclass(frozen=True)
class _Residual:
    """What a step is made of: rows, negative gradient in their outputs times the learning rate, and that rate."""

    rows: FloatMatrix
    dual: FloatMatrix
    rate: float


class _Part:
    """Some of the neurons; their hidden units are kept from turn to turn."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self._hidden: FloatMatrix = np.zeros((0, 0), dtype=np.float32)

    def turn(self, residual: _Residual | None, rows: FloatMatrix | None) -> FloatMatrix:
        """Finish the turn before by its residual, then give the outputs of these neurons on new rows."""
        if residual is not None:
            ascents = self.weights.ascent(residual.rows, self._hidden, self._hidden, residual.dual)
            self.weights.move(ascents, residual.rate)
        if rows is None:
            return np.zeros(0)
        self._hidden = self.weights.hidden(rows)
        return self._hidden @ self.weights.output


class DataParallel:
    """The network, every thread with some of the images of a batch."""

    def __init__(self, start: Neurons, threads: Workers, program: ReluProgram, step: StepSettings) -> None:
        self._threads, self._unit, self._width = threads, program.loss.output_scale, len(start.output)
        self._weights = Weights(start, program, step)

    def step(self, batches: Batches, batch: Index, rate: float, outputs: Float) -> None:
        """One step of gradient descent with momentum and weight decay; ``outputs`` receives those before it."""
        scale = rate / (self._unit * float(batches.loss.weights[batch].sum()))
        shares = np.array_split(batch, min(self._threads.count, len(batch)))
        found = self._threads.each(lambda share: self._ascents(batches, share, scale, outputs), shares)
        self._weights.move([np.sum(parts, axis=0) for parts in zip(*found, strict=True)], rate)

    def settle(self) -> None:
        """Nothing is left of a step."""

    @property
    def neurons(self) -> Neurons:
        """The network on unscaled rows, in float64."""
        return self._weights.neurons

    def _ascents(self, batches: Batches, share: Index, scale: float, outputs: Float) -> list[FloatMatrix]:
        """Gradients of some images, a few at a time."""
        loss, weights = batches.loss, self._weights
        ascents: list[FloatMatrix] = [np.zeros_like(weights.first), np.zeros_like(weights.output)]
        for part, rows in batches.pieces(share, self._width):
            hidden = weights.hidden(rows)
            pooled = batches.readout.pool(hidden)
            outputs[part] = self._unit * (pooled @ weights.output).astype(np.float64)
            dual = scale * loss.of_rows(part).negative_gradient(outputs[part])
            for total, ascent in zip(
                ascents, weights.ascent(rows, hidden, pooled, dual.astype(np.float32)), strict=True
            ):
                total += ascent
        return ascents
