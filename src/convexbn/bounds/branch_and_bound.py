"""Best-first branch and bound over simplicial cones: the maximum of ``||V'(A u)_+||`` to any tolerance, in low rank.

The 2^q orthants of a rotated basis cover the sphere; each cone has an upper bound (module ``cones``), and one whose
bound exceeds the best value found by more than the tolerance is split in two on one of its edges, where the
hyperplane crosses that costs the bound most. When no hyperplane cuts a cone the bound of one output is exact.
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

#: Largest rank that is tried: the cones needed for a fixed accuracy grow geometrically with it.
MAX_RANK = 8
_BATCH = 256

#: Bases whose orthants are tried while only cones too thin to split are open.
_ATTEMPTS = 4


@dataclass(frozen=True)
class Enclosure(Bound):
    """A bound together with the best value found.

    Attributes
    ----------
    lower : float
        ``||V'(A maximiser)_+||``.
    maximiser : ndarray (q,)
        Unit vector: a violator when ``lower`` exceeds the weight decay.
    stopped_by : str
        ``"tolerance"``, ``"nodes"``, ``"deadline"`` or ``"rounding"`` (only cones too thin to split are open).
    """

    lower: float
    maximiser: Float
    stopped_by: str


def branch_and_bound(
    V: Float,
    A: Float,
    *,
    tol: float = 1e-2,
    max_nodes: int = 100_000,
    deadline: float | None = None,
    start: Float | None = None,
    target: float = 0.0,
) -> Enclosure:
    """Enclose ``max over ||u|| <= 1 of ||V'(A u)_+||``.

    Parameters
    ----------
    V : ndarray (n, K)
    A : ndarray (n, q), or groups (n, G, q)
        Orthonormal columns, ``q <= 8``. The hidden unit of a group is the largest of its rows, or 0.
    tol : float
        Stop when the bound is within this factor (less 1) of the best value found.
    max_nodes : int
        Largest number of cones that are bounded; a batch under way is finished, at most 512 more.
    deadline : float, optional
        ``time.monotonic()`` at which to stop.
    start : ndarray (m, q), optional
        Directions of large value, such as local maxima; the better they are, the less is split.
    target : float
        Cones whose bound is at most this are not split: the weight decay, when only feasibility matters.

    Returns
    -------
    Enclosure
        With the number of cones as ``work``; exact, by enumeration, when ``q <= 2``.

    Raises
    ------
    ValueError
        When ``q > 8``.
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
        # other orthants have other thin cones, and any of their bounds is valid
        middle = None if attempt == 0 else normalise(rng.standard_normal((1, q)))[0]
        search = _OpenCones(V, A, tol, target / scale, start, middle)
        reason = search.run(max_nodes - work, deadline)
        upper, work, start = min(upper, search.upper), work + search.nodes, search.best[None]
        if reason != "rounding":
            break
    rounding = 4 * EPS * upper * (n + q)
    return Enclosure((upper + rounding) * scale, rounding * scale, work, search.lower * scale, search.best, reason)


class _OpenCones:
    """The open cones, their bounds, and the best value found so far."""

    def __init__(self, V: Float, A: Float, tol: float, target: float, start: Float, middle: Float | None) -> None:
        # one output: the two signs are two problems; several outputs: one problem of norms
        self.problems = [V, -V] if V.shape[1] == 1 else [V]
        self.V, self.A, self.tol, self.target = V, A, tol, target
        self.lower, self.settled, self.nodes = 0.0, 0.0, 0
        self.best = normalise(start)[0]
        self.improve(normalise(start))
        self.frontier = Frontier(A.shape[-1])
        for problem in range(len(self.problems)):
            self.bound(rotated_orthants(self.best if middle is None else middle), problem, np.inf)

    @property
    def upper(self) -> float:
        """The bound that is proved."""
        return max(self.lower, self.settled, self.frontier.largest())

    @property
    def enough(self) -> float:
        """The bound that is asked for."""
        return max(self.lower * (1 + self.tol), self.target)

    @property
    def threshold(self) -> float:
        """Cones with bounds up to this are not split: they are good enough, or one that cannot be split is worse."""
        return max(self.enough, self.settled)

    def run(self, max_nodes: int, deadline: float | None) -> str:
        """Split the cones of largest bound, many at a time, until something stops it."""
        while self.frontier.largest() > self.threshold:
            if self.nodes >= max_nodes:
                return "nodes"
            if is_over(deadline):
                return "deadline"
            halves = self.frontier.pop(_BATCH).children()
            for problem in range(len(self.problems)):
                mine = halves.problem == problem
                if mine.any():
                    self.bound(halves.generators[mine], problem, halves.bounds[mine])
        return "tolerance" if self.upper <= self.enough else "rounding"

    def improve(self, directions: Float) -> None:
        """Ascend from the best direction given when it beats the best value found."""
        values = hidden_norms(directions, self.V, self.A)
        top = int(values.argmax())
        if values[top] > self.lower:
            climbed = ascend(directions[top : top + 1], self.V, self.A, 20)
            self.lower, self.best = float(hidden_norms(climbed, self.V, self.A)[0]), climbed[0]

    def bound(self, generators: Float, problem: int, parents: Float | float) -> None:
        """Bound cones, try the directions that their relaxations suggest, and keep the cones that stay open."""
        self.nodes += len(generators)
        V = self.problems[problem]
        batch = cones.prepare(generators, self.A)
        if V.shape[1] == 1:
            weights = np.repeat(V.T, len(generators), axis=0)
            bounds, directions = cones.one_output(batch, weights)
        else:
            bounds, directions, weights = cones.several_outputs(batch, V)
        self.improve(directions)
        # a cone that is too thin has an inaccurate inverse: its parent's bound holds
        bounds = np.where(batch.thin, parents, np.minimum(bounds, parents))
        edges, shares = cones.worst_edge(batch, weights, directions)
        nodes = Nodes(generators, np.full(len(bounds), problem), bounds, edges, shares)
        self.settled = max(self.settled, float(bounds[batch.thin].max(initial=0.0)))
        open_ = (bounds > self.threshold) & ~batch.thin
        self.settled = max(self.settled, float(bounds[~open_].max(initial=0.0)))
        self.frontier.add(nodes.take(open_))


def rotated_orthants(middle: Float) -> Float:
    """The orthants of an orthonormal basis that has the unit vector ``middle`` in the middle of the first one.

    Returns
    -------
    ndarray (2^q, q, q)
        Generators in rows.
    """
    q = len(middle)
    mirror = middle - np.full(q, 1 / np.sqrt(q))
    basis = np.eye(q) - 2 * np.outer(mirror, mirror) / max(mirror @ mirror, 1e-300)
    signs = np.array(list(itertools.product([1.0, -1.0], repeat=q)))
    return signs[:, :, None] * basis
