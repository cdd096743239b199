"""Means and Gram matrix of many rows, read in blocks: memory is that of a block and of some d x d matrices.

Rows are centred near their mean while they are read, so that an offset costs no digits. Rows of one-byte integers are
multiplied in float32, twice as fast as in float64, and *exactly*: while the diagonal of a block's Gram matrix stays
below 2^24, all its partial sums are integers that float32 holds. For few columns, as of patches, the exact matrix is
kept in extended precision, if the machine has it: a product with it then replaces another pass over the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from scipy.linalg import blas

from convexbn._threads import single_scipy_blas
from convexbn._types import EPS, Bool, Float, FloatMatrix
from convexbn.data.blocks import BlockSize
from convexbn.data.kernels import scaled, weighted_gram
from convexbn.data.row_matrix import HostRows, Rows, row_matrix
from convexbn.data.scaling import powers

#: Bytes of a block of rows in float64. It stays in the cache while it is centred and multiplied; 64 MB took up to six
#: times as long.
BLOCK_BYTES = 1 << 22
#: Integers up to this, and sums of them, are exact in float32.
_EXACT = 2.0**24
#: Columns up to which an exact Gram matrix is kept, and its precision.
_FEW_COLUMNS = 600
_EXTENDED = np.longdouble if np.finfo(np.longdouble).eps < 1e-18 else None
#: Entries of one-byte integers that are multiplied at a time, and the fewest rows.
_INTEGER_ENTRIES, _INTEGER_ROWS = 1 << 18, 1024
#: Columns up to which threads of SciPy's BLAS cost more than they gain.
_NARROW = 256


@dataclass(frozen=True)
class Moments:
    """Weighted ``mean`` (d,) of columns, and ``gram`` (d, d), ``sum_i w_i (x_i - mean)(x_i - mean)'``.

    ``gram`` holds to rounding relative to its diagonal. Units are ``2^exponents`` (d,), in which floats lie in [-1, 1],
    and 1 for one-byte integers. A column ``varies`` if it holds two different values. ``exact`` is the Gram matrix in
    longdouble, rounded once, of few columns of one-byte integers of weight 1.
    """

    mean: Float
    gram: Float
    varies: Bool
    exponents: np.ndarray
    exact: np.ndarray | None = None


def moments(X: FloatMatrix, weights: Float) -> Moments:
    """Moments of rows (n, d) of any real type with positive weights (n,).

    Examples
    --------
    >>> found = moments(np.array([[0], [4], [8]], dtype=np.uint8), np.ones(3))
    >>> found.mean, found.gram
    (array([4.]), array([[32.]]))
    """
    low, high = (np.asarray(edge, dtype=np.float64) for edge in (X.min(axis=0), X.max(axis=0)))
    integers = X.dtype.kind in "iub" and X.dtype.itemsize == 1 and weights.min() >= 1
    exponents = np.zeros(len(low), dtype=int) if integers else np.frexp(np.maximum(np.abs(low), np.abs(high)))[1]
    read, total = _read_integers if integers else _read_floats, float(weights.sum())
    part, first = next(blocks(X))
    centre = weights[part] @ np.ldexp(first, -exponents) / weights[part].sum()
    while True:
        centre = np.rint(centre) if integers else centre
        gram, sums = read(X, weights, centre, exponents)
        shift, exact = sums / total, None
        if integers and _EXTENDED is not None and len(gram) <= _FEW_COLUMNS and weights.max() == 1:
            exact = gram - np.outer(sums.astype(_EXTENDED), sums.astype(_EXTENDED)) / _EXTENDED(total)
        gram -= np.outer(sums, shift)
        # a centre farther from the mean than the deviation costs digits: sorted rows are read again
        near = shift**2 <= np.maximum(gram.diagonal(), 0) / total + (8 * EPS * centre) ** 2
        if integers or near.all():
            return Moments(centre + shift, gram, low < high, exponents, exact)
        centre = centre + shift


def cached_rows(X: Rows) -> BlockSize:
    """Size of blocks that stay in the cache in float64: ``BLOCK_BYTES``."""
    return BlockSize(X.shape[1], BLOCK_BYTES // 8, least=64)


def blocks(X: Rows) -> Iterator[tuple[slice, Float]]:
    """Slices of rows, and these rows in float64."""
    return ((part, np.asarray(X[part], dtype=np.float64)) for part in cached_rows(X).slices(len(X)))


def weighted_sums(parts: Iterable[tuple[Float, Float]], size: int) -> tuple[Float, Float]:
    """``sum w x x'`` (size, size) and ``sum w x`` (size,) over parts of weights and rows, in float64.

    BLAS adds up one triangle, in place. NumPy's product makes both and copies one to the other, which takes longer than
    the product on few rows of 3,072 columns.
    """
    gram, sums = np.zeros((size, size), order="F"), np.zeros(size)
    with single_scipy_blas() if size <= _NARROW else nullcontext():
        for weights, rows in parts if size else ():  # BLAS takes no matrix without columns
            root = np.sqrt(weights)
            scaled = rows * root[:, None]
            sums += np.einsum("n,nd->d", root, scaled)  # threads of two BLAS would wait for each other
            gram = blas.dsyrk(1.0, scaled.T, beta=1.0, c=gram, overwrite_c=1)
    gram += np.triu(gram, 1).T
    return gram, sums


def _read_floats(X: FloatMatrix, weights: Float, centre: Float, exponents: np.ndarray) -> tuple[Float, Float]:
    """``sum w (x - c)(x - c)'`` and ``sum w (x - c)`` in float64."""
    rows, factors = row_matrix(X), powers(-exponents)
    if not isinstance(rows, HostRows):
        return rows.reduce(weighted_gram, cached_rows(X), along=[weights], shared=[centre, *factors])
    centred = ((weights[part], scaled(block, np.float64, *factors) - centre) for part, block in blocks(X))
    return weighted_sums(centred, X.shape[1])


def _read_integers(X: FloatMatrix, weights: Float, centre: Float, exponents: np.ndarray) -> tuple[Float, Float]:
    """``sum w (x - c)(x - c)'`` and ``sum w (x - c)``, exact for weights of 1; the excess over 1 is added in float64.

    A block has as many rows as float32 adds up without rounding: the diagonal of the product tells.
    """
    gram, sums, middle = np.zeros((X.shape[1],) * 2, order="F"), np.zeros(X.shape[1]), centre.astype(np.float32)
    start, size = 0, max(_INTEGER_ROWS, _INTEGER_ENTRIES // X.shape[1])
    while start < len(X):
        rows = X[start : start + size].astype(np.float32)
        rows -= middle
        product = blas.ssyrk(1.0, rows.T)
        if product.diagonal().max() >= _EXACT:
            size //= 2
            continue
        gram += product
        sums += rows.sum(axis=0)
        start += size
    gram += np.triu(gram, 1).T
    if (heavy := weights > 1).any():
        more, more_sums = _read_floats(X[heavy], weights[heavy] - 1, centre, exponents)
        gram, sums = gram + more, sums + more_sums
    return gram, sums
