"""Where is ``||V'(A u)_+||`` large? Local maxima from many starts, and branch and bound in low rank.

What a network lacks lies mostly near the neurons that it has, behind a kink or two: starts around them find it.
The best random starts lead to the neurons themselves, since at an optimum these are the largest local maxima, and
what is missing elsewhere is found from the others. So all of them are followed.
"""

from __future__ import annotations

import numpy as np

from convexbn import bounds
from convexbn._types import Float, is_over
from convexbn.bounds.local_search import ascend, distinct, hidden_norms, normalise, scattered

#: Starts are followed up to this many entries of ``starts x n x q``, and at least 30; so many of them at a time.
_FOLLOWED_ENTRIES = 1 << 23
_CLIMBED_ENTRIES = 1 << 21

#: How far from the neurons the starts around them are, as tangents of the angle: at first, and in later batches.
_NEAR, _NEARER, _FARTHER = 0.3, 0.1, 1.0

#: Steps of an ascent.
_ROUNDS = 10

#: Cones of the branch and bound.
_NODES = 5_000


class Pricing:
    """Directions of large dual norm, as far as time allows.

    Parameters
    ----------
    V : ndarray (n, K)
    A : ndarray (n, q)
        Orthonormal columns.
    deadline : float, optional
        ``time.monotonic()`` at which to stop.
    """

    def __init__(self, V: Float, A: Float, deadline: float | None) -> None:
        self.V, self.A, self.deadline = V, A, deadline
        self.neurons = self.found = np.zeros((0, A.shape[1]))
        self.values = np.zeros(0)

    @property
    def largest(self) -> float:
        """The largest value found."""
        return float(self.values.max(initial=0.0))

    def above(self, threshold: float, keep: int) -> Float:
        """Distinct directions with values above the threshold, best first, at most ``keep``."""
        above = self.values > threshold
        return distinct(self.found[above], self.values[above], keep)

    @property
    def late(self) -> bool:
        """No time is left."""
        return is_over(self.deadline)

    def from_neurons(self, directions: Float, starts: int, rng: np.random.Generator) -> None:
        """Take the directions (m, q), and climb from them and from around them."""
        self.neurons = normalise(directions)
        self._add(self.neurons)
        self._climb(self.neurons)
        self._climb(scattered(self.neurons, self._affordable(starts), _NEAR, rng))

    def from_random(self, starts: int, rng: np.random.Generator) -> None:
        """Climb from further around the neurons and from random directions, fewer where the data are large."""
        followed = self._affordable(starts)
        for spread in _NEARER, _FARTHER:
            self._climb(scattered(self.neurons, followed // 3, spread, rng))
        self._climb(rng.standard_normal((followed // 3, self.A.shape[1])))
        if followed == starts and not self.late:
            self._add(bounds.local_maxima(self.V, self.A, starts // 3, rng, rounds=_ROUNDS)[1])

    def by_branch_and_bound(self, threshold: float, tolerance: float) -> bool:
        """In low rank look everywhere; True when no cone is left that is open, but for those too thin to be split."""
        if self.A.shape[1] > bounds.MAX_RANK or self.late:
            return False
        enclosure = bounds.branch_and_bound(
            self.V, self.A, tol=tolerance, max_nodes=_NODES, deadline=self.deadline, start=self.found,
            target=threshold,
        )  # fmt: skip
        self._add(enclosure.maximiser[None, :])
        return enclosure.stopped_by in ("tolerance", "rounding")

    def _affordable(self, starts: int) -> int:
        return int(np.clip(_FOLLOWED_ENTRIES // self.A.size, min(30, starts), starts))

    def _climb(self, directions: Float) -> None:
        scale = np.abs(self.V).max(initial=0.0) or 1.0
        batch = int(np.clip(_CLIMBED_ENTRIES // self.A.size, 1, 64))
        for start in range(0, len(directions), batch):
            if self.late:
                break
            self._add(ascend(normalise(directions[start : start + batch]), self.V / scale, self.A, _ROUNDS))

    def _add(self, directions: Float) -> None:
        self.found = np.vstack([self.found, directions])
        self.values = np.append(self.values, hidden_norms(directions, self.V, self.A))
