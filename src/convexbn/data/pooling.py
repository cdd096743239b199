"""Pooling: what an image keeps of the hidden units at its locations, and the way back for gradients.

Average pooling over regions is a matrix ``T`` (R, Kp) on the rows of an image; max pooling takes the largest row of
each region. The output layer sees the ``R`` regions of every neuron, ``F_i = sum_j sum_r pooled_irj c_jr``, so that
its weights are (m, R K): global pooling is ``R = 1``, a flattened layer has a region for every location.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from convexbn._types import Bool, Float, FloatMatrix, Index


@dataclass(frozen=True)
class Pooling:
    """Average or maximum over a grid of regions of the locations.

    The regions are those of torch's adaptive pooling: of ``L`` locations region ``i`` of ``g`` are those from
    ``floor(i L / g)`` up to ``ceil((i + 1) L / g)``, which overlap where ``g`` does not divide ``L``.

    Attributes
    ----------
    kind : {"average", "max"}
    locations : tuple of int
        Down and across.
    grid : tuple of int
        Regions down and across.

    Examples
    --------
    >>> Pooling("average", (1, 4), (1, 2)).matrix
    array([[0.5, 0.5, 0. , 0. ],
           [0. , 0. , 0.5, 0.5]])
    """

    kind: str
    locations: tuple[int, int]
    grid: tuple[int, int]

    @property
    def n_locations(self) -> int:
        """``Kp``."""
        return self.locations[0] * self.locations[1]

    @property
    def n_regions(self) -> int:
        """``R``."""
        return self.grid[0] * self.grid[1]

    @property
    def linear(self) -> bool:
        """Whether it is a matrix on the rows."""
        return self.kind == "average" or self.flattened

    @property
    def flattened(self) -> bool:
        """Whether every location is a region of its own, where average and maximum are one."""
        return self.grid == self.locations

    @functools.cached_property
    def members(self) -> Bool:
        """Which locations belong to a region: (R, Kp)."""
        down, across = (_intervals(size, parts) for size, parts in zip(self.locations, self.grid, strict=True))
        inside = down[:, None, :, None] & across[None, :, None, :]
        return inside.reshape(self.n_regions, self.n_locations)

    @functools.cached_property
    def matrix(self) -> Float:
        """``T`` (R, Kp) of average pooling."""
        matrix: Float = self.members / self.members.sum(axis=1, keepdims=True)
        return matrix

    @functools.cached_property
    def norm(self) -> float:
        """Largest ``||pooled rows|| / ||rows||`` of an image with nonnegative rows, rounded upwards."""
        if self.linear:
            return float(np.linalg.norm(self.matrix, 2)) * (1 + 1e-12)
        return float(np.sqrt(self.members.sum(axis=0).max())) * (1 + 1e-12)

    @functools.cached_property
    def groups(self) -> Index:
        """Locations of every region, the first again where it has fewer than the largest: (R, G)."""
        size = int(self.members.sum(axis=1).max())
        found = [np.flatnonzero(row) for row in self.members]
        return np.stack([np.append(places, np.repeat(places[0], size - len(places))) for places in found])

    def pool(self, hidden: FloatMatrix) -> FloatMatrix:
        """Hidden units (n Kp, m) of images, pooled: (n, R, m)."""
        images = self._by_image(hidden)
        if self.flattened:
            return images
        if self._divides:
            cells = self._in_cells(images)
            total: FloatMatrix = cells.sum(axis=(2, 4)) if self.linear else cells.max(axis=(2, 4))
            total = total / self._cell_size if self.linear else total
            return total.reshape(len(images), self.n_regions, hidden.shape[1])
        if self.linear:
            averages: FloatMatrix = self.matrix.astype(hidden.dtype) @ images
            return averages
        return np.stack([images[:, inside].max(axis=1) for inside in self.members], axis=1)

    def unpool(self, pooled: FloatMatrix, hidden: FloatMatrix) -> FloatMatrix:
        """Gradient by the hidden units (n Kp, m) from that by the pooled ones (n, R, m).

        A maximum that is attained at several locations gives its gradient to the first.
        """
        if self.flattened:
            return pooled.reshape(hidden.shape)
        images = self._by_image(hidden)
        if self._divides:
            cells = self._in_cells(images)
            by_cell = pooled.reshape(len(pooled), self.grid[0], 1, self.grid[1], 1, hidden.shape[1])
            if self.linear:
                return np.broadcast_to(by_cell / self._cell_size, cells.shape).reshape(hidden.shape)
            return _to_the_first(by_cell, cells).reshape(hidden.shape)
        if self.linear:
            spread: FloatMatrix = self.matrix.T.astype(hidden.dtype) @ pooled
            return spread.reshape(hidden.shape)
        gradient = np.zeros_like(images)
        for r, inside in enumerate(self.members):
            places = np.flatnonzero(inside)[images[:, inside].argmax(axis=1)][:, None]
            taken = np.take_along_axis(gradient, places, axis=1)
            np.put_along_axis(gradient, places, taken + pooled[:, r : r + 1], axis=1)
        return gradient.reshape(hidden.shape)

    def outputs(self, hidden: FloatMatrix, output: FloatMatrix) -> FloatMatrix:
        """Outputs (n, K) of hidden units (n Kp, m) and an output layer (m, R K)."""
        pooled = self.pool(hidden)
        outputs: FloatMatrix = pooled.reshape(len(pooled), self.n_regions * len(output)) @ self.by_region(output)
        return outputs

    def by_region(self, output: FloatMatrix) -> FloatMatrix:
        """An output layer (m, R K) as one (R m, K) of the pooled units."""
        m, R, K = len(output), self.n_regions, output.shape[1] // self.n_regions
        return output.reshape(m, R, K).transpose(1, 0, 2).reshape(R * m, K)

    def by_neuron(self, regional: FloatMatrix) -> FloatMatrix:
        """The way back: (R m, K) as (m, R K)."""
        m, R, K = len(regional) // self.n_regions, self.n_regions, regional.shape[1]
        return regional.reshape(R, m, K).transpose(1, 0, 2).reshape(m, R * K)

    def gather(self, outputs: FloatMatrix) -> FloatMatrix:
        """``F_i = sum_r sum_k T_rk G_(ik),r`` of outputs (n Kp, R K) of the rows: (n, K)."""
        images = outputs.reshape(-1, self.n_locations, self.n_regions, outputs.shape[1] // self.n_regions)
        summed: FloatMatrix = np.einsum("rk,nkrc->nc", self.matrix, images, optimize=True)
        return summed

    def spread(self, dual: FloatMatrix) -> FloatMatrix:
        """The adjoint: a dual point (n, K) of the outputs as one (n Kp, R K) of the rows."""
        spread: FloatMatrix = np.einsum("rk,nc->nkrc", self.matrix, dual)
        return spread.reshape(len(dual) * self.n_locations, -1)

    def grouped(self, rows: Float) -> Float:
        """Rows (n Kp, q) in the groups of max pooling: (n R, G, q)."""
        images = self._by_image(rows)
        return images[:, self.groups].reshape(-1, self.groups.shape[1], rows.shape[1])

    def by_group(self, dual: Float) -> Float:
        """A dual point (n, K) as one (n R, R K) of the groups: each region has outputs of its own."""
        R, (n, K) = self.n_regions, dual.shape
        grouped: Float = np.einsum("rs,nc->nrsc", np.eye(R), dual).reshape(n * R, R * K)
        return grouped

    @functools.cached_property
    def _divides(self) -> bool:
        """Whether the regions are equal cells, which do not overlap."""
        return all(size % parts == 0 for size, parts in zip(self.locations, self.grid, strict=True))

    @property
    def _cell_size(self) -> int:
        """Locations of a cell."""
        return self.n_locations // self.n_regions

    def _in_cells(self, images: FloatMatrix) -> FloatMatrix:
        """Images (n, Kp, m) in equal cells: (n, cells down, rows of a cell, cells across, columns of a cell, m)."""
        down, across = (size // parts for size, parts in zip(self.locations, self.grid, strict=True))
        return images.reshape(len(images), self.grid[0], down, self.grid[1], across, images.shape[2])

    def _by_image(self, rows: FloatMatrix) -> FloatMatrix:
        """Rows (n Kp, m) of images, image by image: (n, Kp, m)."""
        return rows.reshape(len(rows) // self.n_locations, self.n_locations, rows.shape[1])


def _to_the_first(pooled: FloatMatrix, cells: FloatMatrix) -> FloatMatrix:
    """Gradients of maxima at the first place in each cell that attains it, zero elsewhere."""
    gradient, top = np.empty_like(cells), cells.max(axis=(2, 4))
    still = np.ones(top.shape, dtype=bool)
    for i, j in np.ndindex(cells.shape[2], cells.shape[4]):
        first = (cells[:, :, i, :, j] == top) & still
        still &= ~first
        np.multiply(pooled[:, :, 0, :, 0], first, out=gradient[:, :, i, :, j])
    return gradient


def _intervals(size: int, parts: int) -> Bool:
    """Which of ``size`` places belong to the parts: (parts, size)."""
    places, i = np.arange(size), np.arange(parts)[:, None]
    inside: Bool = (places >= i * size // parts) & (places < -(-(i + 1) * size // parts))
    return inside
