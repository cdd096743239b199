"""Where is ``||V'(A u)_+||`` large? Local maxima from many starts, and branch and bound in low rank.

Missing neurons lie mostly near the present ones, behind a kink or two: starts around them find these. The best random
starts lead to the present neurons, since at an optimum these are the largest local maxima, and the others to neurons
that are missing elsewhere. So all starts are followed.
"""

from __future__ import annotations

import numpy as np

from convexbn import bounds
from convexbn._types import Float, is_over
from convexbn.bounds.local_search import ascend, distinct, hidden_norms, normalise, scattered

_FOLLOWED_ENTRIES = 1 << 23  # of starts x n x q, up to which starts are followed; at least 30 are
_CLIMBED_ENTRIES = 1 << 21  # of starts x n x q that are followed at a time
_NEAR, _NEARER, _FARTHER = 0.3, 0.1, 1.0  # tangents of the angle of starts to neurons: at first, in later batches
_ROUNDS = 10  # steps of an ascent
_NODES = 5_000  # cones of the branch and bound


class Pricing:
    """Directions of large dual norm, as far as time allows.

    Parameters
    ----------
    V, A : ndarray (n, K), (n, q)
        ``A`` has orthonormal columns.
    starts, rng : int, numpy.random.Generator
        Number of starts of a search, fewer if the data are large, and their source.
    deadline : float, optional
    """

    def __init__(self, V: Float, A: Float, starts: int, rng: np.random.Generator, deadline: float | None) -> None:
        self.V, self.A, self.starts, self.rng, self.deadline = V, A, starts, rng, deadline
        self.followed = int(np.clip(_FOLLOWED_ENTRIES // A.size, min(30, starts), starts))
        self.neurons = self.found = np.zeros((0, A.shape[1]))
        self.values = np.zeros(0)

    @property
    def largest(self) -> float:
        """The largest value found."""
        return float(self.values.max(initial=0.0))

    def above(self, threshold: float, keep: int) -> Float:
        """At most ``keep`` distinct directions with values above the threshold, best first."""
        above = self.values > threshold
        return distinct(self.found[above], self.values[above], keep)

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return is_over(self.deadline)

    def from_neurons(self, directions: Float) -> None:
        """Take the directions (m, q), and climb from them and from around them."""
        self.neurons = normalise(directions)
        self._add(self.neurons)
        self._climb(self.neurons)
        self._climb(scattered(self.neurons, self.followed, _NEAR, self.rng))

    def from_random(self) -> None:
        """Climb from further around the neurons and from random directions."""
        for spread in _NEARER, _FARTHER:
            self._climb(scattered(self.neurons, self.followed // 3, spread, self.rng))
        self._climb(self.rng.standard_normal((self.followed // 3, self.A.shape[1])))
        if self.followed == self.starts and not self.late:
            _, found = bounds.local_maxima(
                self.V, self.A, self.starts // 3, self.rng, rounds=_ROUNDS, deadline=self.deadline
            )
            self._add(found)

    def by_branch_and_bound(self, threshold: float, tolerance: float) -> bool:
        """Search everywhere in low rank; True when no cone is open any more, or only those too thin to split."""
        if self.A.shape[1] > bounds.MAX_RANK or self.late:
            return False
        enclosure = bounds.branch_and_bound(
            self.V, self.A, tol=tolerance, max_nodes=_NODES, deadline=self.deadline, start=self.found, target=threshold
        )
        self._add(enclosure.maximiser[None, :])
        return enclosure.stopped_by in ("tolerance", "rounding")

    def _climb(self, directions: Float) -> None:
        scale = np.abs(self.V).max(initial=0.0) or 1.0
        batch = int(np.clip(_CLIMBED_ENTRIES // self.A.size, 1, 64))
        for start in range(0, len(directions), batch):
            if self.late:
                break
            some = normalise(directions[start : start + batch])
            self._add(ascend(some, self.V / scale, self.A, _ROUNDS, self.deadline))

    def _add(self, directions: Float) -> None:
        self.found = np.vstack([self.found, directions])
        self.values = np.append(self.values, hidden_norms(directions, self.V, self.A))
