"""Whitening of many rows by the Gram matrix of their centred columns, checked and corrected.

An eigendecomposition of the Gram matrix resolves singular values down to the square root of the machine epsilon,
relative to the largest, at ``n d^2`` flops in matrix products. Where that is enough the basis ``(X - mean) V S^{-1}``
is computed from the data, its departure from orthonormality measured and removed (as in Cholesky-QR2, Yamamoto et al.
2015); elsewhere there is no answer, and a QR of the data has to be taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.linalg
from scipy.linalg import lapack

from convexbn._types import Float, FloatMatrix
from convexbn.data.columns import Columns
from convexbn.data.kernels import projected
from convexbn.data.moments import Moments, blocks, cached_rows, moments, weighted_sums
from convexbn.data.row_matrix import is_projected, row_matrix
from convexbn.data.spectrum import Directions, kept_filter

#: Eigenvalues of a Gram matrix above this multiple of the largest hold six digits and more.
RESOLVED = 1e-10

#: Binary exponents of columns up to which their squares are far from overflow and underflow.
_ORDINARY = 300

#: Departure from orthonormality (Frobenius norm of ``A'A - I``) that is left alone, and that one correction removes.
_ORTHONORMAL, _CORRECTABLE = 1e-11, 1e-3


class Basis(NamedTuple):
    """Columns that are orthonormal with the weights and orthogonal to the constant, and what they were made by.

    Attributes
    ----------
    rows : ndarray (n, k + 1), or None
        ``(X - mean) projection``, and room for one column more; None where they are not kept.
    projection : ndarray (d, k)
    departure : float
        Frobenius norm of ``columns' diag(w) columns - I``, measured.
    """

    rows: Float | None
    projection: Float
    departure: float


def by_gram(
    X: FloatMatrix, weights: Float, rank: int | float | None, spectral_filter: float | None, input_eps: float
) -> tuple[Columns, Directions] | None:
    """Statistics and directions of rows read in blocks; None where the Gram matrix does not resolve the latter.

    Parameters
    ----------
    X : matrix (n, d)
        Of any real type.
    weights : ndarray (n,)
        Positive sample weights.
    rank, spectral_filter, input_eps
        As in ``whiten``.
    """
    found = moments(X, weights)
    norms = np.sqrt(np.maximum(found.gram.diagonal(), 0))
    columns = Columns.measure(found.mean, norms, found.varies, found.exponents, float(weights.sum()), input_eps)
    kept, exponents = columns.kept, found.exponents[columns.kept]
    gram, norms = found.gram[np.ix_(kept, kept)], norms[kept]
    if np.abs(exponents).max() > _ORDINARY:
        return None
    r = rank_of_standardised(gram, norms)
    if rank is None and spectral_filter is None:
        if r is None:
            return None
        values, directions = spectrum(gram / norms / norms[:, None], len)
        back, phi = directions / values / norms[:, None], np.ones(r)
        back = np.ldexp(back, -exponents[:, None])
    else:
        scaled = np.ldexp(gram, exponents + exponents[:, None])
        values, directions = spectrum(scaled, lambda s: len(kept_filter(s, len(s), rank, spectral_filter)))
        phi = kept_filter(values, len(values), rank, spectral_filter)
        resolved = int(np.count_nonzero(values**2 > RESOLVED * values[0] ** 2))
        if len(phi) + (r is None) > resolved:  # also: is there anything beyond?
            return None
        r, directions = r or resolved, directions[:, : len(phi)]
        back = directions / values[: len(phi)]
    projection = columns.padded(back)
    if is_projected(X, len(phi)):
        basis = projection_of(X, weights, found, projection)
    else:
        basis = basis_of(X, weights, np.ldexp(found.mean, found.exponents), projection)
    if basis is None:
        return None
    return columns, Directions(basis.rows, basis.projection[kept], directions, values, phi, r, basis.departure)


def rank_of_standardised(gram: Float, norms: Float) -> int | None:
    """Number of columns where the Gram matrix shows that they are independent; None where it cannot tell."""
    size = len(norms)
    correlation = gram / norms / norms[:, None]
    diagonal = np.einsum("ii->i", correlation)
    diagonal -= RESOLVED * size  # the trace, at least the largest eigenvalue
    try:
        scipy.linalg.cholesky(correlation, overwrite_a=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        return None
    return size


def spectrum(gram: Float, kept: Callable[[Float], int]) -> tuple[Float, Float]:
    """Singular values of the centred data, largest first, and the right singular vectors of the leading ones.

    One reduction to tridiagonal form, ``4/3 d^3`` flops, half of them in products with vectors, gives all values; then
    ``kept`` says how many vectors are wanted, one at least, ``2 d^2`` flops each. 200 of 3,072 take half the time of
    all.
    """
    if len(gram) == 1:
        return np.sqrt(np.maximum(gram[0], 0)), np.ones((1, 1))
    room, _ = lapack.dsytrd_lwork(len(gram), lower=1)
    reflectors, diagonal, beside, factors, _ = lapack.dsytrd(gram, lower=1, lwork=int(room))
    values = scipy.linalg.eigh_tridiagonal(diagonal, beside, eigvals_only=True, lapack_driver="sterf")
    values = np.sqrt(np.maximum(values[::-1], 0))
    leading = (len(gram) - max(kept(values), 1), len(gram) - 1)
    _, vectors = scipy.linalg.eigh_tridiagonal(
        diagonal, beside, select="i", select_range=leading, lapack_driver="stemr"
    )
    below = np.asfortranarray(reflectors[1:, :-1])  # a QR's reflectors, which leave the first entry alone
    _, room, _ = lapack.dormqr("L", "N", below, factors, vectors[1:], lwork=-1)
    vectors[1:], _, _ = lapack.dormqr("L", "N", below, factors, vectors[1:], lwork=int(room[0]))
    return values, vectors[:, ::-1]


def basis_of(X: FloatMatrix, weights: Float, mean: Float, projection: Float) -> Basis | None:
    """The basis from a projection that makes it nearly orthonormal; None when it is too far from that."""
    rows = np.empty((len(X), projection.shape[1] + 1))
    columns, total = rows[:, :-1], weights.sum()
    row_matrix(X).map(projected, cached_rows(X), shared=[mean, projection], out=columns)
    for _ in range(3):
        columns -= weights @ columns / total
        gram, _ = weighted_sums(((weights[part], block) for part, block in blocks(columns)), columns.shape[1])
        departure = float(np.linalg.norm(gram - np.eye(len(gram))))
        if departure <= _ORTHONORMAL:
            return Basis(rows, projection, departure)
        if not departure <= _CORRECTABLE:
            return None
        values, vectors = scipy.linalg.eigh(gram)
        correction = (vectors / np.sqrt(values)) @ vectors.T  # the nearest, so that singular directions stay
        for _, block in blocks(columns):
            block[:] = block @ correction
        projection = projection @ correction
    return None


def projection_of(X: FloatMatrix, weights: Float, found: Moments, projection: Float) -> Basis | None:
    """The same without the rows, which are read from ``X`` again for every correction, or not at all.

    An exact Gram matrix tells the departure of ``(X - mean) projection`` as well as the rows do.
    """
    for _ in range(3):
        if found.exact is None:
            gram = _gram_of_projected(X, weights, np.ldexp(found.mean, found.exponents), projection)
        else:
            gram = (projection.T @ (found.exact @ projection)).astype(np.float64)
        departure = float(np.linalg.norm(gram - np.eye(len(gram))))
        if departure <= _ORTHONORMAL:
            return Basis(None, projection, departure)
        if not departure <= _CORRECTABLE:
            return None
        values, vectors = scipy.linalg.eigh(gram)
        projection = projection @ ((vectors / np.sqrt(values)) @ vectors.T)
    return None


def _gram_of_projected(X: FloatMatrix, weights: Float, mean: Float, projection: Float) -> Float:
    """Gram matrix of the centred columns ``(X - mean) projection``, block by block."""
    projected = ((weights[part], (block - mean) @ projection) for part, block in blocks(X))
    gram, sums = weighted_sums(projected, projection.shape[1])
    gram -= np.outer(sums, sums) / weights.sum()
    return gram
