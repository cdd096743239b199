"""Linear maps of rows that are too many to keep, made when they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from convexbn._types import FloatMatrix

#: Entries of mapped patches up to which they are kept.
_KEPT_ENTRIES = 1 << 26


@dataclass(frozen=True, eq=False)
class MappedRows:
    """Rows ``[(X - mean) projection, constant]`` of a matrix ``X``.

    Attributes
    ----------
    X : matrix (n, d)
        With ``rows_together`` and ``of_images``, such as ``PatchMatrix``.
    mean : ndarray (d,)
    projection : ndarray (d, r)
        Of float64 or float32, as the rows are to be.
    constant : float
    """

    X: Any
    mean: FloatMatrix
    projection: FloatMatrix
    constant: float

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, r + 1)``."""
        return len(self.X), self.projection.shape[1] + 1

    @property
    def size(self) -> int:
        """Entries."""
        return self.shape[0] * self.shape[1]

    def __len__(self) -> int:
        return len(self.X)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Precision in which rows are made."""
        return self.projection.dtype

    def __getitem__(self, part: slice) -> FloatMatrix:
        return self._mapped(self.X[part])

    def of_images(self, index: Any) -> FloatMatrix:
        """The rows of some images."""
        return self._mapped(self.X.of_images(index))

    def in_single_precision(self, factor: float = 1.0) -> MappedRows:
        """The rows times a factor, in float32."""
        mean, projection = self.mean.astype(np.float32), (factor * self.projection).astype(np.float32)
        return MappedRows(self.X, mean, projection, factor * self.constant)

    def _mapped(self, block: FloatMatrix) -> FloatMatrix:
        rows = np.empty((len(block), self.shape[1]), dtype=self.dtype)
        centred = block.astype(self.dtype)
        centred -= self.mean
        np.matmul(centred, self.projection, out=rows[:, :-1])
        rows[:, -1] = self.constant
        return rows


def is_mapped(X: Any, rank: int) -> bool:
    """Whether rows in so many directions are made when they are read: of patches, where they would be too many."""
    return hasattr(X, "of_images") and len(X) * (rank + 1) > _KEPT_ENTRIES
