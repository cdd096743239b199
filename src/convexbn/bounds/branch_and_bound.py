"""Best-first branch and bound over simplicial cones: the maximum of ``||V'(A u)_+||`` to any tolerance, in low rank.

The 2^q orthants of a rotated basis cover the sphere, and each cone has an upper bound (module ``cones``). A cone whose
bound exceeds the best value found by more than the tolerance is split in two, on the edge where the crossing
hyperplanes cost the bound most. If no hyperplane cuts a cone, the bound of one output is exact.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from convexbn._types import EPS, Float, is_over
from convexbn.bounds import cones
from convexbn.bounds.bound import Bound
from convexbn.bounds.circle import plane
from convexbn.bounds.local_search import ascend, hidden_norms, normalise
from convexbn.bounds.node_queue import Frontier, Nodes
from convexbn.data.scaling import unit_scale

MAX_RANK = 8  # the cones needed for a fixed accuracy grow geometrically with the rank
_BATCH = 256  # cones that are split at a time
_ENTRIES = 1 << 23  # of the rows on the cones that are bounded at a time: fewer cones are split if the rows are many
_ATTEMPTS = 4  # bases whose orthants are tried while all open cones are too thin to split


@dataclass(frozen=True)
class Enclosure(Bound):
    """A bound and the best value found, ``lower = ||V'(A maximiser)_+||``.

    Attributes
    ----------
    lower, maximiser : float, ndarray (q,)
        The unit vector is a violator if the value exceeds the weight decay.
    stopped_by : str
        ``"tolerance"``, ``"nodes"``, ``"deadline"`` or ``"rounding"`` (all open cones are too thin to split).
    """

    lower: float
    maximiser: Float
    stopped_by: str


def branch_and_bound(
    V: Float, A: Float, *, tol: float = 1e-2, max_nodes: int = 100_000, deadline: float | None = None,
    start: Float | None = None, target: float = 0.0,
) -> Enclosure:  # fmt: skip
    """Enclose ``max over ||u|| <= 1 of ||V'(A u)_+||``; exact, by enumeration, if ``q <= 2``. ``work`` counts cones.

    Parameters
    ----------
    V : ndarray (n, K)
    A : ndarray (n, q), or groups (n, G, q)
        Orthonormal columns, ``q <= 8``. The hidden unit of a group is the largest of its rows, or 0.
    tol : float
        Stop when the bound is within a factor of ``1 + tol`` of the best value found.
    max_nodes : int
        Largest number of cones; the last batch may exceed it, by 512 at most.
    deadline : float, optional
    start : ndarray (m, q), optional
        Directions of large value, such as local maxima: the better they are, the fewer cones are split.
    target : float
        Cones whose bound is at most this are not split: the weight decay, if only feasibility matters.
    """
    n, q = A.size // A.shape[-1], A.shape[-1]
    if q > MAX_RANK:
        raise ValueError(f"branch and bound is hopeless at rank {q} > {MAX_RANK}: use the relaxation bound.")
    scale = unit_scale(V)
    V = V / scale
    if q <= 2 and A.ndim == 2:
        value, rounding, maximiser, work = plane(V, A)
        return Enclosure(value * scale, rounding * scale, work, (value - rounding) * scale, maximiser, "tolerance")
    start = np.eye(q)[:1] if start is None or len(start) == 0 else start
    upper, work, rng = np.inf, 0, np.random.default_rng(0)
    for attempt in range(_ATTEMPTS):
        # other orthants have other thin cones, and any bound is valid
        middle = None if attempt == 0 else normalise(rng.standard_normal((1, q)))[0]
        search = _OpenCones(V, A, tol, target / scale, start, middle, deadline)
        reason = search.run(max_nodes - work)
        upper, work, start = min(upper, search.upper), work + search.nodes, search.best[None]
        if reason != "rounding":
            break
    rounding = 4 * EPS * upper * (n + q)
    return Enclosure((upper + rounding) * scale, rounding * scale, work, search.lower * scale, search.best, reason)


class _OpenCones:
    """The open cones, their bounds, and the best value found so far."""

    def __init__(
        self, V: Float, A: Float, tol: float, target: float, start: Float, middle: Float | None, deadline: float | None
    ) -> None:
        # one output: the two signs are two problems; several outputs: one problem of norms
        self.problems = [V, -V] if V.shape[1] == 1 else [V]
        self.V, self.A, self.tol, self.target, self.deadline = V, A, tol, target, deadline
        self.batch = int(np.clip(_ENTRIES // A.size, 1, _BATCH))
        self.lower, self.settled, self.nodes = 0.0, 0.0, 0
        self.best = normalise(start)[0]
        self.improve(normalise(start))
        self.frontier = Frontier(A.shape[-1])
        for problem in range(len(self.problems)):
            orthants = _rotated_orthants(self.best if middle is None else middle)
            largest = np.linalg.norm(V) * np.linalg.norm(A.reshape(-1, A.shape[-1]), 2) * (1 + len(V) * EPS)
            self.add(orthants, problem, np.full(len(orthants), largest))

    @property
    def upper(self) -> float:
        """Bound proved so far."""
        return max(self.lower, self.settled, self.frontier.largest())

    @property
    def enough(self) -> float:
        """Bound asked for."""
        return max(self.lower * (1 + self.tol), self.target)

    def run(self, max_nodes: int) -> str:
        """Split the cones of largest bound, many at a time; return the reason to stop."""
        while self.frontier.largest() > max(self.enough, self.settled):
            if self.nodes >= max_nodes:
                return "nodes"
            if is_over(self.deadline):
                return "deadline"
            halves = self.frontier.pop(self.batch).children()
            for problem in np.unique(halves.problem):
                mine = halves.problem == problem
                self.add(halves.generators[mine], problem, halves.bounds[mine])
        if self.upper <= self.enough:
            return "tolerance"
        return "deadline" if is_over(self.deadline) else "rounding"

    def improve(self, directions: Float) -> None:
        """Ascend from the best of the directions if it beats the best value found."""
        values = hidden_norms(directions, self.V, self.A)
        top = int(values.argmax())
        if values[top] > self.lower:
            climbed = ascend(directions[top : top + 1], self.V, self.A, 20, self.deadline)
            self.lower, self.best = float(hidden_norms(climbed, self.V, self.A)[0]), climbed[0]

    def add(self, generators: Float, problem: int, parents: Float) -> None:
        """Bound cones, some at a time; after the deadline the bounds of their parents are all that is known."""
        for start in range(0, len(parents), 2 * self.batch):
            part = slice(start, start + 2 * self.batch)
            if is_over(self.deadline):
                self.settled = max(self.settled, float(parents[part].max()))
            else:
                self._bound(generators[part], problem, parents[part])

    def _bound(self, generators: Float, problem: int, parents: Float) -> None:
        """Bound cones, try the maximisers of their relaxations, and keep the cones that stay open."""
        self.nodes += len(generators)
        V = self.problems[problem]
        batch = cones.prepare(generators, self.A)
        if V.shape[1] == 1:
            weights = np.repeat(V.T, len(generators), axis=0)
            bounds, directions = cones.one_output(batch, weights)
        else:
            bounds, directions, weights = cones.several_outputs(batch, V)
        self.improve(directions)
        # a thin cone has an inaccurate inverse: its parent's bound holds
        bounds = np.where(batch.thin, parents, np.minimum(bounds, parents))
        edges, shares = cones.worst_edge(batch, weights, directions)
        nodes = Nodes(generators, np.full(len(bounds), problem), bounds, edges, shares)
        self.settled = max(self.settled, float(bounds[batch.thin].max(initial=0.0)))
        # not split: cones that are good enough, and those below one that cannot be split
        open_ = (bounds > max(self.enough, self.settled)) & ~batch.thin
        self.settled = max(self.settled, float(bounds[~open_].max(initial=0.0)))
        self.frontier.add(nodes.take(open_))


def _rotated_orthants(middle: Float) -> Float:
    """Orthants (2^q, q, q), generators in rows, of an orthonormal basis; the unit vector is the middle of the first."""
    q = len(middle)
    mirror = middle - np.full(q, 1 / np.sqrt(q))
    basis = np.eye(q) - 2 * np.outer(mirror, mirror) / max(mirror @ mirror, 1e-300)
    signs = np.array(list(itertools.product([1.0, -1.0], repeat=q)))
    return signs[:, :, None] * basis
