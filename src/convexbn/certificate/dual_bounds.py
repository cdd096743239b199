"""Dual points of the ReLU program with valid bounds over all patterns, in order of cost."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from convexbn import bounds
from convexbn._types import Float, is_over
from convexbn.program.gated import GatedProgram
from convexbn.program.losses import SquaredLoss
from convexbn.program.relu import ReluProgram

#: Rows up to which the lifted relaxations are tried: their matrices are of order n + q.
_LIFTED_ROWS = 600

#: Cones of branch and bound, where no deadline is given and at most (a cone takes 8 q^2 bytes).
_CONES, _MOST_CONES = 500_000, 5_000_000

#: Share of the remaining time that branch and bound may take; the relaxations follow.
_BRANCHING_SHARE = 0.6

#: Relative distance of the bounds at which the dual norm of a point counts as known.
_ENCLOSED = 1e-5

#: Entries ``n q`` up to which a local search takes a second.
_QUICK_ENTRIES = 1 << 14

#: Entries of a dual point on the rows, regions and outputs from which on only the orthant bound is taken.
_SPREAD_ENTRIES = 1 << 24

#: Entries from which on it takes few starts and no steps beyond the fixed point, which is still some seconds.
_MANY_ENTRIES = 1 << 20

#: Steps beyond the fixed point, and entries up to which all are taken; on more the search would take minutes.
_ROUNDS, _ROUNDS_ENTRIES = 30, 1 << 18


class DualBound(NamedTuple):
    """A dual point with a valid upper bound of its dual norm, rounding included, and where that comes from."""

    dual: Float
    bound: float
    rounding: float
    name: str


@dataclass(frozen=True)
class GateDualBounds:
    """The exact dual norm of a gated program: one product with the rows."""

    program: GatedProgram

    def bounded(self, dual: Float) -> Iterator[DualBound]:
        """The dual point with the largest of the norms of its correlations."""
        yield DualBound(dual, *self.program.dual_norm_bound(dual), "gates")

    def estimate(self, dual: Float) -> float | None:
        """Nothing is left to be estimated."""
        return None


@dataclass(frozen=True)
class ReluDualBounds:
    """Bounds of ``max over ||u|| <= 1 of ||V'(A u)_+||`` in order of cost, until the caller has enough.

    Parameters
    ----------
    program : ReluProgram
        Rows that are computed on access are too many for any bound but the orthant's.
    directions : ndarray (m, q)
        First layers of the network: where large values are likely.
    tol : float
        Relative gap that counts as optimal: no bound is made sharper than it needs.
    deadline : float or None
        ``time.monotonic()`` after which no bound beyond the orthant is tried; None: each does its stated work.
    """

    program: ReluProgram
    directions: Float
    tol: float = 1e-6
    deadline: float | None = None

    def bounded(self, dual: Float) -> Iterator[DualBound]:
        """The dual point with each bound in turn, and dual points chosen for the relaxations."""
        V = dual / self._root
        for bound, name in self._cheap(V, self.program.weight_decay):
            yield DualBound(dual, bound.value, bound.rounding, name)
        dense = self.program.readout.rows_per_case == 1
        if not (dense and V.shape[1] == 1 and isinstance(self.program.loss, SquaredLoss)):
            for bound, name in self._lifted(V, self.program.weight_decay):
                yield DualBound(dual, bound.value, bound.rounding, name)
            return
        targets = self._root * self.program.loss.targets
        for choose, name in ((bounds.dual_point, "chosen dual point"), (bounds.lifted_dual_point, "lifted dual point")):
            if self._late or (choose is bounds.lifted_dual_point and len(V) > _LIFTED_ROWS):
                return
            chosen = choose(targets, V, self._A, self.program.weight_decay, deadline=self.deadline)
            yield DualBound(self._root * chosen.dual, chosen.value, chosen.rounding, name)

    def dual_norm(self, dual: Float, *, proved: bool = True) -> tuple[float, float]:
        """Value of a local search and valid upper bound of ``max over ||u|| <= 1 of ||V'(A u)_+||``.

        Infinity stands for a bound that is not asked for. Of very many patches the search sees some images.
        """
        V = dual / self._root
        if self._too_many:
            return self._of_some_rows(dual), next(self._cheap(V, 0.0))[0].value
        values, found = self._local_maxima(V)
        lower, upper = float(values[0]), np.inf
        if not proved:
            return lower, upper
        enough, prover = lower * (1 + _ENCLOSED), replace(self, directions=found)
        for bound, _ in itertools.chain(prover._cheap(V, enough), prover._lifted(V, enough)):
            upper = min(upper, float(bound.value))
            if upper <= enough:
                break
        return min(lower, upper), upper

    def estimate(self, dual: Float) -> float | None:
        """Largest value that a local search finds, a lower estimate of the dual norm.

        None after the deadline on data of a size where the search takes more than about a second.
        """
        if self._too_many:
            return None
        V = dual / self._root
        if self._cells is not None:
            return float(self._cells.maxima(self._spread(V), self.program.weight_decay).value)
        if self._late and self.program.rows.size > _QUICK_ENTRIES:
            return None
        return float(self._local_maxima(V)[0][0])

    def _local_maxima(self, V: Float) -> tuple[Float, Float]:
        size = self.program.rows.size
        starts, rounds = (30, 0) if size > _MANY_ENTRIES else (300, min(_ROUNDS, _ROUNDS * _ROUNDS_ENTRIES // size))
        rng = np.random.default_rng(0)
        return bounds.local_maxima(self._spread(V), self._A, starts, rng, start=self.directions, rounds=rounds)

    def _of_some_rows(self, dual: Float) -> float:
        """Value of the local search on the first cases, in proportion to their number: of many images an estimate."""
        program, n = self.program, len(dual)
        together = program.readout.rows_per_case
        count = max(1, _MANY_ENTRIES // (together * max(program.n_inputs, program.n_outputs)))
        rows, loss = program.rows[: min(count, n) * together], program.loss.of_rows(slice(0, min(count, n)))
        some = replace(self, program=replace(program, rows=rows, loss=loss))
        largest = float(some._local_maxima(dual[:count] / some._root)[0][0])
        return float(n / min(count, n)) * largest

    @property
    def _too_many(self) -> bool:
        """True if the problem is too large for any bound but the orthant's."""
        rows = self.program.rows
        return not isinstance(rows, np.ndarray) or len(rows) * self.program.n_outputs > _SPREAD_ENTRIES

    @property
    def _root(self) -> Float:
        return np.sqrt(self.program.loss.weights)[:, None]

    @property
    def _A(self) -> Float:
        return self.program.unit_rows

    def _spread(self, V: Float) -> Float:
        return self.program.readout.spread(V)

    @functools.cached_property
    def _cells(self) -> bounds.EveryCell | None:
        """All cells, where they can be enumerated."""
        one_output = self.program.n_outputs == 1 and self._A.ndim == 2
        return bounds.EveryCell(self._A) if one_output and bounds.few_cells(self._A) else None

    @property
    def _late(self) -> bool:
        return is_over(self.deadline)

    def _cheap(self, V: Float, target: float) -> Iterator[tuple[bounds.Bound, str]]:
        """Orthant; every cell where there are few; else branch and bound where the rank allows it, relaxation."""
        value, rounding = bounds.orthant(V)
        largest = self.program.readout.norm
        yield bounds.Bound(largest * value, largest * rounding, 1), "orthant"
        if self._too_many:
            return
        V = self._spread(V)
        if self._cells is not None:
            yield self._cells.maxima(V, target), "every cell"
            return
        if self._late:
            return
        if self.program.n_inputs <= bounds.MAX_RANK:
            now = time.monotonic()
            until = None if self.deadline is None else now + _BRANCHING_SHARE * (self.deadline - now)
            yield bounds.branch_and_bound(
                V, self._A, tol=0.1 * self.tol, target=target, start=self.directions,
                max_nodes=_CONES if until is None else _MOST_CONES, deadline=until,
            ), "branch and bound"  # fmt: skip
        if V.shape[1] == 1 and self._A.ndim == 2 and not self._late:
            yield bounds.relaxation(V, self._A, deadline=self.deadline), "relaxation"

    def _lifted(self, V: Float, target: float) -> Iterator[tuple[bounds.Bound, str]]:
        """The doubly nonnegative relaxation, for a moderate number of rows."""
        if len(self.program.rows) <= _LIFTED_ROWS and self._A.ndim == 2 and not self._late:
            yield (
                bounds.lifted(self._spread(V), self._A, deadline=self.deadline, target=target),
                "lifted relaxation",
            )
