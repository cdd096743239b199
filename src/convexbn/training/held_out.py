"""Weight decay of a gated program, chosen on held-out rows along warm-started paths.

The whitened rows have orthonormal columns, so noise in the targets correlates with them by an amount that does not
depend on the number of rows, while the largest useful weight decay grows with it: no fixed share of the largest suits
two sizes of data (mathematics, section 5). Held-out rows know. Few rows are cut into folds that are held out in turn;
of many, a fold or less. Folds keep the whitening of all rows and their gates, of which trained ones have seen the
held-out targets too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import scipy.optimize

from convexbn._types import Float, Index, is_over
from convexbn.data.blocks import BlockSize
from convexbn.data.kernels import squared_norms
from convexbn.data.row_matrix import Rows, row_matrix
from convexbn.program.gated import GateBlocks, GatedProgram
from convexbn.program.losses import CrossEntropyLoss, LogisticLoss, Loss
from convexbn.program.output_bias import WithOutputBias
from convexbn.solvers.base import Budget, Solver

#: Folds, and rows of all paths together: as many folds are held out in turn as they allow, at least one.
_FOLDS, _ROWS = 5, 2500
#: Most rows that a path is fitted on, and held out.
_MOST_TRAINED, _MOST_HELD_OUT = 1500, 1000
#: Factor between weight decays of a path, the smallest one relative to the largest, and rising losses that end it.
_STEP, _SMALLEST, _PATIENCE = 0.5, 2.0**-10, 2
#: Share of the largest weight decay where no rows can be held out: of a single row, of max pooling, for training gates.
AUTO_FRACTION = 0.02
#: Entries of the rows whose norms are computed at a time.
_BLOCK_ENTRIES = 1 << 19
#: Logarithms of the smallest and the largest temperature.
_COLDEST, _HOTTEST = -5.0, 5.0


class Choice(NamedTuple):
    """Weight decay, and outputs (m, K) of the networks of the folds at it on the rows ``held_out`` (m,)."""

    weight_decay: float
    outputs: Float
    held_out: Index

    def temperature(self, loss: Loss, offset: Float) -> float | None:
        """Divisor of the outputs whose softmax (sigmoid) has the least cross-entropy on the rows; None without rows.

        Parameters
        ----------
        loss, offset : Loss, ndarray (K,)
            Of all rows, with classes as targets, from which the offset was subtracted.
        """
        if not len(self.held_out):
            return None
        targets, weights = loss.targets[self.held_out] + offset, loss.weights[self.held_out]
        outputs = self.outputs + offset
        of_probabilities: Loss = LogisticLoss(np.clip(targets, -1, 1), weights)
        if targets.shape[1] > 1:
            of_probabilities = CrossEntropyLoss((targets == targets.max(axis=1, keepdims=True)).astype(float), weights)
        sizes = _COLDEST, _HOTTEST
        found = scipy.optimize.minimize_scalar(
            lambda size: of_probabilities.value(np.exp(-size) * outputs), bounds=sizes, method="bounded"
        )
        return float(np.exp(found.x))


@dataclass(frozen=True)
class HoldOut:
    """Rows to train on and rows held out."""

    train: Index
    held_out: Index


def balanced_order(rows: Rows, loss: Loss) -> Index:
    """Order of the cases by their targets, then by the norms of their whitened rows.

    Neither units of columns nor shifts of the targets change it. Cases of several rows go by their targets alone.

    Parameters
    ----------
    rows, loss : ndarray (N, q) or RowMatrix, Loss
    """
    keys = list(loss.targets.T)
    if len(rows) == len(loss.weights):
        norms = row_matrix(rows).map(squared_norms, BlockSize(rows.shape[1], _BLOCK_ENTRIES))
        keys.insert(0, np.round(norms / norms.max(), 9))
    return np.lexsort(keys)


def folds_of(program: GatedProgram) -> list[HoldOut]:
    """Folds of the cases of a program, among which targets are spread evenly."""
    n = len(program.loss.weights)
    place = np.empty(n, dtype=np.intp)
    place[balanced_order(program.operator.rows, program.loss)] = np.arange(n)
    if n <= _MOST_TRAINED:
        turns = [place % _FOLDS == k for k in range(min(_FOLDS, n, max(_ROWS // n, 1)))]
        return [HoldOut(np.flatnonzero(~turn), np.flatnonzero(turn)) for turn in turns]
    trained = min(n - n // _FOLDS, _MOST_TRAINED)
    held_out = min(n - trained, _MOST_HELD_OUT)
    chosen = place * (trained + held_out) // n  # equally spaced among rows in order
    first = np.unique(chosen, return_index=True)[1]
    turn = np.arange(len(first)) * held_out % (trained + held_out) < held_out
    return [HoldOut(np.sort(first[~turn]), np.sort(first[turn]))]


def held_out_choice(program: GatedProgram, solver: Solver[GatedProgram, GateBlocks], budget: Budget) -> Choice:
    """Weight decay of least loss on held-out rows, among geometric shares of the largest useful one.

    Parameters
    ----------
    program : GatedProgram
        On all rows; its own weight decay is not used.
    solver : Solver
        Solves the program on the rows of a fold; a crude tolerance is enough.
    budget : Budget
        No point is begun after half of its time; its callback is not called.
    """
    largest, folds = program.max_weight_decay(), folds_of(program)
    held_out, none = np.concatenate([fold.held_out for fold in folds]), np.zeros((0, program.loss.targets.shape[1]))
    if largest == 0 or len(folds[0].train) == 0:
        return Choice(AUTO_FRACTION * largest or 1.0, none, held_out[:0])
    losses: list[float] = []
    best, outputs = 0, none
    for points in zip(*(_path(program, fold, solver, largest) for fold in folds), strict=True):
        losses.append(float(np.nan_to_num(sum(point.loss for point in points), nan=np.inf)))
        if losses[-1] <= losses[best] and np.isfinite(losses[-1]):
            best, outputs = len(losses) - 1, np.concatenate([point.outputs for point in points])
        if len(losses) > best + _PATIENCE or is_over(budget.until(0.5)):
            break
    # noise in the targets correlates with rows by the root of their number
    share = len(folds[0].train) / len(program.loss.weights)
    return Choice(largest * _STEP ** (1 + best) * float(np.sqrt(share)), outputs, held_out[: len(outputs)])


class HeldOutPoint(NamedTuple):
    """Loss and outputs on held-out rows."""

    loss: float
    outputs: Float


def _path(
    program: GatedProgram, fold: HoldOut, solver: Solver[GatedProgram, GateBlocks], largest: float
) -> Iterator[HeldOutPoint]:
    """What the rows of a fold say of the held-out ones at falling weight decays."""
    trained, held_out = _of_cases(program, fold.train, scaled=True), _of_cases(program, fold.held_out)
    weight_decay, start = largest, None
    while weight_decay > _SMALLEST * largest:
        weight_decay *= _STEP
        start = solver.solve(trained.with_weight_decay(weight_decay), start).weights
        outputs = held_out.outputs(*start) + trained.loss.best_bias(trained.outputs(*start))
        yield HeldOutPoint(held_out.loss.value(outputs), outputs)


def _of_cases(program: GatedProgram, index: Index, *, scaled: bool = False) -> GatedProgram:
    """Program on some of the cases, optionally weighted up to all of them."""
    loss = program.loss.without_bias
    weights = loss.weights[index]
    if scaled:
        weights = weights * (loss.weights.sum() / weights.sum())
    part = loss.reweighted(index, weights)
    if scaled and program.loss is not loss:
        part = WithOutputBias.with_decay(part, program.loss.bias_decay)
    return replace(program, operator=program.operator.of_cases(index), loss=part)
