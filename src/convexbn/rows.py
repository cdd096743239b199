"""Rows in a canonical order, equal rows merged: sample weights and repetition become the same arrays.

After merging, a fit does not depend on the order of the rows, on how a row is repeated, or on rows of
weight zero, bit for bit.
"""

from __future__ import annotations

import hashlib

import numpy as np

from convexbn._typing import Float, FloatMatrix, Index

#: Rows hashed at once.
_BLOCK = 4096


def equal_rows(keys: FloatMatrix, ties: Float | None = None) -> tuple[Index, Index]:
    """Order that brings equal rows together, and where each run of equal rows starts in it.

    The order depends on the values of the rows (and of ``ties`` within a run) alone. Rows are sorted by a 64-bit
    hash and compared exactly.

    Examples
    --------
    >>> order, starts = equal_rows(np.array([[1.0], [2.0], [1.0]]))
    >>> len(starts), sorted(len(run) for run in np.split(order, starts[1:]))
    (2, [1, 2])
    """
    hashes = _row_hashes(keys)
    order = np.argsort(hashes, kind="stable") if ties is None else np.lexsort((ties, hashes))
    ordered = keys[order]
    changed = (ordered[1:] != ordered[:-1]).any(axis=1)
    return order, np.concatenate([[0], np.flatnonzero(changed) + 1])


def canonical_rows(X: FloatMatrix, Y: Float, sample_weight: Float) -> tuple[FloatMatrix, Float, Float]:
    """Rows of positive weight in canonical order, identical ``(x, y)`` rows merged into weighted ones."""
    kept = sample_weight > 0
    if not kept.all():
        X, Y, sample_weight = X[kept], Y[kept], sample_weight[kept]
    X, Y = X + 0.0, Y + 0.0  # -0.0 and 0.0 are one value
    order, starts = equal_rows(np.hstack([X, Y]), sample_weight)
    first = order[starts]
    return X[first], Y[first], np.add.reduceat(sample_weight[order], starts)


def distinct_rows(X: FloatMatrix) -> tuple[FloatMatrix, Index]:
    """Distinct rows of ``X``, and for every row its place among them."""
    order, starts = equal_rows(X)
    place = np.zeros(len(X), dtype=np.intp)
    place[order] = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(X))))
    return X[order[starts]], place


def fingerprint(X: FloatMatrix, Y: Float, sample_weight: Float) -> str:
    """SHA-256 of canonical rows: equal for equal data in whatever order or repetition."""
    digest = hashlib.sha256(repr((X.shape, Y.shape)).encode())
    for array in (X, Y, sample_weight):
        digest.update(np.ascontiguousarray(array, dtype="<f8").data)
    return digest.hexdigest()


def _row_hashes(keys: FloatMatrix) -> np.ndarray:
    """One 64-bit hash a row, exact integer arithmetic: independent of order, blocks and threads."""
    bits = np.ascontiguousarray(keys, dtype=np.float64).view(np.uint64)
    odd = np.random.default_rng(0).integers(1 << 63, size=bits.shape[1], dtype=np.uint64) * 2 + 1
    hashes = np.empty(len(bits), dtype=np.uint64)
    for start in range(0, len(bits), _BLOCK):
        block = bits[start : start + _BLOCK]
        mixed = (block ^ (block >> np.uint64(32))) * odd
        mixed ^= mixed >> np.uint64(29)
        hashes[start : start + _BLOCK] = mixed.sum(axis=1, dtype=np.uint64)
    return hashes
