"""Batch normalisation as whitening: weighted centring, thin SVD, numerical rank, and the way back.

With ``C X = U S V'`` the centred data, batch normalisation followed by its affine map is
``gamma U q / ||q|| + shift / sqrt(n) = A s`` with ``A = [U, 1 / sqrt(n)]``, ``s = (gamma q / ||q||; shift)``: the
batch-normalised network is a plain network on the whitened data ``A`` (mathematics, section 0).

A spectral filter ``phi_i = s_i / sqrt(s_i^2 + tau^2)``, 1 on the constant column, replaces A by ``A Phi``. The weight
decay of a plain network on its rows is ``||Phi^{-1} s||`` of the network on A, which is
``sqrt(gamma^2 (1 + tau^2 ||w||^2 / n) + shift^2)`` for a neuron ``w`` of unit variance: small singular directions cost
more (mathematics, section 5).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
import scipy.linalg

from convexbn._types import EPS, Float, FloatMatrix
from convexbn.data.gram import RESOLVED, basis_of, projection_of, rank_of_standardised, spectrum
from convexbn.data.moments import blocks, moments
from convexbn.data.row_matrix import MappedRows, is_mapped
from convexbn.data.scaling import centre, times_power

#: Rows a block in the tall QR: one block costs well under a second, so that Ctrl-C is answered.
BLOCK_ROWS = 4096

#: Binary exponents of columns up to which their squares are far from overflow and underflow.
_ORDINARY = 300

#: Directions that the spectral filter shrinks below this are left out, as a truncation.
FAINTEST = 2.0**-26


@dataclass(frozen=True)
class Whitening:
    """The whitened data ``A`` of a training set, and the map that takes a new row to its row of ``A``.

    Attributes
    ----------
    rows : ndarray (n, r + 1), or MappedRows
        Row ``a(x_i) = [(x_i - mean)' projection, 1 / sqrt(total_weight)]`` of every training row; the columns of
        ``diag(sqrt(w)) rows`` are orthogonal, of the norms ``filter`` and 1.
    mean : ndarray (d,)
        Weighted column means, in the units of the data.
    projection : ndarray (d, r)
        ``V S^{-1} Phi``: from centred data to the whitened space.
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
    filter : ndarray (r,)
        ``phi``, in (0, 1]; ones without a spectral filter.
    departure : float or None
        Measured distance of ``diag(sqrt(w)) A`` from orthonormal columns, ``||A'A - I||_F``, where the Gram matrix was
        used; None: a QR, orthonormal to rounding.
    """

    rows: Any
    mean: Float
    projection: Float
    directions: Float
    singular_values: Float
    total_weight: float
    numerical_rank: int
    constant: np.ndarray
    rank_cut: float
    filter: Float
    departure: float | None = None

    @property
    def rank(self) -> int:
        """Number of directions kept, ``r``."""
        return int(self.projection.shape[1])

    @property
    def truncated(self) -> bool:
        """Whether directions that the data have were left out."""
        return self.rank < self.numerical_rank

    def leading(self, rank: int | float | None, spectral_filter: float | None = None) -> Whitening:
        """What ``whiten`` gives for a smaller ``rank``, or with a filter, without another SVD.

        None keeps all directions and the filter that are there. The directions must be in order, as they are unless
        ``whiten`` was called with ``rank=None`` and no filter; a filter cannot follow another one.
        """
        phi = _kept_filter(self.singular_values, self.rank, rank, spectral_filter)
        k = len(phi)
        projection = self.projection[:, :k] * phi
        if isinstance(self.rows, MappedRows):
            rows: Any = replace(self.rows, projection=projection)
        else:
            rows = np.hstack([self.rows[:, :k] * phi, self.rows[:, -1:]])
        return replace(
            self,
            rows=rows,
            projection=projection,
            directions=self.directions[:, :k].copy(),
            filter=self.filter[:k] * phi,
        )

    @property
    def filtered(self) -> bool:
        """Whether a spectral filter shrinks directions."""
        return bool((self.filter < 1).any())

    def transform(self, X: FloatMatrix) -> Float:
        """Rows of ``A`` for new points, from the stored statistics alone: (n, d) -> (n, r + 1)."""
        rows = np.full((len(X), self.rank + 1), 1 / np.sqrt(self.total_weight))
        for part, block in blocks(X):
            centred, exponent = centre(block, self.mean)
            rows[part, :-1] = times_power(centred @ self.projection, exponent)
        return rows

    def coordinates(self, responses: Float, sample_weight: Float) -> Float:
        """Least-squares ``u`` of ``rows u = responses``: (n, m) -> (r + 1, m)."""
        products: Float = self.rows.T @ (sample_weight[:, None] * responses)
        products[:-1] /= (self.filter**2)[:, None]
        return products


@np.errstate(all="ignore")
def whiten(
    X: FloatMatrix,
    sample_weight: Float | None = None,
    *,
    rank: int | float | None = None,
    spectral_filter: float | None = None,
    input_eps: float = EPS,
) -> Whitening:
    """Whiten training data in float64: a QR of ``[1, X]`` and an SVD of its triangle.

    Many rows are read in blocks, whatever their type, and whitened by their Gram matrix, as long as it resolves the
    directions that are asked for.

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
    spectral_filter : float or None, default=None
        ``tau / s_1 > 0`` of the filter ``phi_i = s_i / sqrt(s_i^2 + tau^2)``, on the singular values that ``rank``
        refers to. Directions with ``phi_i < 2^-26`` are left out.
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
    weights = np.ones(len(X)) if sample_weight is None else sample_weight
    width = X.shape[1] + 1
    if len(X) > 2 * max(BLOCK_ROWS, width):
        found = _by_gram(X, weights, rank, spectral_filter, input_eps)
        if found is not None:
            return found
        if is_mapped(X, X.shape[1]):
            raise ValueError(
                f"the {len(X)} patches do not vary enough in every direction to be whitened in blocks: keep fewer "
                "directions with rank=, or shrink them with spectral_filter=."
            )
    return _by_qr(np.asarray(X, dtype=np.float64), weights, rank, spectral_filter, input_eps)


def _by_qr(
    X: FloatMatrix, weights: Float, rank: int | float | None, spectral_filter: float | None, input_eps: float
) -> Whitening:
    """All directions that float64 resolves."""
    total = float(weights.sum())
    scaled, exponents = _unit_columns(X)
    mean = weights @ scaled / total
    centred = scaled - mean
    residual_mean = weights @ centred / total  # offsets of 1e12 leave a mean of 1e-3 behind: centre twice
    centred -= residual_mean
    mean += residual_mean
    norms = np.sqrt(np.einsum("ij,ij,i->j", centred, centred, weights))
    columns = _Columns.of(mean, norms, np.ptp(scaled, axis=0) > 0, exponents, total, input_eps)
    kept = columns.kept
    root = np.sqrt(weights)[:, None]
    Q, R = _constant_and_triangle(root, root * centred[:, kept])

    left, values, right = scipy.linalg.svd(R / norms[kept], full_matrices=False)
    r = _numerical_rank(values, columns.rank_cut)
    basis, directions = left[:, :r], right[:r].T
    back = np.ldexp(directions / values[:r] / norms[kept][:, None], -exponents[kept][:, None])
    phi = np.ones(r)
    if rank is not None or spectral_filter is not None:
        # the same triangle in the user's units, up to one power of two: its top singular directions, as a
        # rotation of the standardised ones, so that mixed units cost no digits
        scaled = np.ldexp(R, exponents[kept] - exponents[kept].max())
        left, values, right = scipy.linalg.svd(scaled, full_matrices=False)
        phi = _kept_filter(values, r, rank, spectral_filter)
        k = len(phi)
        values = np.ldexp(values, exponents[kept].max())
        rotation = _orthonormal(basis.T @ left[:, :k])
        basis, back, directions = basis @ rotation, back @ rotation, right[:k].T
    rows = np.empty((len(X), len(phi) + 1))
    rows[:, :-1] = Q[:, 1:] @ basis / root
    return columns.whitening(rows, back, directions, values, phi, r)


def _by_gram(
    X: FloatMatrix, weights: Float, rank: int | float | None, spectral_filter: float | None, input_eps: float
) -> Whitening | None:
    """The same in blocks of rows; None where the Gram matrix does not resolve all directions that are kept."""
    found = moments(X, weights)
    norms = np.sqrt(np.maximum(found.gram.diagonal(), 0))
    columns = _Columns.of(found.mean, norms, found.varies, found.exponents, float(weights.sum()), input_eps)
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
        values, directions = spectrum(scaled, lambda s: len(_kept_filter(s, len(s), rank, spectral_filter)))
        phi = _kept_filter(values, len(values), rank, spectral_filter)
        resolved = int(np.count_nonzero(values**2 > RESOLVED * values[0] ** 2))
        if len(phi) + (r is None) > resolved:  # also: is there anything beyond?
            return None
        r, directions = r or resolved, directions[:, : len(phi)]
        back = directions / values[: len(phi)]
    projection = _padded(back, kept, X.shape[1])
    if is_mapped(X, len(phi)):
        basis = projection_of(X, weights, found, projection)
    else:
        basis = basis_of(X, weights, np.ldexp(found.mean, found.exponents), projection)
    if basis is None:
        return None
    whitening = columns.whitening(basis.rows, basis.projection[kept], directions, values, phi, r, basis.departure)
    if basis.rows is not None:
        return whitening
    constant = 1 / np.sqrt(whitening.total_weight)
    return replace(whitening, rows=MappedRows(X, whitening.mean, whitening.projection, constant))


@dataclass(frozen=True)
class _Columns:
    """What is known of the columns before any direction: statistics, in units of ``2^exponents``, and which vary."""

    mean: Float
    exponents: np.ndarray
    total: float
    constant: np.ndarray
    rank_cut: float

    @classmethod
    def of(
        cls, mean: Float, norms: Float, varies: np.ndarray, exponents: np.ndarray, total: float, input_eps: float
    ) -> _Columns:
        """Tell the constant columns, and warn of those that nearly are."""
        deviation = norms / np.sqrt(total)
        constant = (deviation <= 8 * input_eps * np.abs(mean)) | ~varies
        if constant.all():
            raise ValueError(
                "all features are constant, so batch normalisation has nothing to normalise: "
                "give at least one feature that varies over the rows of positive weight."
            )
        _warn_of_nearly_constant(np.flatnonzero(constant & varies))
        kept = np.flatnonzero(~constant)
        offsets = np.abs(mean[kept]) / deviation[kept]
        _warn_of_offsets(kept, offsets, input_eps)
        cut = min(len(kept) * input_eps * (1 + offsets.max()), 1 / 16)
        return cls(mean, exponents, total, constant, float(cut))

    @property
    def kept(self) -> np.ndarray:
        """Columns that vary."""
        return np.flatnonzero(~self.constant)

    def whitening(
        self,
        rows: Float | None,
        back: Float,
        directions: Float,
        values: Float,
        phi: Float,
        numerical_rank: int,
        departure: float | None = None,
    ) -> Whitening:
        """The whitening of orthonormal columns ``(X - mean) back``, all but the last of ``rows``, and a filter."""
        if rows is not None:
            rows[:, :-1] *= phi
            rows[:, -1] = 1 / np.sqrt(self.total)
        _refuse_denormal(back, self.kept)
        d = len(self.mean)
        return Whitening(
            rows=rows,
            mean=np.ldexp(self.mean, self.exponents),
            projection=_padded(back * phi, self.kept, d),
            directions=_padded(directions, self.kept, d),
            singular_values=values,
            total_weight=self.total,
            numerical_rank=numerical_rank,
            constant=self.constant,
            rank_cut=self.rank_cut,
            filter=phi,
            departure=departure,
        )


def _unit_columns(X: FloatMatrix) -> tuple[Float, np.ndarray]:
    """Scale each column by a power of two into [-1, 1]: exact, and safe from overflow and underflow."""
    exponents = np.frexp(np.abs(X).max(axis=0))[1]
    return times_power(X, -exponents), exponents


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
            stacklevel=5,
        )
    return int(np.count_nonzero(relative > cut))


def _kept_filter(values: Float, r: int, rank: int | float | None, spectral_filter: float | None) -> Float:
    """``phi`` of the directions that are kept, of ``r`` that there are."""
    relative = values[:r] / values[0]
    phi = np.ones(r) if spectral_filter is None else relative / np.hypot(relative, spectral_filter)
    k = r if rank is None else min(r, _kept_directions(values / values[0], rank))
    return phi[: min(k, int(np.count_nonzero(phi >= FAINTEST)))]


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
            stacklevel=6,
        )


def _warn_of_offsets(kept: np.ndarray, offsets: Float, input_eps: float) -> None:
    worst = int(np.argmax(offsets))
    if offsets[worst] > 1 / np.sqrt(input_eps):
        warnings.warn(
            f"feature {kept[worst]} has |mean| / deviation = {offsets[worst]:.1e}: most digits of its "
            "variation are lost in the input; subtract the offset before storing the data.",
            UserWarning,
            stacklevel=6,
        )
