"""Gates as directions of the whitened rows: the nearest ones, and whether any realises the pattern.

A pattern ``D`` is realised when some ``u`` has ``(2 D - I) A u > 0``: a neuron on the whitened data opens on exactly
those rows. Gates on the raw features are directions of the whitened rows while these keep every direction of the data,
and need not be where ``rank`` leaves some out.
"""

from __future__ import annotations

import numpy as np

from convexbn._types import EPS, Bool, Float, FloatMatrix
from convexbn.data.scaling import centre
from convexbn.data.whitening import Whitening


def nearest_directions(X: FloatMatrix, whitening: Whitening, weights: Float, gates: Float, offsets: Float) -> Float:
    """Least-squares ``u`` of ``A u = (X - mean)'g + b`` for every gate (d, P), (P,): (q, P), up to a positive factor.

    A gate ``u`` has the direction ``projection @ u[:-1]`` on the raw features and the offset
    ``u[-1] / sqrt(total_weight)``.
    """
    centred, exponent = centre(X, whitening.mean)
    peaks = np.maximum(np.abs(gates).max(axis=0), np.abs(offsets))
    scale = np.where(peaks > 0, peaks, 1.0)
    responses = centred @ (gates / scale) + np.ldexp(offsets / scale, -exponent)
    return whitening.coordinates(responses, weights)


def realised(rows: Float, opened: Bool, directions: Float) -> Bool:
    """Which patterns (n, P) some direction realises; the directions (q, P) are tried first.

    What they do not settle is decided by the nonnegative least squares ``min ||G'v||^2 + (1'v - 1)^2`` with unit rows
    ``G``: either ``G'v = 0``, which no direction survives (Gordan), or ``G'v`` is the direction of the widest margin.

    Examples
    --------
    Of three rows on a line the one in the middle is not open alone:

    >>> rows, opened = np.array([[-1.0, 1], [0, 1], [1, 1]]), np.array([[1, 0], [0, 1], [0, 0]], dtype=bool)
    >>> realised(rows, opened, np.zeros((2, 2)))
    array([ True, False])
    """
    unit = rows / np.linalg.norm(rows, axis=1)[:, None]
    settled = _opens_exactly(unit, opened, _off_the_rows(rows, opened, directions))
    for j in np.flatnonzero(~settled):
        margin = _widest_margin(unit * np.where(opened[:, j], 1.0, -1.0)[:, None])
        settled[j] = _opens_exactly(unit, opened[:, [j]], margin[:, None])[0]
    return settled


def _off_the_rows(rows: Float, opened: Bool, directions: Float) -> Float:
    """Directions moved along the constant, so that rows on their hyperplanes, which are open, are inside."""
    room = np.where(opened, np.inf, -(rows @ directions)).min(axis=0)
    moved = directions.copy()
    moved[-1] += np.where(np.isfinite(room), 0.5 * room, np.linalg.norm(directions, axis=0)) / rows[0, -1]
    return moved


def _opens_exactly(unit: Float, opened: Bool, directions: Float) -> Bool:
    """Whether the directions open on the patterns by more than rounding."""
    images = np.where(opened, 1.0, -1.0) * (unit @ directions)
    return images.min(axis=0) > 8 * EPS * np.linalg.norm(directions, axis=0)


def _widest_margin(signed: Float) -> Float:
    """Direction of the widest margin to the rows of ``G``, or rounding where there is none."""
    from scipy.optimize import nnls

    n, q = signed.shape
    multipliers, _ = nnls(np.vstack([signed.T, np.ones(n)]), np.eye(q + 1)[-1])
    return multipliers @ signed
