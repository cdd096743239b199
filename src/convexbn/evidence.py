"""Dual points of the ReLU program with valid bounds over all patterns, in order of cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from convexbn import bounds
from convexbn._typing import Float
from convexbn.losses import Loss, SquaredLoss

#: Rows up to which the lifted relaxation is tried for several outputs: its matrices are of order n + q.
_LIFTED_ROWS = 600


class Evidence(NamedTuple):
    """A dual point with a valid upper bound of its dual norm, rounding included, and where that comes from."""

    dual: Float
    bound: float
    rounding: float
    name: str


@dataclass(frozen=True)
class AllPatterns:
    """Bounds of ``max over ||u|| <= 1 of ||V'(A u)_+||`` in order of cost, until the caller has enough.

    Parameters
    ----------
    loss : Loss
    rows : ndarray (n, q)
        ``sqrt(w) A``, orthonormal columns.
    weight_decay : float
    directions : ndarray (m, q)
        First layers of the network: where large values are likely.
    seconds : float
        Time for everything beyond the orthant.
    """

    loss: Loss
    rows: Float
    weight_decay: float
    directions: Float
    seconds: float

    def evidence(self, dual: Float) -> Iterator[Evidence]:
        """The dual point with each bound in turn, and dual points chosen for the relaxation."""
        root = np.sqrt(self.loss.weights)[:, None]
        V = dual / root
        yield Evidence(dual, *bounds.orthant(V), "orthant")
        if self.seconds <= 0:
            return
        deadline = time.monotonic() + self.seconds
        if self.rows.shape[1] <= bounds.MAX_RANK:
            found = bounds.branch_and_bound(
                V, self.rows, tolerance=1e-7, target=self.weight_decay, start=self.directions,
                max_nodes=10_000_000, deadline=time.monotonic() + 0.6 * self.seconds,
            )  # fmt: skip
            yield Evidence(dual, found.value, found.rounding, "branch and bound")
        if V.shape[1] == 1:
            relaxed = bounds.relaxation(V, self.rows, deadline=deadline)
            yield Evidence(dual, relaxed.value, relaxed.rounding, "relaxation")
            if isinstance(self.loss, SquaredLoss):
                chosen = bounds.dual_point(root * self.loss.targets, V, self.rows, self.weight_decay, deadline=deadline)
                yield Evidence(root * chosen.dual, chosen.value, chosen.rounding, "chosen dual point")
        if len(V) <= _LIFTED_ROWS:
            lifted = bounds.lifted(V, self.rows, deadline=deadline, target=self.weight_decay)
            yield Evidence(dual, lifted.value, lifted.rounding, "lifted relaxation")

    def estimate(self, dual: Float) -> float:
        """Largest value that a local search finds: a lower estimate of the dual norm."""
        V = dual / np.sqrt(self.loss.weights)[:, None]
        rng = np.random.default_rng(0)
        values, _ = bounds.local_maxima(V, self.rows, 300, rng, initial=self.directions)
        return float(values.max(initial=0.0))
