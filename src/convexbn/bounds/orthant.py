"""Bound by the nonnegative orthant, which contains every ``(A u)_+``: exact at rank n - 1, valid always."""

from __future__ import annotations

import numpy as np

from convexbn._types import EPS, Float
from convexbn.data.scaling import unit_scale
from convexbn.program.rays import group_directions

_PERRON_ROWS = 2000  # different directions up to which the Perron bound is computed: its matrix is square in them


def orthant(dual: Float) -> tuple[float, float]:
    """Bound ``max ||V'u||`` over ``u >= 0, ||u|| <= 1``; returned with the part of the bound that covers rounding.

    One output: ``max(||v_+||, ||v_-||)``, exact. K outputs: the smaller of ``sigma_max(V)`` and the Perron bound
    ``sqrt(lambda_max((V V')_+))``, after rows of equal direction were merged; exact if rows of different directions
    have no positive inner product.

    Parameters
    ----------
    dual : ndarray (n, K)
        Dual variable on orthonormal rows (weighted: ``V / sqrt(w)``).

    Notes
    -----
    Exact as a bound of the program if ``rank(C X) = n - 1``, where ``A`` is orthogonal; valid for every ``A``
    (mathematics, sections 2c and 7).
    """
    scale = unit_scale(dual)
    V = dual / scale
    if V.shape[1] == 1:
        bound, slack = max(np.linalg.norm(np.maximum(V, 0)), np.linalg.norm(np.minimum(V, 0))), 0.0
    else:
        rows, slack = _merge_directions(V)
        square = np.linalg.eigvalsh(rows.T @ rows)[-1]
        if len(rows) <= _PERRON_ROWS:
            square = min(square, np.linalg.eigvalsh(np.maximum(rows @ rows.T, 0))[-1])
        bound = np.sqrt(max(square, 0.0))
        slack += 4 * np.sqrt(len(rows)) * EPS * float(bound)  # LAPACK's backward error in the eigenvalue
    rounding = float(bound) * EPS * (32 + len(V)) + slack  # sums of n squares
    return (float(bound) + rounding) * scale, rounding * scale


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
    return totals[:, None] * directions, float(np.linalg.norm(left_out)) * (1 + 64 * EPS)
