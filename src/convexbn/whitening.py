"""Batch normalisation as whitening: weighted centring, thin SVD, numerical rank, and the way back.

With ``C X = U S V'`` the centred data, batch normalisation followed by its affine map is
``gamma U q / ||q|| + shift / sqrt(n) = A s`` with ``A = [U, 1 / sqrt(n)]``, ``s = (gamma q / ||q||; shift)``: the
batch-normalised network is a plain network on the whitened data ``A`` (mathematics, section 0).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import scipy.linalg

from convexbn._typing import Float, FloatMatrix

#: Rows a block in the tall QR: one block costs well under a second, so that Ctrl-C is answered.
BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Whitening:
    """The whitened data ``A`` of a training set, and the map that takes a new row to its row of ``A``.

    Attributes
    ----------
    rows : ndarray (n, r + 1)
        Row ``a(x_i) = [(x_i - mean)' projection, 1 / sqrt(total_weight)]`` of every training row;
        ``diag(sqrt(w)) rows`` has orthonormal columns.
    mean : ndarray (d,)
        Weighted column means, in the units of the data.
    projection : ndarray (d, r)
        ``V S^{-1}``: from centred data to the whitened space.
    directions : ndarray (d, r)
        ``V``: right singular vectors (of the standardised columns for ``rank=None``).
    singular_values : ndarray
        All singular values that were found: of the standardised columns for ``rank=None``, else of the
        centred, unscaled data (in the units of the data).
    total_weight : float
        Sum of the sample weights (the number of rows when unweighted).
    numerical_rank : int
        Number of independent directions in the data; more than ``rank`` when truncated.
    constant : ndarray (d,) of bool
        Columns that do not vary; they carry no information and are left out.
    rank_cut : float
        Relative cut that decided the numerical rank.
    """

    rows: Float
    mean: Float
    projection: Float
    directions: Float
    singular_values: Float
    total_weight: float
    numerical_rank: int
    constant: np.ndarray
    rank_cut: float

    @property
    def rank(self) -> int:
        """Number of directions kept, ``r``."""
        return int(self.projection.shape[1])

    @property
    def truncated(self) -> bool:
        """Whether directions that the data have were left out."""
        return self.rank < self.numerical_rank

    def transform(self, X: FloatMatrix) -> Float:
        """Rows of ``A`` for new points, from the stored statistics alone: (n, d) -> (n, r + 1)."""
        centred, exponent = centre(X, self.mean)
        last = np.full((len(centred), 1), 1 / np.sqrt(self.total_weight))
        return np.hstack([np.ldexp(centred @ self.projection, exponent), last])


def centre(X: FloatMatrix, mean: Float) -> tuple[Float, int]:
    """Return ``(X - mean) / 2^e`` and the exponent ``e``, which is 0 unless the difference could overflow."""
    largest = max(np.abs(X).max(initial=0.0), np.abs(mean).max(initial=0.0))
    exponent = 16 if largest > 2.0**1007 else 0
    if exponent:
        return np.ldexp(X, -exponent) - np.ldexp(mean, -exponent), exponent
    return X - mean, exponent


@np.errstate(all="ignore")
def whiten(
    X: FloatMatrix,
    sample_weight: Float | None = None,
    *,
    rank: int | float | None = None,
    input_eps: float = float(np.finfo(np.float64).eps),
) -> Whitening:
    """Whiten training data by a QR of ``[1, X]`` and an SVD of its triangle, in float64.

    Standardised columns decide which columns are constant and what the numerical rank is, so that units
    do not matter; ``rank`` refers to the centred data in the user's units, the spectrum that gradient
    descent sees (``rank=None`` keeps everything, where units do not matter either).

    Parameters
    ----------
    X : ndarray (n, d)
        Finite data.
    sample_weight : ndarray (n,), optional
        Positive weights; equal to repeating rows (mathematics, section 0b).
    rank : int, float in (0, 1] or None, default=None
        Keep the top ``rank`` directions (at most those that exist), the fewest that hold this share of
        the variance, or all.
    input_eps : float
        Machine epsilon of the type that the data came in: what the rank may rest on.

    Returns
    -------
    Whitening

    Raises
    ------
    ValueError
        When all features are constant.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).standard_normal((20, 3))
    >>> A = whiten(X).rows
    >>> bool(np.allclose(A.T @ A, np.eye(4)))
    True
    """
    n = len(X)
    weights = np.ones(n) if sample_weight is None else sample_weight
    total = float(weights.sum())
    scaled, exponents = _unit_columns(X)
    mean = weights @ scaled / total
    centred = scaled - mean
    residual_mean = weights @ centred / total  # offsets of 1e12 leave a mean of 1e-3 behind: centre twice
    centred -= residual_mean
    mean += residual_mean
    norms = np.sqrt(np.einsum("ij,ij,i->j", centred, centred, weights))
    deviation = norms / np.sqrt(total)
    constant = (deviation <= 8 * input_eps * np.abs(mean)) | (np.ptp(scaled, axis=0) == 0)
    if constant.all():
        raise ValueError(
            "all features are constant, so batch normalisation has nothing to normalise: "
            "give at least one feature that varies over the rows of positive weight."
        )
    _warn_of_nearly_constant(np.flatnonzero(constant & (np.ptp(scaled, axis=0) > 0)))
    kept = np.flatnonzero(~constant)
    offsets = np.abs(mean[kept]) / deviation[kept]
    _warn_of_offsets(kept, offsets, input_eps)
    root = np.sqrt(weights)[:, None]
    Q, R = _constant_and_triangle(root, root * centred[:, kept])
    cut = min(len(kept) * input_eps * (1 + offsets.max()), 1 / 16)

    left, values, right = scipy.linalg.svd(R / norms[kept], full_matrices=False)
    r = _numerical_rank(values, cut)
    basis, directions = left[:, :r], right[:r].T
    back = np.ldexp(directions / values[:r] / norms[kept][:, None], -exponents[kept][:, None])
    if rank is not None:
        # the same triangle in the user's units, up to one power of two: its top singular directions, as a
        # rotation of the standardised ones, so that mixed units cost no digits
        scaled = np.ldexp(R, exponents[kept] - exponents[kept].max())
        left, values, right = scipy.linalg.svd(scaled, full_matrices=False)
        values = np.ldexp(values, exponents[kept].max())
        k = min(r, _kept_directions(values / values[0], rank))
        rotation = _orthonormal(basis.T @ left[:, :k])
        basis, back, directions = basis @ rotation, back @ rotation, right[:k].T
    _refuse_denormal(back, kept)
    return Whitening(
        rows=np.hstack([Q[:, 1:] @ basis / root, np.full((n, 1), 1 / np.sqrt(total))]),
        mean=np.ldexp(mean, exponents),
        projection=_padded(back, kept, X.shape[1]),
        directions=_padded(directions, kept, X.shape[1]),
        singular_values=values,
        total_weight=total,
        numerical_rank=r,
        constant=constant,
        rank_cut=float(cut),
    )


@np.errstate(all="ignore")
def batch_normalize(X: FloatMatrix, weight: Float, sample_weight: Float) -> Float:
    """Return ``C X w / ||C X w||`` for every column of ``weight``: (n, d), (d, m) -> (n, m).

    The statistics are those of the rows given, with their weights; the columns of the result have unit
    weighted norm. A direction on which the data do not vary gives a zero column.
    """
    total = sample_weight.sum()
    relative, exponent = centre(X, X[0])  # to a row: no offset, no overflow
    response = relative @ np.ldexp(weight, exponent)
    response -= sample_weight @ response / total
    response -= sample_weight @ response / total
    peaks = np.abs(response).max(axis=0)
    response /= np.where(peaks > 0, peaks, 1)
    norms = np.sqrt(np.einsum("ij,ij,i->j", response, response, sample_weight))
    normalized: Float = np.divide(response, norms, out=np.zeros_like(response), where=norms > 0)
    return normalized


def _unit_columns(X: FloatMatrix) -> tuple[Float, np.ndarray]:
    """Scale each column by a power of two into [-1, 1]: exact, and safe from overflow and underflow."""
    exponents = np.frexp(np.abs(X).max(axis=0))[1]
    return np.ldexp(X, -exponents), exponents


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
    blocks = [_qr(stacked[start : start + size]) for start in range(0, n, size)]
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


def _numerical_rank(values: Float, cut: float) -> int:
    relative = values / values[0]
    if np.any((relative > cut / 10) & (relative < 10 * cut)):
        warnings.warn(
            f"a singular value of the standardised data lies within a factor 10 of the rank cut {cut:.1e}: "
            "columns are nearly collinear, and the numerical rank may change with rounding.",
            UserWarning,
            stacklevel=4,
        )
    return int(np.count_nonzero(relative > cut))


def _kept_directions(values: Float, rank: int | float) -> int:
    if isinstance(rank, Integral):
        return int(rank)
    share = np.cumsum(values**2)
    return int(np.searchsorted(share, rank * share[-1] * (1 - 1e-12)) + 1)


def _orthonormal(rotation: Float) -> Float:
    """Orthonormal columns next to columns that are nearly so."""
    Q, R = scipy.linalg.qr(rotation, mode="economic")
    orthonormal: Float = Q * np.where(np.diag(R) < 0, -1.0, 1.0)
    return orthonormal


def _padded(array: Float, kept: np.ndarray, d: int) -> Float:
    """Rows of all ``d`` features, zero where a feature is constant."""
    padded = np.zeros((d, array.shape[1]))
    padded[kept] = array
    return padded


def _refuse_denormal(back: Float, kept: np.ndarray) -> None:
    overflown = np.flatnonzero(~np.isfinite(back).all(axis=1))
    if len(overflown):
        raise ValueError(
            f"feature {kept[overflown[0]]} varies by less than 1e-308, where floating point has few digits left: "
            "multiply it by a power of ten; batch norm does not care about units."
        )


def _warn_of_nearly_constant(columns: np.ndarray) -> None:
    if len(columns):
        warnings.warn(
            f"feature {columns[0]} varies by no more than rounding around its mean and is treated as constant.",
            UserWarning,
            stacklevel=4,
        )


def _warn_of_offsets(kept: np.ndarray, offsets: Float, input_eps: float) -> None:
    worst = int(np.argmax(offsets))
    if offsets[worst] > 1 / np.sqrt(input_eps):
        warnings.warn(
            f"feature {kept[worst]} has |mean| / deviation = {offsets[worst]:.1e}: most digits of its "
            "variation are lost in the input; subtract the offset before storing the data.",
            UserWarning,
            stacklevel=4,
        )
