"""The seam for back ends: rows that are never needed all at once. A reader gives a kernel and gets small arrays back.

A *kernel* is a function of one block of rows, ``kernel(block, *along, *shared)``. ``along`` are the block's parts of
arrays with an entry for every row (or case); ``shared`` are small arrays and settings, equal for all blocks. It is
written against the array namespace of its arguments and returns arrays of it. The matrix decides where its rows are: in
memory (``DenseRows``), computed lazily (``PatchMatrix``, ``ProjectedRows``), or in blocks on a device or on other
machines, to which ``shared`` is sent once and from which the results come back.
"""

# ruff: noqa: D102  (``RowMatrix`` documents the methods)

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

#: Entries of projected patches up to which they are kept in memory.
_KEPT_ENTRIES = 1 << 26


class RowMatrix(Protocol):
    """Matrix (n, q) that is read by blocks of rows.

    A back end needs ``shape``, ``dtype``, ``size``, ``len``, ``map`` and ``reduce``; features that gates or the
    whitening read also need ``min`` and ``max`` with numpy's ``axis`` and ``initial``. The other methods serve solvers
    that take rows to the host or in mini-batches. Arguments and results are on the host, in NumPy: a back end moves the
    arrays of ``along`` and ``shared`` (those of a ``Loss`` too), calls the kernel, and brings its results back.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, q)``."""

    @property
    def dtype(self) -> Any:
        """NumPy type of the entries."""

    @property
    def size(self) -> int:
        """Number of entries, ``n q``."""
        return int(self.shape[0] * self.shape[1])

    def __len__(self) -> int:
        return int(self.shape[0])

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
        """Results of a kernel, one below the other in the order of the rows.

        Parameters
        ----------
        kernel : callable
            Returns an array with a row for every row of the block, or for every case.
        size : BlockSize
            Rows of a block, as advice; only the ``together`` rows of a case must stay in one block.
        along : sequence of ndarray or Loss
            With an entry for every row, or for every case; a block gets ``array[size.cases(part)]``.
        shared : sequence
            Small arrays and settings, passed to every block.
        out : ndarray, optional
            Where the results are written, and what is returned.
        parallel : bool, default=False
            Whether several blocks may be worked on at once, in threads of the host.
        """

    def reduce(
        self, kernel: Kernel, size: BlockSize, *, along: Sequence[Any] = (), shared: Sequence[Any] = ()
    ) -> tuple[Any, ...]:
        """Sums over all blocks of the arrays that a kernel returns; the order of the sums is free.

        Parameters
        ----------
        kernel : callable
            Returns a tuple of arrays or numbers, whose shapes do not depend on the block.
        size, along, shared
            As in ``map``.
        """

    def in_single_precision(self, factor: float = 1.0) -> RowMatrix:
        """The rows times a factor, in float32."""

    def of_cases(self, cases: Any, rows_per_case: int = 1) -> FloatMatrix:
        """Rows of some cases, one case below the other; a case has ``rows_per_case`` consecutive rows."""


#: Rows in memory, or a matrix of them.
Rows: TypeAlias = FloatMatrix | RowMatrix


class HostRows(RowMatrix):
    """Base of matrices whose blocks ``self[slice]`` are NumPy arrays: sums are in the order of the blocks."""

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
        def work(part: slice) -> tuple[slice, FloatMatrix]:
            return size.cases(part), kernel(*self._block(part, size, along), *shared)

        for cases, found in (parallel_map if parallel else map)(work, size.slices(len(self))):
            out = np.empty((len(self) // size.together, *found.shape[1:]), found.dtype) if out is None else out
            out[cases] = found
        return np.zeros(0) if out is None else out

    def reduce(
        self, kernel: Kernel, size: BlockSize, *, along: Sequence[Any] = (), shared: Sequence[Any] = ()
    ) -> tuple[Any, ...]:
        total: tuple[Any, ...] = ()
        for part in size.slices(len(self)):
            terms = kernel(*self._block(part, size, along), *shared)
            total = tuple(map(operator.iadd, total, terms)) if total else terms
        return total

    def _block(self, part: slice, size: BlockSize, along: Sequence[Any]) -> list[Any]:
        """Rows of a slice, and their parts of the arrays with an entry for every row or case."""
        cases = size.cases(part)
        return [self[part], *[array[cases] for array in along]]

    def in_single_precision(self, factor: float = 1.0) -> RowMatrix:
        return DenseRows((factor * self[:]).astype(np.float32))


@dataclass(frozen=True, eq=False)
class DenseRows(HostRows):
    """Rows of an array (n, q) of any real type, in memory.

    Examples
    --------
    >>> rows = DenseRows(np.array([[3.0], [4.0], [5.0]]))
    >>> rows.reduce(lambda block, weights: (weights @ block,), BlockSize(1, 2), along=[np.array([1.0, 2.0, 3.0])])
    (array([26.]),)
    """

    array: FloatMatrix

    @property
    def shape(self) -> tuple[int, int]:
        return self.array.shape

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, part: Any) -> FloatMatrix:
        return self.array[part]

    def of_cases(self, cases: Any, rows_per_case: int = 1) -> FloatMatrix:
        return self.array.reshape(-1, rows_per_case, self.shape[1])[cases].reshape(-1, self.shape[1])


@dataclass(frozen=True, eq=False)
class ProjectedRows(HostRows):
    """Rows ``[(X - mean) projection, constant]`` of a matrix ``X``: computed lazily, as precise as ``projection``."""

    X: Any
    mean: FloatMatrix
    projection: FloatMatrix
    constant: float

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.X), self.projection.shape[1] + 1

    @property
    def dtype(self) -> Any:
        return self.projection.dtype

    def __getitem__(self, part: Any) -> FloatMatrix:
        return self._project(self.X[part])

    def of_cases(self, cases: Any, rows_per_case: int = 1) -> FloatMatrix:
        return self._project(self.X.of_cases(cases, rows_per_case))

    def in_single_precision(self, factor: float = 1.0) -> ProjectedRows:
        mean, projection = self.mean.astype(np.float32), (factor * self.projection).astype(np.float32)
        return ProjectedRows(self.X, mean, projection, factor * self.constant)

    def _project(self, block: FloatMatrix) -> FloatMatrix:
        rows = np.empty((len(block), self.shape[1]), dtype=self.dtype)
        centred = block.astype(self.dtype)
        centred -= self.mean
        np.matmul(centred, self.projection, out=rows[:, :-1])
        rows[:, -1] = self.constant
        return rows


def row_matrix(rows: Rows) -> RowMatrix:
    """Rows as a matrix: arrays become ``DenseRows``, others are returned as they are."""
    return DenseRows(rows) if isinstance(rows, np.ndarray) else rows


def is_projected(X: Rows, rank: int) -> bool:
    """Whether whitened rows in ``rank`` directions are computed lazily because they would not fit in memory."""
    return not isinstance(X, (np.ndarray, DenseRows)) and len(X) * (rank + 1) > _KEPT_ENTRIES
