"""Whitening of moderately many rows: a QR of ``[1, X]`` and SVDs of its triangle."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from scipy.linalg import lapack

from convexbn._types import Float, FloatMatrix
from convexbn.data.blocks import BlockSize
from convexbn.data.columns import Columns
from convexbn.data.rounding import CutByRounding, cut_by_rounding, direction_cuts
from convexbn.data.scaling import centre_columns, times_power
from convexbn.data.spectrum import Directions, Kept
from convexbn.data.warn import warn

#: Rows of a block in the tall QR: one block takes well under a second, so that Ctrl-C is answered.
BLOCK_ROWS = 4096


def by_qr(X: FloatMatrix, weights: Float, keep: Kept, input_eps: float) -> tuple[Columns, Directions]:
    """Statistics of the columns, and all directions that float64 resolves.

    Parameters
    ----------
    X, weights : ndarray (n, d), (n,)
        Rows, and positive sample weights.
    keep, input_eps : Kept, float
        As in ``whiten``.
    """
    exponents = np.frexp(np.abs(X).max(axis=0))[1]
    scaled = times_power(X, -exponents)  # in [-1, 1], safe from overflow and underflow
    centred = np.array(scaled)
    mean = centre_columns(centred, weights)
    norms = np.sqrt(np.einsum("ij,ij,i->j", centred, centred, weights))
    columns = Columns.measure(mean, norms, np.ptp(X, axis=0) > 0, exponents, float(weights.sum()), input_eps)
    kept, root = columns.kept, np.sqrt(weights)[:, None]
    Q, R = _tall_qr(np.hstack([root, root * centred[:, kept]]))
    R = R[1:, 1:]  # to rounding, the first column of Q is the constant and the others are orthogonal to it
    left, values, right = scipy.linalg.svd(R / norms[kept], full_matrices=False)
    cuts = direction_cuts(columns, values, right.T)
    order = np.argsort(values <= cuts, kind="stable")  # weak directions last
    left, values, right, r = left[:, order], values[order], right[order], int(np.count_nonzero(values > cuts))
    strong = right[:r].T / values[:r], Q[:, 1:] @ left[:, :r]
    cut = cut_by_rounding(columns, scaled, weights, values, right[r:].T, strong)
    _warn_of_weak_directions(values[:r], cuts[order][:r], cut)
    phi = keep.filter(values, r) if keep.standardize else np.ones(r)
    basis, directions = left[:, : len(phi)], right[: len(phi)].T
    back = np.ldexp(directions / values[: len(phi)] / norms[kept][:, None], -exponents[kept][:, None])
    if not (keep.standardize or keep.every):
        # the triangle in the user's units, up to one power of two: its top singular directions, as a rotation of the
        # standardised ones, so that mixed units cost no digits
        own = np.ldexp(R, exponents[kept] - exponents[kept].max())
        left, values, right = scipy.linalg.svd(own, full_matrices=False)
        phi = keep.filter(values, r)
        k = len(phi)
        values = np.ldexp(values, exponents[kept].max())
        rotation, triangle = scipy.linalg.qr(basis.T @ left[:, :k], mode="economic")
        rotation *= np.where(np.diag(triangle) < 0, -1.0, 1.0)
        basis, back, directions = basis @ rotation, back @ rotation, right[:k].T
    rows = np.empty((len(X), len(phi) + 1))
    rows[:, :-1] = Q[:, 1:] @ basis / root
    return columns, Directions(rows, back, directions, values, phi, r, cut)


def _warn_of_weak_directions(values: Float, cuts: Float, cut: CutByRounding) -> None:
    """Warn of directions near their cuts, and of those that were cut although they may be more than rounding."""
    if (near := values < 10 * cuts).any():
        warn(
            f"a singular value of the standardised data lies within a factor 10 of the rank cut "
            f"{cuts[near].max() / values.max():.1e}: columns are nearly collinear, and the numerical rank may change "
            "with rounding."
        )
    if cut.directions:
        warn(f"the rank cut leaves out what may be rounding: the network is judged among all{cut}.")


def _tall_qr(matrix: Float) -> tuple[Float, Float]:
    """QR in blocks of rows. The columns of Q are orthogonal to rounding, whatever the condition of the matrix."""
    n, width = matrix.shape
    size = max(BLOCK_ROWS, width)
    if n <= 2 * size:
        return _qr(matrix)
    if fast := _cholesky_qr(matrix):
        return fast
    blocks = [_qr(matrix[part]) for part in BlockSize(1, size).slices(n)]
    top, R = _qr(np.vstack([R for _, R in blocks]))
    parts = np.split(top, range(width, len(top), width))
    return np.vstack([q @ t for (q, _), t in zip(blocks, parts, strict=True)]), R


def _cholesky_qr(matrix: Float) -> tuple[Float, Float] | None:
    """QR by Cholesky of the Gram matrix, twice: matrix products only, ten times as fast as Householder's.

    The Gram matrix alone would lose half the digits. The second pass restores orthogonality to rounding while the
    condition of the columns, scaled to unit length, is below about 1e6 (Yamamoto et al. 2015); None beyond.
    """
    lengths = np.sqrt(np.einsum("ij,ij->j", matrix, matrix))
    Q, R = matrix / lengths, np.diag(lengths)
    for _ in range(2):
        factor, failed = lapack.dpotrf(Q.T @ Q)
        if failed or np.diag(factor).min() < 1e-5:
            return None
        inverse = scipy.linalg.solve_triangular(factor, np.eye(len(factor)), check_finite=False)
        Q, R = Q @ inverse, factor @ R
    return Q, R


def _qr(matrix: Float) -> tuple[Float, Float]:
    """Economic Householder QR, in LAPACK's own order of storage."""
    Q, R = scipy.linalg.qr(np.array(matrix, order="F"), mode="economic", overwrite_a=True, check_finite=False)
    return Q, R
