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

#: Most cones of branch and bound, without and with a deadline (a cone takes 8 q^2 bytes).
_CONES, _MOST_CONES = 500_000, 5_000_000

#: Share of the remaining time that branch and bound may take; the relaxations follow.
_BRANCHING_SHARE = 0.6

#: Relative distance of the bounds at which the dual norm of a point counts as known.
_ENCLOSED = 1e-5

#: Entries ``n q`` up to which a local search takes at most a second.
_QUICK_ENTRIES = 1 << 14

#: Entries of a dual point on rows, regions and outputs above which only the orthant bound is computed.
_SPREAD_ENTRIES = 1 << 24

#: Entries ``n q`` above which the local search takes few starts and stops at the fixed point, still some seconds.
_MANY_ENTRIES = 1 << 20

#: Steps beyond the fixed point, and entries up to which all are taken; on more the search would take minutes.
_ROUNDS, _ROUNDS_ENTRIES = 30, 1 << 18


class DualBound(NamedTuple):
    """Dual point with a valid upper bound of its dual norm, rounding included, and the name of the bound."""

    dual: Float
    bound: float
    rounding: float
    name: str


@dataclass(frozen=True)
class GateDualBounds:
    """The exact dual norm of a gated program: one product with the rows."""

    program: GatedProgram

    def bounded(self, dual: Float) -> Iterator[DualBound]:
        """Yield the dual point itself with its dual norm."""
        yield DualBound(dual, *self.program.dual_norm_bound(dual), "gates")

    def estimate(self, dual: Float) -> float | None:
        """None: the bound is exact."""
        return None


@dataclass(frozen=True)
class ReluDualBounds:
    """Bounds of ``max over ||u|| <= 1 of ||V'(A u)_+||``, lazily and in order of cost.

    Parameters
    ----------
    program : ReluProgram
        With rows that are computed on access, only the orthant bound is tried.
    directions : ndarray (m, q)
        First layers of the network, starts of the searches.
    tol : float
        Relative gap that counts as optimal; bounds are no sharper than it needs.
    deadline : float or None
        ``time.monotonic()`` after which no bound beyond the orthant is tried; None: each does its stated work.
    """

    program: ReluProgram
    directions: Float
    tol: float = 1e-6
    deadline: float | None = None

    def bounded(self, dual: Float) -> Iterator[DualBound]:
        """Yield the dual point with each bound in turn; for a squared loss of one output also chosen dual points."""
        program, V = self.program, dual / self._root
        chooses = program.readout.rows_per_case == V.shape[1] == 1 and isinstance(program.loss, SquaredLoss)
        lifted = () if chooses else self._lifted(V, program.weight_decay)
        for bound, name in itertools.chain(self._cheap(V, program.weight_decay), lifted):
            yield DualBound(dual, bound.value, bound.rounding, name)
        for choose, name in ((bounds.dual_point, "chosen dual point"), (bounds.lifted_dual_point, "lifted dual point")):
            if not chooses or is_over(self.deadline) or (choose is bounds.lifted_dual_point and len(V) > _LIFTED_ROWS):
                return
            targets = self._root * program.loss.targets
            chosen = choose(targets, V, program.unit_rows, program.weight_decay, deadline=self.deadline)
            yield DualBound(self._root * chosen.dual, chosen.value, chosen.rounding, name)

    def dual_norm(self, dual: Float, *, proved: bool = True) -> tuple[float, float]:
        """Value of a local search and valid upper bound of the dual norm; it may be infinite unless ``proved``.

        For very many patches the search uses a part of the images.
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
        """Largest value that a local search finds; None if there are too many rows, or no time to search them."""
        if self._too_many:
            return None
        V = dual / self._root
        if self._cells is not None:
            return float(self._cells.maxima(self.program.readout.spread(V), self.program.weight_decay).value)
        if is_over(self.deadline) and self.program.rows.size > _QUICK_ENTRIES:
            return None
        return float(self._local_maxima(V)[0][0])

    def _local_maxima(self, V: Float) -> tuple[Float, Float]:
        spread, A, size = self.program.readout.spread(V), self.program.unit_rows, self.program.rows.size
        starts, rounds = (30, 0) if size > _MANY_ENTRIES else (300, min(_ROUNDS, _ROUNDS * _ROUNDS_ENTRIES // size))
        rng = np.random.default_rng(0)
        return bounds.local_maxima(spread, A, starts, rng, start=self.directions, rounds=rounds)

    def _of_some_rows(self, dual: Float) -> float:
        """Estimate of the dual norm: the local search on the first cases, extrapolated to all in proportion."""
        program, n = self.program, len(dual)
        together = program.readout.rows_per_case
        count = min(n, max(1, _MANY_ENTRIES // (together * max(program.n_inputs, program.n_outputs))))
        rows, loss = program.rows[: count * together], program.loss.of_rows(slice(0, count))
        some = replace(self, program=replace(program, rows=rows, loss=loss))
        return n / count * float(some._local_maxima(dual[:count] / some._root)[0][0])

    @property
    def _too_many(self) -> bool:
        """True if the problem is too large for any bound but the orthant's."""
        rows = self.program.rows
        return not isinstance(rows, np.ndarray) or len(rows) * self.program.n_outputs > _SPREAD_ENTRIES

    @property
    def _root(self) -> Float:
        return np.sqrt(self.program.loss.weights)[:, None]

    @functools.cached_property
    def _cells(self) -> bounds.EveryCell | None:
        """All cells, if they can be enumerated."""
        program = self.program
        few = program.n_outputs == 1 and program.unit_rows.ndim == 2 and bounds.few_cells(program.unit_rows)
        return bounds.EveryCell(program.unit_rows) if few else None

    def _cheap(self, V: Float, target: float) -> Iterator[tuple[bounds.Bound, str]]:
        """Orthant, then every cell if there are few; else branch and bound at low rank, then the relaxation."""
        value, rounding = bounds.orthant(V)
        largest = self.program.readout.norm
        yield bounds.Bound(largest * value, largest * rounding, 1), "orthant"
        if self._too_many:
            return
        V = self.program.readout.spread(V)
        if self._cells is not None:
            yield self._cells.maxima(V, target), "every cell"
            return
        if is_over(self.deadline):
            return
        A = self.program.unit_rows
        if self.program.n_inputs <= bounds.MAX_RANK:
            now = time.monotonic()
            until = None if self.deadline is None else now + _BRANCHING_SHARE * (self.deadline - now)
            yield bounds.branch_and_bound(
                V, A, tol=0.1 * self.tol, target=target, start=self.directions,
                max_nodes=_CONES if until is None else _MOST_CONES, deadline=until,
            ), "branch and bound"  # fmt: skip
        if V.shape[1] == 1 and A.ndim == 2 and not is_over(self.deadline):
            yield bounds.relaxation(V, A, deadline=self.deadline), "relaxation"

    def _lifted(self, V: Float, target: float) -> Iterator[tuple[bounds.Bound, str]]:
        """Doubly nonnegative relaxation, for a moderate number of rows."""
        rows, spread = self.program.rows, self.program.readout.spread
        if len(rows) <= _LIFTED_ROWS and (A := self.program.unit_rows).ndim == 2 and not is_over(self.deadline):
            yield bounds.lifted(spread(V), A, deadline=self.deadline, target=target), "lifted relaxation"
