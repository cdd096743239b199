"""Exact maximum of ``||V'(A u)_+||`` in rank one and two, by enumeration of the arcs between breakpoints."""

from __future__ import annotations

import numpy as np

from convexbn._types import EPS, Float
from convexbn.bounds.local_search import hidden_norms

_BLOCK = 512


def plane(V: Float, A: Float) -> tuple[float, float, Float, int]:
    """Maximum over the unit circle (or over the two signs at ``q = 1``) for ``V`` (n, K) with entries of order one.

    On the arc between two breakpoints ``V'(A u)_+ = W u`` is linear, and ``||W u||`` is largest at an end or at a
    leading eigenvector of ``W'W`` on the arc.

    Returns the maximum rounded upwards, by how much, a unit vector (q,) that attains it up to rounding, and the number
    of arcs.
    """
    if A.shape[1] == 1:
        candidates = np.array([[1.0], [-1.0]])
    else:
        angles = _candidates(V, A)
        candidates = np.column_stack([np.cos(angles), np.sin(angles)])
    values = np.concatenate([hidden_norms(block, V, A) for block in _blocks(candidates)])
    top = int(values.argmax())
    rounding = EPS * (64 + 2 * len(A)) * float(np.linalg.norm(V))
    return float(values[top]) + rounding, rounding, candidates[top], max(len(candidates) // 2, 1)


def _candidates(V: Float, A: Float) -> Float:
    """Angles of the ends of the arcs, and on each arc the point nearest to a maximiser of its quadratic form."""
    rows = A[np.linalg.norm(A, axis=1) > 0]
    normal = np.arctan2(rows[:, 1], rows[:, 0]) + np.pi / 2
    ends = np.unique(np.mod(np.concatenate([normal, normal + np.pi]), 2 * np.pi))
    lengths = np.diff(ends, append=ends[0] + 2 * np.pi)
    products = (V[:, :, None] * A[:, None, :]).reshape(len(A), -1)
    peaks = [_peaks(middles, products, A) for middles in _blocks(ends + lengths / 2)]
    # two opposite maximisers: the first at or after the start of the arc, if it comes before the end
    offset = np.mod(np.concatenate(peaks) - ends, np.pi)
    return np.concatenate([ends, ends + np.minimum(offset, lengths)])


def _peaks(middles: Float, products: Float, A: Float) -> Float:
    """Angles of the leading eigenvectors of ``W'W`` on the arcs with these middles."""
    directions = np.column_stack([np.cos(middles), np.sin(middles)])
    W = ((directions @ A.T > 0) @ products).reshape(len(middles), -1, 2)
    S = np.einsum("bki,bkj->bij", W, W)
    return 0.5 * np.arctan2(2 * S[:, 0, 1], S[:, 0, 0] - S[:, 1, 1])


def _blocks(rows: Float) -> list[Float]:
    return np.array_split(rows, range(_BLOCK, len(rows), _BLOCK))
