"""Dual points of the ReLU program with valid bounds over all patterns, in order of cost."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from convexbn import bounds
from convexbn._types import Float, is_over, share_of
from convexbn.program.gated import GatedProgram
from convexbn.program.losses import SquaredLoss
from convexbn.program.relu import ReluProgram

#: Rows up to which the lifted relaxations are tried: their matrices are of order n + q.
_LIFTED_ROWS = 600

#: Most cones of branch and bound, without and with a deadline (a cone takes 8 q^2 bytes).
_CONES, _MOST_CONES = 500_000, 5_000_000

#: Share of the remaining time that branch and bound may take; the relaxations follow.
_BRANCHING_SHARE = 0.6

#: Shares of what then remains: the relaxation before the chosen dual point, and that before the lifted dual point.
_RELAXATION_SHARE, _CHOSEN_SHARE = 0.25, 0.5

#: Seconds of a step of a lifted relaxation, about, for matrices of order 1: the cube counts.
_LIFTED_STEP = 2e-9

#: Relative distance of the bounds at which the dual norm of a point counts as known.
_ENCLOSED = 1e-5

#: Entries ``n q`` up to which a local search takes at most half a second, and is made even if the time is over.
_QUICK_ENTRIES = 1 << 13

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


class KnownBound(NamedTuple):
    """Lower bound of a program, and the name of the bound that it rests on."""

    lower: float
    name: str


NOTHING_KNOWN = KnownBound(-np.inf, "none")


@dataclass(frozen=True)
class GateDualBounds:
    """The exact dual norm of a gated program: one product with the rows."""

    program: GatedProgram
    known: KnownBound = NOTHING_KNOWN

    def bounded(self, dual: Float) -> Iterator[DualBound]:
        """Yield the dual point itself with its dual norm."""
        yield DualBound(dual, *self.program.dual_norm_bound(dual), "gates")

    def estimate(self, dual: Float) -> float | None:
        """None: the bound is exact."""
        return None

    @property
    def remark(self) -> str:
        """Nothing: more time buys nothing."""
        return ""


@dataclass(eq=False)
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
        ``now()`` after which no bound beyond the orthant is tried; None: each does its stated work.
    known : KnownBound
        Lower bound of the program that was proved before.
    """

    program: ReluProgram
    directions: Float
    tol: float = 1e-6
    deadline: float | None = None
    known: KnownBound = NOTHING_KNOWN

    def __post_init__(self) -> None:
        self._hurried, self._searched = False, list[tuple[Float, float | None]]()

    def bounded(self, dual: Float) -> Iterator[DualBound]:
        """Yield the dual point with each bound in turn; for a squared loss of one output also chosen dual points.

        ``estimate`` is made before the bounds that may take all the time, unless it is quick and made in any case.
        """
        program, V, relaxed = self.program, dual / self._root, None
        chooses = program.readout.rows_per_case == V.shape[1] == 1 and isinstance(
            program.loss.without_bias, SquaredLoss
        )
        lifted = () if chooses and not self._biased else self._lifted(V, program.weight_decay)
        for bound, name in itertools.chain(self._cheap(V, program.weight_decay, followed=chooses), lifted):
            relaxed = bound if isinstance(bound, bounds.Relaxed) else relaxed
            yield DualBound(dual, bound.value, bound.rounding, name)
            if name == "orthant" and not (self._quick or self._over or self._too_many or self._cells):
                self._searched = [(dual, self.estimate(dual))]
        if chooses and not self._over:
            yield from self._chosen(V, relaxed)
        self._hurried = self._over

    def _chosen(self, V: Float, relaxed: bounds.Relaxed | None) -> Iterator[DualBound]:
        """Dual points that are chosen to maximise the bounds, from the scaled residual."""
        program, A = self.program, self.program.unit_rows
        targets, beta = self._root * program.loss.targets, program.weight_decay
        lifts = len(V) <= _LIFTED_ROWS and not self._biased
        constant = self._root[:, 0] / np.linalg.norm(self._root) if self._biased else None
        until = share_of(self.deadline, _CHOSEN_SHARE) if lifts else self.deadline
        found = bounds.dual_point(targets, V, A, beta, deadline=until, first=relaxed, constant=constant)
        yield DualBound(self._root * found.dual, found.value, found.rounding, "chosen dual point")
        if lifts and self._has_time_to_lift:
            found = bounds.lifted_dual_point(targets, V, A, beta, deadline=self.deadline)
            yield DualBound(self._root * found.dual, found.value, found.rounding, "lifted dual point")

    @property
    def _biased(self) -> bool:
        """Whether dual points have to sum to zero."""
        return self.program.loss is not self.program.loss.without_bias and self.program.loss.bias_decay == 0

    @property
    def remark(self) -> str:
        """What more time would buy, in words."""
        if self._too_many:
            return " On so many rows no other bound is made: more time buys none."
        if self._hurried:
            return (
                " The time of the proof was over: more of it (proof_time, or certify with a time_limit) may tighten "
                "the bound, and so may a larger weight_decay."
            )
        return " The proof ended by itself: more time does not tighten the bound, a larger weight_decay may."

    def dual_norm(self, dual: Float, *, proved: bool = True) -> tuple[float, float]:
        """Value of a local search and valid upper bound of the dual norm; it may be infinite unless ``proved``.

        For very many patches the search uses a part of the images.
        """
        V = dual / self._root
        if self._too_many:
            return self._of_some_rows(dual), next(self._cheap(V, 0.0))[0].value
        values, found = self._local_maxima(V, self.deadline)
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
        if self._searched and self._searched[0][0] is dual:
            return self._searched[0][1]
        if self._too_many or (is_over(self.deadline) and not self._quick):
            return None
        V = dual / self._root
        if self._cells is not None:
            spread, target = self.program.readout.spread(V), self.program.weight_decay
            return float(self._cells.maxima(spread, target, self.deadline).value)
        until = None if self._quick else self.deadline
        largest = float(self._local_maxima(V, until)[0][0])
        return None if is_over(until) else largest

    def _local_maxima(self, V: Float, deadline: float | None) -> tuple[Float, Float]:
        spread, A, size = self.program.readout.spread(V), self.program.unit_rows, self.program.rows.size
        starts, rounds = (30, 0) if size > _MANY_ENTRIES else (300, min(_ROUNDS, _ROUNDS * _ROUNDS_ENTRIES // size))
        rng = np.random.default_rng(0)
        return bounds.local_maxima(spread, A, starts, rng, start=self.directions, rounds=rounds, deadline=deadline)

    def _of_some_rows(self, dual: Float) -> float:
        """Estimate of the dual norm: the local search on the first cases, extrapolated to all in proportion."""
        program, n = self.program, len(dual)
        together = program.readout.rows_per_case
        count = min(n, max(1, _MANY_ENTRIES // (together * max(program.n_inputs, program.n_outputs))))
        rows, loss = program.rows[: count * together], program.loss.of_rows(slice(0, count))
        some = replace(self, program=replace(program, rows=rows, loss=loss))
        return n / count * float(some._local_maxima(dual[:count] / some._root, self.deadline)[0][0])

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
        return bounds.EveryCell.of_few(self.program.unit_rows, self.deadline) if self.program.n_outputs == 1 else None

    @property
    def _quick(self) -> bool:
        """Whether a local search is made even if the time is over."""
        return self.program.rows.size <= _QUICK_ENTRIES

    @property
    def _over(self) -> bool:
        return is_over(self.deadline)

    @property
    def _has_time_to_lift(self) -> bool:
        """Whether a step of a lifted relaxation fits into the time that is left."""
        return self.deadline is None or not is_over(
            self.deadline - _LIFTED_STEP * float(sum(self.program.rows.shape)) ** 3
        )

    def _cheap(self, V: Float, target: float, *, followed: bool = False) -> Iterator[tuple[bounds.Bound, str]]:
        """Orthant, then every cell if there are few; else branch and bound at low rank, then the relaxation.

        ``followed``: chosen dual points will need the larger part of the time.
        """
        value, rounding = bounds.orthant(V)
        largest = self.program.readout.norm
        yield bounds.Bound(largest * value, largest * rounding, 1), "orthant"
        if self._too_many:
            return
        V = self.program.readout.spread(V)
        if self._over:
            return
        if self._cells is not None:
            yield self._cells.maxima(V, target, self.deadline), "every cell"
            return
        A = self.program.unit_rows
        if self.program.n_inputs <= bounds.MAX_RANK:
            until = share_of(self.deadline, _BRANCHING_SHARE)
            yield bounds.branch_and_bound(
                V, A, tol=0.1 * self.tol, target=target, start=self.directions,
                max_nodes=_CONES if until is None else _MOST_CONES, deadline=until,
            ), "branch and bound"  # fmt: skip
        if V.shape[1] == 1 and A.ndim == 2 and not self._over:
            until = share_of(self.deadline, _RELAXATION_SHARE) if followed else self.deadline
            yield bounds.relaxation(V, A, deadline=until), "relaxation"

    def _lifted(self, V: Float, target: float) -> Iterator[tuple[bounds.Bound, str]]:
        """Doubly nonnegative relaxation, for a moderate number of rows."""
        rows, spread = self.program.rows, self.program.readout.spread
        if len(rows) <= _LIFTED_ROWS and (A := self.program.unit_rows).ndim == 2 and self._has_time_to_lift:
            yield bounds.lifted(spread(V), A, deadline=self.deadline, target=target), "lifted relaxation"
