"""Rows in a canonical order, equal rows merged: sample weights and repetition become the same arrays.

After merging, a fit does not depend on the order of the rows, on how a row is repeated, or on rows of weight zero, bit
for bit.
"""

from __future__ import annotations

import hashlib

import numpy as np

from convexbn._types import Float, FloatMatrix, Index
from convexbn.data.blocks import BlockSize

#: Rows that are read at once, and entries that are hashed at once: 1 MB, which stays in the cache.
_BLOCK, _HASHED_ENTRIES = 4096, 1 << 17


def equal_rows(*keys: FloatMatrix, ties: Float | None = None) -> tuple[Index, Index]:
    """Order that brings equal rows together, and the start of each run of equal rows in it.

    Rows are sorted by a 64-bit hash and compared exactly. The order depends on the values of all ``keys`` alone, not on
    their types; within a run it is that of ``ties``.

    Examples
    --------
    >>> order, starts = equal_rows(np.array([[1.0], [2.0], [1.0]]))
    >>> len(starts), sorted(len(run) for run in np.split(order, starts[1:]))
    (2, [1, 2])
    """
    hashes = _row_hashes(*keys)
    order = np.argsort(hashes, kind="stable") if ties is None else np.lexsort((ties, hashes))
    changed = np.ones(len(order), dtype=bool)
    alike = 1 + np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    for part in BlockSize(1, _BLOCK).slices(len(alike)):
        places = alike[part]
        here, before = order[places], order[places - 1]
        changed[places] = np.any([(key[here] != key[before]).any(axis=1) for key in keys], axis=0)
    return order, np.flatnonzero(changed)


def canonical_rows(X: FloatMatrix, Y: Float, sample_weight: Float) -> tuple[FloatMatrix, Float, Float]:
    """Rows of positive weight in canonical order, equal ``(x, y)`` rows merged into one of their total weight.

    The order is that of hashes of ``x``, so that a shift of the targets moves no row.

    Parameters
    ----------
    X : ndarray (n, d)
        Of any real type, which is kept.
    Y, sample_weight : ndarray (n, K), (n,)
    """
    kept = sample_weight > 0
    if not kept.all():
        X, Y, sample_weight = X[kept], Y[kept], sample_weight[kept]
    X, Y = (array + array.dtype.type(0) if array.dtype.kind == "f" else array for array in (X, Y))  # -0.0 becomes 0.0
    order, starts = equal_rows(X, Y, ties=sample_weight)
    place = np.argsort(_row_hashes(X)[order[starts]], kind="stable")
    first, weights = order[starts][place], np.add.reduceat(sample_weight[order], starts)
    return X[first], Y[first], weights[place]


def distinct_rows(X: FloatMatrix) -> tuple[FloatMatrix, Index]:
    """Distinct rows of ``X``, and for every row its place among them."""
    order, starts = equal_rows(X)
    place = np.zeros(len(X), dtype=np.intp)
    place[order] = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(X)))
    return X[order[starts]], place


def fingerprint(X: FloatMatrix, Y: Float, sample_weight: Float) -> str:
    """SHA-256 of canonical rows: equal for equal data, whatever their order, repetition or type.

    Parameters
    ----------
    X, Y, sample_weight : ndarray (n, d), (n, K), (n,)
        As ``canonical_rows`` returns them.
    """
    digest = hashlib.sha256(repr((X.shape, Y.shape)).encode())
    order = np.argsort(_row_hashes(X, Y), kind="stable")
    for array in (X, Y, sample_weight):
        for part in BlockSize(1, _BLOCK).slices(len(array)):
            digest.update(np.ascontiguousarray(array[order[part]], dtype="<f8").data)
    return digest.hexdigest()


def _row_hashes(*keys: FloatMatrix) -> np.ndarray:
    """64-bit hashes of rows in exact integer arithmetic: independent of order, blocks, threads and types."""
    width, n = sum(key.shape[1] for key in keys), len(keys[0])
    odd = np.random.default_rng(0).integers(1 << 63, size=width, dtype=np.uint64) * 2 + 1
    hashes = np.empty(n, dtype=np.uint64)
    for part in BlockSize(width, _HASHED_ENTRIES).slices(n):
        mixed = np.hstack([np.asarray(key[part], dtype=np.float64) for key in keys]).view(np.uint64)
        mixed ^= mixed >> np.uint64(32)
        mixed *= odd
        mixed ^= mixed >> np.uint64(29)
        hashes[part] = mixed.sum(axis=1, dtype=np.uint64)
    return hashes
