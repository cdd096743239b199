"""The open cones of a branch and bound, in arrays that grow: largest bounds out, children in."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from convexbn._types import Bool, Float, Index


class Nodes(NamedTuple):
    """Cones with their bounds and the edge on which to split each.

    Attributes
    ----------
    generators : ndarray (B, q, q)
        Unit generators in rows.
    problem, bounds : ndarray (B,)
        Which function is bounded, and its bound.
    edges, shares : ndarray (B, 2), (B,)
        Generators at the ends of the edge; the new one is along ``(1 - share) * first + share * second``.
    """

    generators: Float
    problem: Index
    bounds: Float
    edges: Index
    shares: Float

    def take(self, chosen: Index | Bool) -> Nodes:
        """Nodes of an index or mask, copied."""
        return Nodes._make(field[chosen] for field in self)

    def children(self) -> Nodes:
        """Both halves of every node, with the bounds of their parents."""
        count, places = len(self.bounds), np.arange(len(self.bounds))
        first, second = self.edges.T
        share = self.shares[:, None]
        middle = (1 - share) * self.generators[places, first] + share * self.generators[places, second]
        middle /= np.linalg.norm(middle, axis=1, keepdims=True)
        halves = self.take(np.tile(places, 2))
        halves.generators[places, first] = halves.generators[count + places, second] = middle
        return halves


class Frontier:
    """A bag of nodes that gives those of largest bound, many at a time."""

    def __init__(self, q: int) -> None:
        self._size = 0
        self._room = Nodes(np.empty((0, q, q)), np.empty(0, int), np.empty(0), np.empty((0, 2), int), np.empty(0))

    def largest(self) -> float:
        """Largest bound of an open node; 0 when empty."""
        return float(self._room.bounds[: self._size].max(initial=0.0))

    def add(self, nodes: Nodes) -> None:
        """Put nodes in."""
        end = self._size + len(nodes.bounds)
        if end > len(self._room.bounds):
            # more than twice the room, so that a node is copied a constant number of times
            larger = Nodes._make(np.empty((2 * end, *field.shape[1:]), field.dtype) for field in nodes)
            for new, old in zip(larger, self._room, strict=True):
                new[: self._size] = old[: self._size]
            self._room = larger
        for room, new in zip(self._room, nodes, strict=True):
            room[self._size : end] = new
        self._size = end

    def pop(self, count: int) -> Nodes:
        """Take the ``count`` nodes of largest bound out."""
        bounds = self._room.bounds[: self._size]
        chosen = np.argpartition(-bounds, count)[:count] if count < self._size else np.arange(self._size)
        taken = self._room.take(chosen)
        rest = self._size - len(chosen)
        holes, movers = chosen[chosen < rest], np.setdiff1d(np.arange(rest, self._size), chosen)
        for room in self._room:
            room[holes] = room[movers]
        self._size = rest
        return taken
