"""Activation patterns of the data under gates: sampling, evaluation, deduplication.

A gate ``(g, b)`` is open at ``x`` when ``(x - mean)'g + b >= 0``; a row exactly on the hyperplane is open.
The pattern of a gate is the 0/1 vector ``diag(D)`` of its values on the training rows.
"""

from __future__ import annotations

import numpy as np

from convexbn._typing import Bool, Float, FloatMatrix, Index
from convexbn.whitening import Whitening, centre

#: Responses held at once.
_BLOCK_ENTRIES = 1 << 20


def sample_gates(
    kind: str, n_gates: int, whitening: Whitening, random_state: np.random.RandomState
) -> tuple[Float, Float]:
    """Draw ``n_gates`` gates: directions (d, n_gates) on the raw features and offsets (n_gates,).

    Parameters
    ----------
    kind : {"data", "whitened"}
        ``"data"``: ``g ~ N(0, I_d)``, offset 0. ``"whitened"``: ``h ~ N(0, I_{r+1})`` on the whitened
        rows, ``g = V S^{-1} h[:r]``, ``b = h[r] / sqrt(n)``: isotropic where the network lives.
    n_gates : int
        Number of draws.
    whitening : Whitening
        Statistics of the training data.
    random_state : numpy.random.RandomState
        Source of randomness.
    """
    if kind == "data":
        gates = random_state.standard_normal((len(whitening.mean), n_gates))
        return gates, np.zeros(n_gates)
    directions = random_state.standard_normal((whitening.rank + 1, n_gates))
    offsets = directions[-1] / np.sqrt(whitening.total_weight)
    return whitening.projection @ directions[:-1], offsets


def gate_patterns(X: FloatMatrix, mean: Float, gates: Float, offsets: Float) -> Bool:
    """Which gates are open at which rows: (n, d), (d, P) -> (n, P), in float64."""
    opened = np.empty((len(X), gates.shape[1]), dtype=bool)
    size = max(64, _BLOCK_ENTRIES // max(gates.shape))
    for start in range(0, len(X), size):
        part = slice(start, start + size)
        centred, exponent = centre(X[part], mean)
        response = centred @ gates
        response += np.ldexp(offsets, -exponent)
        np.greater_equal(response, 0, out=opened[part])
    return opened


def first_of_each_pattern(patterns: Bool) -> Index:
    """Indices, in order, of the first gate of every distinct pattern (a column of ``patterns``).

    Examples
    --------
    >>> first_of_each_pattern(np.array([[1, 0, 1], [1, 1, 1]], dtype=bool))
    array([0, 1])
    """
    packed = np.ascontiguousarray(np.packbits(patterns, axis=0).T)
    keys = packed.view(np.dtype((np.void, packed.shape[1]))).ravel()
    return np.sort(np.unique(keys, return_index=True)[1])
