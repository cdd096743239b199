"""Rows that are never needed all at once: what reads them gives a kernel, and gets small arrays back.

A *kernel* is a function of one block of rows, ``kernel(block, *along, *shared)``: ``along`` are parts of arrays with a
row for every row (or case), ``shared`` are small arrays, the same for all blocks. It is written against the array
namespace of the block and returns arrays of it. Where the rows are is the matrix's own business: an array in memory
(``DenseRows``), patches and their projections that are made when they are read (``PatchMatrix``, ``ProjectedRows``), or
blocks on a device or on other machines, to which ``shared`` is sent once and from which the results come back.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from convexbn._threads import parallel_map
from convexbn._types import FloatMatrix
from convexbn.data.blocks import BlockSize

Kernel: TypeAlias = Callable[..., Any]

#: Entries of projected patches up to which they are kept.
_KEPT_ENTRIES = 1 << 26


class RowMatrix(Protocol):
    """A matrix (n, q) that is read by blocks of rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, q)``."""

    @property
    def dtype(self) -> Any:
        """Type of the numbers of a block."""

    @property
    def size(self) -> int:
        """``n q``."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: Any) -> FloatMatrix: ...

    def map(
        self,
        kernel: Kernel,
        size: BlockSize,
        *,
        along: Sequence[Any] = (),
        shared: Sequence[Any] = (),
        out: FloatMatrix | None = None,
        parallel: bool = False,
    ) -> FloatMatrix:
        """Results of a kernel, one below the other, on the host.

        Parameters
        ----------
        kernel : callable
            Gives an array with a row for every row of the block, or for every case.
        size : BlockSize
            How much a block may hold.
        along : sequence
            Of arrays with a row for every row, or for every case: ``size.together`` rows.
        shared : sequence
            Of small arrays.
        out : ndarray, optional
            Where the results go.
        parallel : bool, default=False
            Whether blocks are worked on at once, as many as there are threads.
        """

    def reduce(
        self, kernel: Kernel, size: BlockSize, *, along: Sequence[Any] = (), shared: Sequence[Any] = ()
    ) -> tuple[Any, ...]:
        """Sums of the arrays that a kernel gives, over all blocks, on the host.

        Parameters
        ----------
        kernel : callable
            Gives a tuple of arrays, of one shape each for all blocks.
        size, along, shared
            As in ``map``.
        """

    def in_single_precision(self, factor: float = 1.0) -> RowMatrix:
        """The rows times a factor, in float32."""

    def of_cases(self, cases: Any, rows_per_case: int = 1) -> FloatMatrix:
        """The rows of some cases, one below the other."""


#: Rows in memory, or a matrix of them.
Rows: TypeAlias = FloatMatrix | RowMatrix


class HostRows:
    """Base of matrices whose blocks are arrays of numpy: what ``self[slice]`` gives."""

    shape: Any

    def __len__(self) -> int:
        return int(self.shape[0])

    @property
    def size(self) -> int:
        """Entries."""
        return int(self.shape[0] * self.shape[1])

    def map(
        self,
        kernel: Kernel,
        size: BlockSize,
        *,
        along: Sequence[Any] = (),
        shared: Sequence[Any] = (),
        out: FloatMatrix | None = None,
        parallel: bool = False,
    ) -> FloatMatrix:
        """Results of a kernel, one below the other; see ``RowMatrix``."""
        work, parts = self._work(kernel, size, along, shared), size.slices(len(self))
        for part, found in (parallel_map if parallel else map)(work, parts):
            if out is None:
                out = np.empty((len(self) // size.together, *found.shape[1:]), found.dtype)
            out[size.cases(part)] = found
        return np.zeros(0) if out is None else out

    def reduce(
        self, kernel: Kernel, size: BlockSize, *, along: Sequence[Any] = (), shared: Sequence[Any] = ()
    ) -> tuple[Any, ...]:
        """Sums of the arrays that a kernel gives; see ``RowMatrix``."""
        work, total = self._work(kernel, size, along, shared), None
        for _, terms in map(work, size.slices(len(self))):
            total = terms if total is None else tuple(map(operator.iadd, total, terms))
        return total or ()

    def _work(
        self, kernel: Kernel, size: BlockSize, along: Sequence[Any], shared: Sequence[Any]
    ) -> Callable[[slice], tuple[slice, Any]]:
        def work(part: slice) -> tuple[slice, Any]:
            cases = size.cases(part)
            return part, kernel(self[part], *(array[cases] for array in along), *shared)  # type: ignore[index]

        return work


@dataclass(frozen=True, eq=False)
class DenseRows(HostRows):
    """Rows in memory.

    Attributes
    ----------
    array : ndarray (n, q)
        Of any real type.

    Examples
    --------
    >>> rows = DenseRows(np.array([[3.0], [4.0], [5.0]]))
    >>> rows.reduce(lambda block, weights: (weights @ block,), BlockSize(1, 2), along=[np.array([1.0, 2.0, 3.0])])
    (array([26.]),)
    """

    array: FloatMatrix

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, q)``."""
        return self.array.shape

    @property
    def dtype(self) -> Any:
        """Type of the entries."""
        return self.array.dtype

    def __getitem__(self, part: Any) -> FloatMatrix:
        return self.array[part]

    def of_cases(self, cases: Any, rows_per_case: int = 1) -> FloatMatrix:
        """The rows of some cases, of so many consecutive rows each."""
        return self.array.reshape(-1, rows_per_case, self.shape[1])[cases].reshape(-1, self.shape[1])

    def in_single_precision(self, factor: float = 1.0) -> DenseRows:
        """The rows times a factor, in float32."""
        return DenseRows((factor * self.array).astype(np.float32))


@dataclass(frozen=True, eq=False)
class ProjectedRows(HostRows):
    """Rows ``[(X - mean) projection, constant]`` of a matrix ``X``, made when they are read.

    Attributes
    ----------
    X : matrix (n, d)
        Such as ``PatchMatrix``.
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
    def dtype(self) -> Any:
        """Precision in which rows are made."""
        return self.projection.dtype

    def __getitem__(self, part: Any) -> FloatMatrix:
        return self._projected(self.X[part])

    def of_cases(self, cases: Any, rows_per_case: int = 1) -> FloatMatrix:
        """The rows of some cases."""
        return self._projected(self.X.of_cases(cases, rows_per_case))

    def in_single_precision(self, factor: float = 1.0) -> ProjectedRows:
        """The rows times a factor, made in float32."""
        mean, projection = self.mean.astype(np.float32), (factor * self.projection).astype(np.float32)
        return ProjectedRows(self.X, mean, projection, factor * self.constant)

    def _projected(self, block: FloatMatrix) -> FloatMatrix:
        rows = np.empty((len(block), self.shape[1]), dtype=self.dtype)
        centred = block.astype(self.dtype)
        centred -= self.mean
        np.matmul(centred, self.projection, out=rows[:, :-1])
        rows[:, -1] = self.constant
        return rows


def row_matrix(rows: Rows) -> RowMatrix:
    """Rows as a matrix: an array as ``DenseRows``, others as they are."""
    return DenseRows(rows) if isinstance(rows, np.ndarray) else rows


def is_projected(X: Rows, rank: int) -> bool:
    """Whether whitened rows in so many directions are made when they are read, because they would not fit in memory."""
    return not isinstance(X, (np.ndarray, DenseRows)) and len(X) * (rank + 1) > _KEPT_ENTRIES
