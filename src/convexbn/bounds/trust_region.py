"""Maximum of a quadratic over the unit ball by its secular dual, rigorous at any multiplier.

For symmetric Q and ``lambda > max(lambda_max(Q), 0)``, with ``G = lambda I - Q``,

    max over ||u|| <= 1 of l'u + u'Q u <= lambda + l'G^{-1}l / 4,

with equality at the minimising lambda. Smoothed by ``-eps log det(G) - eps log(lambda)`` the minimum is a smooth
function of l and Q, with derivatives the moments ``u = G^{-1} l / 2`` and ``U = u u' + eps G^{-1}``.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from convexbn._types import EPS, Float


def smoothed_maximum(linear: Float, Q: Float, eps: float) -> tuple[float, Float, Float]:
    """Smoothed maximum of ``l'u + u'Q u`` over the unit ball, and its derivatives ``u`` by l and ``U`` by Q.

    Parameters
    ----------
    linear, Q, eps : ndarray (q,), ndarray (q, q), float
    """
    values, basis = scipy.linalg.eigh(Q, check_finite=False)
    rotated = basis.T @ linear
    largest = max(float(values[-1]), 0.0)
    below = largest - values
    distance = _secular_root(rotated, below, largest, eps)
    gaps = distance + below
    u = basis @ (0.5 * rotated / gaps)
    value = largest + distance + 0.25 * float(rotated**2 @ (1 / gaps))
    value -= eps * float(np.log(gaps).sum() + np.log(largest + distance))
    return value, u, np.outer(u, u) + eps * (basis / gaps) @ basis.T


def maximum(linear: Float, Q: Float) -> float:
    """Upper bound of ``l'u + u'Q u`` over the unit ball, equal to the maximum up to rounding and never below it."""
    values, basis = scipy.linalg.eigh(Q)
    rotated = basis.T @ linear
    size = float(np.abs(values).max()) + float(np.linalg.norm(linear))
    error = 16 * len(values) * EPS * size  # of the eigenvalues, by LAPACK's backward error
    largest = max(float(values[-1]), 0.0)
    below = largest - values
    distance = _secular_root(rotated, below, largest, 0.0)
    value = largest + distance + error + 0.25 * float(rotated**2 @ (1 / (distance + below)))
    return value + error


def _secular_root(rotated: Float, below: Float, largest: float, eps: float) -> float:
    """Root d of ``1 - sum r^2 / (4 (d + b)^2) - eps sum 1 / (d + b) - eps / (d + largest)``, approached from the left.

    The function is increasing and concave, so that Newton's method is monotone from a point where it is negative.
    """
    tiny = EPS * (largest + float(np.abs(rotated).max(initial=0.0)) + float(below.max(initial=0.0))) + 1e-90
    distance = max(float((0.5 * np.abs(rotated) - below).max()), eps, tiny)
    for _ in range(60):
        inverse = 1 / (distance + below)
        extra = eps / (distance + largest)
        value = 1 - 0.25 * (rotated**2 @ inverse**2) - eps * inverse.sum() - extra
        if value >= -1e-12:
            break
        slope = 0.5 * (rotated**2 @ inverse**3) + eps * (inverse**2).sum() + extra / (distance + largest)
        distance -= value / slope
    return float(distance)
