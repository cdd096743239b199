"""Bound by the nonnegative orthant, which contains every ``(A u)_+``: exact at rank n - 1, valid always."""

from __future__ import annotations

import numpy as np
import scipy.linalg

from convexbn._typing import Float

_EPS = float(np.finfo(np.float64).eps)


def orthant(dual: Float) -> tuple[float, float]:
    """Bound ``max ||V'u||`` over ``u >= 0, ||u|| <= 1``, which contains every ``(A s)_+``.

    Parameters
    ----------
    dual : ndarray (n, K)
        Dual variable on orthonormal rows (weighted: ``V / sqrt(w)``).

    Returns
    -------
    bound, rounding : float
        The bound, and the part of it that covers rounding. One output: ``max(||v_+||, ||v_-||)``, exact.
        K outputs: the smaller of ``sigma_max(V)`` and the Perron bound ``sqrt(lambda_max((V V')_+))``, after rows
        of equal direction were merged; exact when rows of different directions have no positive inner product.

    Notes
    -----
    Exact as a bound of the program when ``rank(C X) = n - 1``, where ``A`` is orthogonal; valid for every
    ``A`` (mathematics, sections 2c and 7).
    """
    rows, slack = _merge_directions(dual) if dual.shape[1] > 1 else (dual, 0.0)
    if dual.shape[1] == 1:
        bound = max(np.linalg.norm(np.maximum(dual, 0)), np.linalg.norm(np.minimum(dual, 0)))
    else:
        scale = float(np.abs(rows).max(initial=0.0)) or 1.0
        gram = (rows / scale) @ (rows / scale).T
        perron = np.sqrt(_largest_eigenvalue(np.maximum(gram, 0)))
        bound = scale * min(perron, np.sqrt(_largest_eigenvalue(gram)))
    rounding = float(bound * 8 * _EPS * (8 + np.log2(len(dual)))) + slack
    return float(bound) + rounding, rounding


def _largest_eigenvalue(matrix: Float) -> float:
    """Largest eigenvalue of a symmetric matrix, rounded upwards by LAPACK's backward error."""
    size = len(matrix)
    top = scipy.linalg.eigvalsh(matrix, subset_by_index=[size - 1, size - 1])[0]
    return float(max(top, 0.0) + 4 * np.sqrt(size) * _EPS * np.linalg.norm(matrix))


def group_directions(rows: Float) -> tuple[np.ndarray, Float]:
    """Group rows of equal direction: group of each row (-1 for zero rows), and unit directions (G, K).

    Directions are equal when they agree to nine decimals.
    """
    norms = np.linalg.norm(rows, axis=1)
    live = norms > 0
    group = np.full(len(rows), -1)
    if not live.any():
        return group, np.zeros((0, rows.shape[1]))
    directions = rows[live] / norms[live][:, None]
    rounded = np.round(directions, 9) + 0.0  # -0.0 and 0.0 are one
    _, first, inverse = np.unique(rounded, axis=0, return_index=True, return_inverse=True)
    group[live] = inverse.ravel()
    return group, directions[first]


def _merge_directions(dual: Float) -> tuple[Float, float]:
    """One row ``||alpha|| d`` for all rows ``alpha_i d``, and the norm of what merging left out.

    For rows ``alpha_i d + e_i`` and ``u >= 0``: ``||V'u|| <= ||(merged)'u'|| + ||E||_F`` with ``||u'|| <= ||u||``.
    """
    group, directions = group_directions(dual)
    live = group >= 0
    if not live.any():
        return np.zeros((1, dual.shape[1])), 0.0
    norms, group = np.linalg.norm(dual[live], axis=1), group[live]
    left_out = dual[live] - norms[:, None] * directions[group]
    totals = np.sqrt(np.bincount(group, norms**2))
    return totals[:, None] * directions, float(np.linalg.norm(left_out)) * (1 + 64 * _EPS)
