"""Whitening of many rows by the Gram matrix of their centred columns, checked and corrected.

An eigendecomposition of the Gram matrix resolves singular values down to the square root of the machine epsilon,
relative to the largest, at ``n d^2`` flops in matrix products. Where that is enough, the basis ``(X - mean) V S^{-1}``
is computed from the data, and its departure from orthonormality is measured and removed (as in Cholesky-QR2, Yamamoto
et al. 2015). Elsewhere there is no answer, and a QR of the data has to be taken.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.linalg
from scipy.linalg import lapack

from convexbn._types import Float, FloatMatrix
from convexbn.data.columns import Columns
from convexbn.data.kernels import projected
from convexbn.data.moments import Moments, blocks, cached_rows, moments, weighted_sums
from convexbn.data.rounding import CutByRounding
from convexbn.data.row_matrix import is_projected, row_matrix
from convexbn.data.spectrum import Directions, Kept

#: Eigenvalues of a Gram matrix above this multiple of the largest hold six digits and more.
RESOLVED = 1e-10
#: Rounding of columns up to which no direction that is resolved may be rounding.
_ROUNDING = 1e-6
#: Binary exponents of columns up to which their squares are far from overflow and underflow.
_ORDINARY = 300
#: Departure from orthonormality (Frobenius norm of ``A'A - I``) that is left alone, and that one correction removes.
_ORTHONORMAL, _CORRECTABLE = 1e-11, 1e-3


def by_gram(X: FloatMatrix, weights: Float, keep: Kept, input_eps: float) -> tuple[Columns, Directions] | None:
    """Statistics and directions of rows read in blocks; None if the Gram matrix does not resolve the directions.

    Parameters
    ----------
    X, weights : matrix (n, d), ndarray (n,)
        Rows of any real type, and positive sample weights.
    keep, input_eps : Kept, float
        As in ``whiten``.
    """
    found = moments(X, weights)
    norms = np.sqrt(np.maximum(found.gram.diagonal(), 0))
    columns = Columns.measure(found.mean, norms, found.varies, found.exponents, float(weights.sum()), input_eps)
    kept, exponents = columns.kept, found.exponents[columns.kept]
    gram, norms = found.gram[np.ix_(kept, kept)], norms[kept]
    if np.abs(exponents).max() > _ORDINARY or columns.rounding(columns.eps).max() > _ROUNDING:
        return None
    r, correlation = len(kept), gram / norms / norms[:, None]
    # still positive definite less a share of its trace, which is at least its largest eigenvalue
    independent = lapack.dpotrf(correlation - RESOLVED * r * np.eye(r), overwrite_a=1)[1] == 0
    if keep.every:
        if not independent:
            return None
        values, directions = spectrum(correlation, len)
        back, phi = directions / values / norms[:, None], np.ones(r)
        back = np.ldexp(back, -exponents[:, None])
    else:
        scaled = correlation if keep.standardize else np.ldexp(gram, exponents + exponents[:, None])
        values, directions = spectrum(scaled, lambda s: len(keep.filter(s, len(s))))
        phi = keep.filter(values, len(values))
        resolved = int(np.count_nonzero(values**2 > RESOLVED * values[0] ** 2))
        if len(phi) + (not independent) > resolved:  # one more tells whether there are any beyond
            return None
        r, directions = r if independent else resolved, directions[:, : len(phi)]
        back = directions / values[: len(phi)]
        if keep.standardize:
            back = np.ldexp(back / norms[:, None], -exponents[:, None])
    if (basis := _orthonormal_basis(X, weights, found, columns.padded(back))) is None:
        return None
    rows, projection, departure = basis
    cut = CutByRounding(constant=columns.nearly_constant)
    return columns, Directions(rows, projection[kept], directions, values, phi, r, cut, departure)


def spectrum(gram: Float, kept: Callable[[Float], int]) -> tuple[Float, Float]:
    """Singular values of the centred data, largest first, and the right singular vectors of the leading ones.

    One reduction to tridiagonal form, ``4/3 d^3`` flops, half of them in products with vectors, gives all values; then
    ``kept`` says how many vectors are wanted, one at least, ``2 d^2`` flops each. 200 of 3,072 take half the time of
    all.
    """
    if len(gram) == 1:
        return np.sqrt(np.maximum(gram[0], 0)), np.ones((1, 1))
    room, _ = lapack.dsytrd_lwork(len(gram), lower=1)
    reflectors, diagonal, off, factors, _ = lapack.dsytrd(gram, lower=1, lwork=int(room))
    values = scipy.linalg.eigh_tridiagonal(diagonal, off, eigvals_only=True, lapack_driver="sterf")
    values = np.sqrt(np.maximum(values[::-1], 0))
    leading = (len(gram) - max(kept(values), 1), len(gram) - 1)
    _, vectors = scipy.linalg.eigh_tridiagonal(diagonal, off, select="i", select_range=leading, lapack_driver="stemr")
    below = np.asfortranarray(reflectors[1:, :-1])  # a QR's reflectors, which leave the first entry alone
    _, room, _ = lapack.dormqr("L", "N", below, factors, vectors[1:], lwork=-1)
    vectors[1:], _, _ = lapack.dormqr("L", "N", below, factors, vectors[1:], lwork=int(room[0]))
    return values, vectors[:, ::-1]


def _orthonormal_basis(
    X: FloatMatrix, weights: Float, found: Moments, projection: Float
) -> tuple[Float | None, Float, float] | None:
    """Rows, projection and measured departure of a basis that is orthonormal with the weights.

    The rows are ``[(X - mean) projection, room]``, the projection corrected until they are orthonormal; None if it is
    too far from that. Rows that would not fit in memory are None: an exact Gram matrix tells their departure, or ``X``
    is read again for each correction.
    """
    mean, total, width = np.ldexp(found.mean, found.exponents), weights.sum(), projection.shape[1]
    rows = None if is_projected(X, width) else np.empty((len(X), width + 1))
    if rows is not None:
        columns = rows[:, :-1]
        row_matrix(X).map(projected, cached_rows(X), shared=[mean, projection], out=columns)
    for _ in range(3):
        if rows is not None:
            columns -= weights @ columns / total
            gram, _ = weighted_sums(((weights[part], block) for part, block in blocks(columns)), width)
        elif found.exact is not None:
            gram = (projection.T @ (found.exact @ projection)).astype(np.float64)
        else:
            read = ((weights[part], (block - mean) @ projection) for part, block in blocks(X))
            gram, sums = weighted_sums(read, width)
            gram -= np.outer(sums, sums) / total
        departure = float(np.linalg.norm(gram - np.eye(width)))
        if departure <= _ORTHONORMAL:
            return rows, projection, departure
        if not departure <= _CORRECTABLE:
            return None
        values, vectors = scipy.linalg.eigh(gram)
        correction = (vectors / np.sqrt(values)) @ vectors.T  # the nearest, so that singular directions stay
        projection = projection @ correction
        for _, block in () if rows is None else blocks(columns):
            block[:] = block @ correction
    return None
