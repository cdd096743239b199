"""Whitening of moderately many rows: a QR of ``[1, X]`` and SVDs of its triangle."""

from __future__ import annotations

import numpy as np
import scipy.linalg

from convexbn._types import Float, FloatMatrix
from convexbn.data.blocks import BlockSize
from convexbn.data.columns import Columns
from convexbn.data.scaling import unit_columns
from convexbn.data.spectrum import Directions, kept_filter, numerical_rank

#: Rows a block in the tall QR: one block costs well under a second, so that Ctrl-C is answered.
BLOCK_ROWS = 4096


def by_qr(
    X: FloatMatrix, weights: Float, rank: int | float | None, spectral_filter: float | None, input_eps: float
) -> tuple[Columns, Directions]:
    """Statistics of the columns and all directions that float64 resolves.

    Parameters
    ----------
    X : ndarray (n, d)
    weights : ndarray (n,)
        Positive sample weights.
    rank, spectral_filter, input_eps
        As in ``whiten``.
    """
    total = float(weights.sum())
    scaled, exponents = unit_columns(X)
    mean = weights @ scaled / total
    centred = scaled - mean
    residual_mean = weights @ centred / total  # offsets of 1e12 leave a mean of 1e-3 behind: centre twice
    centred -= residual_mean
    mean += residual_mean
    norms = np.sqrt(np.einsum("ij,ij,i->j", centred, centred, weights))
    columns = Columns.measure(mean, norms, np.ptp(scaled, axis=0) > 0, exponents, total, input_eps)
    kept = columns.kept
    root = np.sqrt(weights)[:, None]
    Q, R = _constant_and_triangle(root, root * centred[:, kept])

    left, values, right = scipy.linalg.svd(R / norms[kept], full_matrices=False)
    r = numerical_rank(values, columns.rank_cut)
    basis, directions = left[:, :r], right[:r].T
    back = np.ldexp(directions / values[:r] / norms[kept][:, None], -exponents[kept][:, None])
    phi = np.ones(r)
    if rank is not None or spectral_filter is not None:
        # the same triangle in the user's units, up to one power of two: its top singular directions, as a
        # rotation of the standardised ones, so that mixed units cost no digits
        scaled = np.ldexp(R, exponents[kept] - exponents[kept].max())
        left, values, right = scipy.linalg.svd(scaled, full_matrices=False)
        phi = kept_filter(values, r, rank, spectral_filter)
        k = len(phi)
        values = np.ldexp(values, exponents[kept].max())
        rotation = _orthonormal(basis.T @ left[:, :k])
        basis, back, directions = basis @ rotation, back @ rotation, right[:k].T
    rows = np.empty((len(X), len(phi) + 1))
    rows[:, :-1] = Q[:, 1:] @ basis / root
    return columns, Directions(rows, back, directions, values, phi, r)


def _constant_and_triangle(root: Float, Z: Float) -> tuple[Float, Float]:
    """QR of ``[sqrt(w), Z]``: Q, whose first column is the constant, and R without its first row and column.

    The QR keeps every other column of Q orthogonal to the constant to rounding, whatever the condition of Z.
    """
    stacked = np.hstack([root, Z])
    n, width = stacked.shape
    size = max(BLOCK_ROWS, width)
    if n <= 2 * size:
        Q, R = _qr(stacked)
        return Q, R[1:, 1:]
    fast = _cholesky_qr(stacked)
    if fast is not None:
        return fast[0], fast[1][1:, 1:]
    blocks = [_qr(stacked[part]) for part in BlockSize(1, size).slices(n)]
    top, R = _qr(np.vstack([R for _, R in blocks]))
    cuts = np.cumsum([len(R) for _, R in blocks])[:-1]
    Q = np.vstack([q @ t for (q, _), t in zip(blocks, np.split(top, cuts), strict=True)])
    return Q, R[1:, 1:]


def _cholesky_qr(matrix: Float) -> tuple[Float, Float] | None:
    """QR by Cholesky of the Gram matrix, twice: matrix products only, ten times faster than Householder's.

    The Gram matrix alone would lose half the digits; the second pass restores orthogonality to rounding while
    the condition of the columns, scaled to unit length, is below about 1e6 (Yamamoto et al. 2015). None beyond.
    """
    lengths = np.sqrt(np.einsum("ij,ij->j", matrix, matrix))
    Q, R = matrix / lengths, np.diag(lengths)
    for _ in range(2):
        try:
            factor = scipy.linalg.cholesky(Q.T @ Q, check_finite=False)
        except scipy.linalg.LinAlgError:
            return None
        if np.diag(factor).min() < 1e-5:
            return None
        inverse = scipy.linalg.solve_triangular(factor, np.eye(len(factor)), check_finite=False)
        Q, R = Q @ inverse, factor @ R
    return Q, R


def _qr(matrix: Float) -> tuple[Float, Float]:
    """Economic Householder QR, in LAPACK's own order of storage."""
    Q, R = scipy.linalg.qr(np.array(matrix, order="F"), mode="economic", overwrite_a=True, check_finite=False)
    return Q, R


def _orthonormal(rotation: Float) -> Float:
    """Orthonormal columns next to columns that are nearly so."""
    Q, R = scipy.linalg.qr(rotation, mode="economic")
    return Q * np.where(np.diag(R) < 0, -1.0, 1.0)
