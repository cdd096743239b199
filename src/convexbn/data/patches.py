"""Patches of images: their geometry, and the matrix with one row a patch, whose rows are computed lazily.

Whatever reads rows in blocks reads it like a matrix in memory, which for 5 x 5 patches of 60,000 images of 28 x 28
pixels would have 35 million rows, 7 GB in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from convexbn._types import Float, FloatMatrix
from convexbn.data.row_matrix import HostRows


@dataclass(frozen=True)
class Geometry:
    """Patches of images ``(height, width, channels)``; a signal is an image of height 1, with ``dimensions`` of 1.

    ``kernel``, ``stride`` and ``padding`` are sizes down and across; zeros pad both sides.
    """

    image: tuple[int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dimensions: int = 2

    def __post_init__(self) -> None:
        if min(self.locations) < 1:
            raise ValueError(
                f"a kernel of {self.kernel[-self.dimensions :]} does not fit into inputs of "
                f"{self.image[-self.dimensions - 1 : -1]} with padding {self.padding[-self.dimensions :]}: "
                "give a smaller kernel_size, or more padding."
            )

    @property
    def locations(self) -> tuple[int, int]:
        """Number of places of the kernel down and across."""
        sizes = zip(self.image[:2], self.kernel, self.stride, self.padding, strict=True)
        down, across = ((size + 2 * padding - kernel) // stride + 1 for size, kernel, stride, padding in sizes)
        return down, across

    @property
    def n_locations(self) -> int:
        """Number of patches of an image, ``Kp``."""
        return int(np.prod(self.locations))

    @property
    def patch_size(self) -> int:
        """Number of entries of a patch, ``h``."""
        return int(np.prod(self.kernel)) * self.image[2]

    @property
    def n_features(self) -> int:
        """Number of entries of an image."""
        return int(np.prod(self.image))


class PatchMatrix(HostRows):
    """Patches (n Kp, h) of images (n, height, width, channels) of any real type, computed lazily.

    Row ``i Kp + k`` is patch ``k`` of image ``i``, locations row by row. Its entries are in torch's order: channel,
    then down, then across. Images are given flattened row by row, the channels of a pixel side by side.

    Examples
    --------
    >>> signals = np.array([[1, 2, 3], [4, 5, 6]])
    >>> np.asarray(PatchMatrix(signals, Geometry((1, 3, 1), (1, 2), (1, 1), (0, 0), 1)))
    array([[1, 2],
           [2, 3],
           [4, 5],
           [5, 6]])
    """

    def __init__(self, images: FloatMatrix, geometry: Geometry) -> None:
        self.flat, self.geometry = images, geometry
        down, across = geometry.padding
        padded = images.reshape(len(images), *geometry.image)
        if down or across:
            padded = np.pad(padded, ((0, 0), (down, down), (across, across), (0, 0)))
        places = np.arange(math.prod(padded.shape[1:])).reshape(padded.shape[1:])
        windows = sliding_window_view(places, geometry.kernel, axis=(0, 1))
        strided = windows[:: geometry.stride[0], :: geometry.stride[1]]
        self._padded = padded.reshape(len(padded), places.size)
        self._places = strided.reshape(geometry.n_locations, geometry.patch_size)

    @property
    def shape(self) -> tuple[int, int]:
        """``(n Kp, h)``."""
        return len(self.flat) * self.geometry.n_locations, self.geometry.patch_size

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the pixels."""
        return self.flat.dtype

    def __getitem__(self, index: Any) -> FloatMatrix:
        """Row of an index, or rows of a slice of step 1, a mask or an array of indices."""
        count = self.geometry.n_locations
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            first = start // count
            found = self.of_cases(slice(first, -(-stop // count)))
            return found[start - first * count : max(stop, start) - first * count]
        rows = np.asarray(index)
        image, location = np.divmod(np.flatnonzero(rows) if rows.dtype == bool else rows, count)
        return self._padded[image[..., None], self._places[location]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> FloatMatrix:
        return self[:].astype(dtype or self.dtype, copy=False)

    def of_cases(self, cases: Any, rows_per_case: int = 1) -> FloatMatrix:
        """All patches of some images: (b Kp, h)."""
        patches = np.take(self._padded[cases], self._places.ravel(), axis=1)
        return patches.reshape(-1, self.geometry.patch_size)

    def min(self, axis: int | None = None, initial: float = np.inf) -> Float | float:
        """Smallest entry of each column (``axis=0``), or of all."""
        return self._edge(np.minimum, axis, initial)

    def max(self, axis: int | None = None, initial: float = -np.inf) -> Float | float:
        """Largest entry of each column (``axis=0``), or of all."""
        return self._edge(np.maximum, axis, initial)

    def _edge(self, extreme: np.ufunc, axis: int | None, initial: float) -> Float | float:
        pixels = extreme.reduce(self._padded, axis=0)
        columns = extreme.reduce(pixels[self._places], axis=0).astype(np.float64)
        return columns if axis == 0 else float(extreme.reduce(columns, initial=initial))
