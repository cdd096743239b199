"""Regions of the locations of an image, over which pooling takes averages or maxima."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from convexbn._types import Bool, Float, FloatMatrix, Index


@dataclass(frozen=True)
class Regions:
    """Grid of regions of the locations, as in torch's adaptive pooling.

    Numbers of ``locations`` and the ``grid`` of regions are given down and across. In each dimension region ``i`` of
    ``g`` has the locations from ``floor(i L / g)`` up to ``ceil((i + 1) L / g)`` of ``L``; regions overlap unless ``g``
    divides ``L``.

    Examples
    --------
    >>> Regions((1, 4), (1, 2)).averages
    array([[0.5, 0.5, 0. , 0. ],
           [0. , 0. , 0.5, 0.5]])
    """

    locations: tuple[int, int]
    grid: tuple[int, int]

    @property
    def n_locations(self) -> int:
        """Number of locations, ``Kp``."""
        return self.locations[0] * self.locations[1]

    @property
    def n_regions(self) -> int:
        """Number of regions, ``R``."""
        return self.grid[0] * self.grid[1]

    @property
    def flattened(self) -> bool:
        """Whether every location is a region of its own, so that average and maximum are equal."""
        return self.grid == self.locations

    @functools.cached_property
    def members(self) -> Bool:
        """Which locations belong to each region: (R, Kp)."""
        down, across = (_intervals(size, parts) for size, parts in zip(self.locations, self.grid, strict=True))
        inside = down[:, None, :, None] & across[None, :, None, :]
        return inside.reshape(self.n_regions, self.n_locations)

    @functools.cached_property
    def averages(self) -> Float:
        """Matrix ``T`` (R, Kp) of average pooling."""
        return self.members / self.members.sum(axis=1, keepdims=True)

    @functools.cached_property
    def groups(self) -> Index:
        """Locations of each region (R, G); a region with fewer than the largest repeats its first."""
        size, found = int(self.members.sum(axis=1).max()), [np.flatnonzero(row) for row in self.members]
        return np.stack([np.pad(places, (0, size - len(places)), constant_values=places[0]) for places in found])

    @functools.cached_property
    def equal(self) -> bool:
        """Whether the regions are cells of equal size, without overlap."""
        return all(size % parts == 0 for size, parts in zip(self.locations, self.grid, strict=True))

    def in_cells(self, images: FloatMatrix) -> FloatMatrix:
        """Images (n, Kp, m) in equal cells: (n, cells down, rows of a cell, cells across, columns of a cell, m)."""
        down, across = (size // parts for size, parts in zip(self.locations, self.grid, strict=True))
        return images.reshape(len(images), self.grid[0], down, self.grid[1], across, images.shape[2])

    def by_image(self, rows: FloatMatrix) -> FloatMatrix:
        """Rows (n Kp, m) as images (n, Kp, m)."""
        return rows.reshape(len(rows) // self.n_locations, self.n_locations, rows.shape[1])


def _intervals(size: int, parts: int) -> Bool:
    """Which of ``size`` places belong to each part: (parts, size)."""
    places, i = np.arange(size), np.arange(parts)[:, None]
    return (places >= i * size // parts) & (places < -(-(i + 1) * size // parts))
