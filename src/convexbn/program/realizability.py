"""Gates as directions of the whitened rows: the nearest direction, and whether any direction realises the pattern.

A direction ``u`` realises a pattern ``D`` if ``(2 D - I) A u > 0``: a neuron on the whitened data then opens on exactly
those rows. Gates on the raw features are directions of the whitened rows if these keep every direction of the data,
and need not be if ``rank`` leaves some out.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls

from convexbn._types import EPS, Bool, Float, FloatMatrix
from convexbn.data.scaling import centre
from convexbn.data.whitening import Whitening


def nearest_directions(X: FloatMatrix, whitening: Whitening, weights: Float, gates: Float, offsets: Float) -> Float:
    """Least-squares ``u`` of ``A u = (X - mean)'g + b`` for every gate, up to a positive factor: (q, P).

    Such a gate has the direction ``projection @ u[:-1]`` on the raw features and the offset
    ``u[-1] / sqrt(total_weight)``.

    Parameters
    ----------
    X, whitening, weights : ndarray (n, d), Whitening, ndarray (n,)
    gates, offsets : ndarray (d, P), (P,)
    """
    centred, exponent = centre(X, whitening.mean)
    peaks = np.maximum(np.abs(gates).max(axis=0), np.abs(offsets))
    scale = np.where(peaks > 0, peaks, 1.0)
    responses = centred @ (gates / scale) + np.ldexp(offsets / scale, -exponent)
    return whitening.coordinates(responses, weights)


def are_realizable(rows: Float, opened: Bool, directions: Float) -> Bool:
    """Whether some direction realises each pattern: (P,).

    The given directions are tried first. The nonnegative least squares ``min ||G'v||^2 + (1'v - 1)^2`` with unit rows
    ``G`` settles the rest: ``G'v`` is the direction of the widest margin, or 0 if there is no direction (Gordan).

    Parameters
    ----------
    rows, opened, directions : ndarray (n, q), (n, P), (q, P)

    Examples
    --------
    Of three rows on a line the one in the middle is not open alone:

    >>> rows, opened = np.array([[-1.0, 1], [0, 1], [1, 1]]), np.array([[1, 0], [0, 1], [0, 0]], dtype=bool)
    >>> are_realizable(rows, opened, np.zeros((2, 2)))
    array([ True, False])
    """
    unit, (n, q) = rows / np.linalg.norm(rows, axis=1)[:, None], rows.shape
    # a move along the constant takes rows on their hyperplanes, which are open, inside
    room = np.where(opened, np.inf, -(rows @ directions)).min(axis=0)
    moved = directions.copy()
    moved[-1] += np.where(np.isfinite(room), 0.5 * room, np.linalg.norm(directions, axis=0)) / rows[0, -1]
    settled = _opens_exactly(unit, opened, moved)
    for j in np.flatnonzero(~settled):
        signed = unit * np.where(opened[:, j], 1.0, -1.0)[:, None]
        multipliers, _ = nnls(np.vstack([signed.T, np.ones(n)]), np.eye(q + 1)[-1])
        settled[j] = _opens_exactly(unit, opened[:, [j]], (multipliers @ signed)[:, None])[0]
    return settled


def _opens_exactly(unit: Float, opened: Bool, directions: Float) -> Bool:
    """Whether each direction opens on its pattern by more than rounding."""
    images = np.where(opened, 1.0, -1.0) * (unit @ directions)
    return images.min(axis=0) > 8 * EPS * np.linalg.norm(directions, axis=0)
