"""Activation patterns of the data under gates: sampling, evaluation, deduplication.

A gate ``(g, b)`` is open at ``x`` if ``(x - mean)'g + b >= 0``; a row exactly on the hyperplane is open.
The pattern of a gate is the 0/1 vector ``diag(D)`` of its values on the training rows.
"""

from __future__ import annotations

import numpy as np

from convexbn._types import Bool, Float, Index
from convexbn.data.blocks import BlockSize
from convexbn.data.row_matrix import Rows, row_matrix
from convexbn.data.scaling import headroom, powers
from convexbn.data.whitening import Whitening
from convexbn.program.arrangement import row_keys
from convexbn.program.kernels import open_gates

#: Responses held at once.
_BLOCK_ENTRIES = 1 << 20


def sample_gates(
    kind: str, n_gates: int, whitening: Whitening, random_state: np.random.RandomState
) -> tuple[Float, Float]:
    """Draw ``n_gates`` gates: directions (d, n_gates) on the raw features and offsets (n_gates,).

    Parameters
    ----------
    kind : {"data", "whitened"}
        ``"data"``: ``g ~ N(0, I_d)``, offset 0. ``"whitened"``: ``h ~ N(0, I_{r+1})`` on the whitened rows,
        ``g = V S^{-1} h[:r]``, ``b = h[r] / sqrt(n)``: isotropic where the network lives.
    n_gates, whitening, random_state : int, Whitening, numpy.random.RandomState
    """
    if kind == "data":
        return random_state.standard_normal((len(whitening.mean), n_gates)), np.zeros(n_gates)
    return gates_along(whitening, sample_directions(n_gates, whitening, random_state))


def sample_directions(n: int, whitening: Whitening, random_state: np.random.RandomState) -> Float:
    """Draw isotropic directions on the whitened rows: (q, n).

    They are drawn as ``h[:r] = V'z``, ``z ~ N(0, I_d)``, independent of signs and rotations of singular vectors.

    Parameters
    ----------
    n, whitening, random_state : int, Whitening, numpy.random.RandomState
    """
    draws = random_state.standard_normal((len(whitening.mean) + 1, n))
    return np.vstack([whitening.directions.T @ draws[:-1], draws[-1:]])


def gates_along(whitening: Whitening, directions: Float) -> tuple[Float, Float]:
    """Gates that open where ``A h >= 0``, for directions ``h`` (q, P) on the whitened rows: (d, P), (P,)."""
    return whitening.projection @ directions[:-1], directions[-1] / np.sqrt(whitening.total_weight)


@np.errstate(all="ignore")
def gate_patterns(X: Rows, mean: Float, gates: Float, offsets: Float) -> Bool:
    """Whether each gate is open at each row, computed in float64: (n, P).

    A response within rounding of zero is summed again in an order that does not depend on the batch: training,
    prediction and certification treat a row on a hyperplane alike.

    Parameters
    ----------
    X, mean : ndarray (n, d) or RowMatrix, ndarray (d,)
    gates, offsets : ndarray (d, P), (P,)
    """
    peaks = np.abs(gates).max(axis=0)
    peaks = np.where(peaks > 0, peaks, 1.0)
    lengths = np.linalg.norm(gates / peaks, axis=0) * peaks
    exponent = headroom(X, mean)
    shared = [np.ldexp(mean, -exponent), gates, -np.ldexp(offsets, -exponent), lengths, *powers(-exponent)]
    size = BlockSize(max(gates.shape), _BLOCK_ENTRIES, least=64)
    opened = np.empty((len(X), gates.shape[1]), dtype=bool)
    return row_matrix(X).map(open_gates, size, shared=shared, out=opened)


def distinct_gates(gates: Float, offsets: Float) -> tuple[Index, Index]:
    """Index of the first copy of every distinct gate (m',), and the place of every gate among them (m,).

    Examples
    --------
    >>> distinct_gates(np.array([[1.0, 2.0, 1.0]]), np.zeros(3))
    (array([0, 1]), array([0, 1, 0]))
    """
    places: dict[bytes, int] = {}
    columns = np.vstack([gates, offsets]).T
    place = np.array([places.setdefault(column.tobytes(), len(places)) for column in columns], dtype=np.intp)
    return np.unique(place, return_index=True)[1], place


def first_of_each_pattern(patterns: Bool) -> Index:
    """Sorted indices of the first gate of every distinct pattern, a column of ``patterns``.

    Examples
    --------
    >>> first_of_each_pattern(np.array([[1, 0, 1], [1, 1, 1]], dtype=bool))
    array([0, 1])
    """
    return np.sort(np.unique(row_keys(patterns.T), return_index=True)[1])
