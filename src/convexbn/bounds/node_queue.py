"""The open cones of a branch and bound, in arrays that grow: largest bounds out, children in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convexbn._types import Bool, Float, FloatMatrix, Index


@dataclass(frozen=True)
class Nodes:
    """Cones with their bounds and the edge each would be split on.

    Attributes
    ----------
    generators : ndarray (B, q, q)
        Unit generators in rows.
    problem : ndarray (B,)
        Which function is bounded.
    bounds : ndarray (B,)
    edges : ndarray (B, 2)
        The generators at the ends of the edge to split.
    shares : ndarray (B,)
        The new generator is along ``(1 - share) * first + share * second``.
    """

    generators: Float
    problem: Index
    bounds: Float
    edges: Index
    shares: Float

    def __len__(self) -> int:
        return len(self.bounds)

    def take(self, chosen: Index | Bool) -> Nodes:
        """The nodes of an index or mask."""
        return Nodes(*(field[chosen] for field in self.fields()))

    def fields(self) -> tuple[FloatMatrix, ...]:
        """The arrays, in the order of the constructor."""
        return self.generators, self.problem, self.bounds, self.edges, self.shares

    def children(self) -> Nodes:
        """Both halves of every node, with the bounds of their parents."""
        places = np.arange(len(self))
        first, second = self.edges.T
        share = self.shares[:, None]
        middle = (1 - share) * self.generators[places, first] + share * self.generators[places, second]
        middle /= np.linalg.norm(middle, axis=1, keepdims=True)
        halves = np.repeat(self.generators[None], 2, axis=0)
        halves[0, places, first] = middle
        halves[1, places, second] = middle
        twice = np.tile(places, 2)
        q = self.generators.shape[1]
        return Nodes(
            halves.reshape(-1, q, q), self.problem[twice], self.bounds[twice], self.edges[twice], self.shares[twice]
        )


class Frontier:
    """A bag of nodes from which those of largest bound are taken many at a time."""

    def __init__(self, q: int) -> None:
        self._size = 0
        self._room = Nodes(
            np.empty((0, q, q)), np.empty(0, np.intp), np.empty(0), np.empty((0, 2), np.intp), np.empty(0)
        )

    def largest(self) -> float:
        """Largest bound of an open node; 0 when none is left."""
        return float(self._room.bounds[: self._size].max(initial=0.0))

    def add(self, nodes: Nodes) -> None:
        """Put nodes in."""
        end = self._size + len(nodes)
        if end > len(self._room):
            # more than twice the room, so that a node is copied a constant number of times
            self._room = Nodes(*(_grown(field, 2 * end) for field in self._room.fields()))
        for room, new in zip(self._room.fields(), nodes.fields(), strict=True):
            room[self._size : end] = new
        self._size = end

    def pop(self, count: int) -> Nodes:
        """Take the ``count`` nodes of largest bound out."""
        bounds = self._room.bounds[: self._size]
        chosen = np.argpartition(-bounds, count)[:count] if count < self._size else np.arange(self._size)
        taken = self._room.take(chosen)
        rest = self._size - len(chosen)
        holes, movers = chosen[chosen < rest], np.setdiff1d(np.arange(rest, self._size), chosen)
        for room in self._room.fields():
            room[holes] = room[movers]
        self._size = rest
        return taken


def _grown(field: FloatMatrix, size: int) -> FloatMatrix:
    room = np.empty((size, *field.shape[1:]), field.dtype)
    room[: len(field)] = field
    return room
