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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
import scipy.linalg

from convexbn._typing import Float, FloatMatrix
from convexbn.gram_basis import RESOLVED, basis_of, projection_of, rank_of_standardised, spectrum
from convexbn.moments import blocks, moments

#: Rows a block in the tall QR: one block costs well under a second, so that Ctrl-C is answered.
BLOCK_ROWS = 4096

#: Binary exponents of columns up to which their squares are far from overflow and underflow.
_ORDINARY = 300

#: Directions that the spectral filter shrinks below this are left out, as a truncation.
FAINTEST = 2.0**-26

#: Entries of whitened patches up to which they are kept, and of responses that are formed at a time beyond.
_KEPT_ENTRIES, _RESPONSES = 1 << 26, 1 << 24


@dataclass(frozen=True, eq=False)
class MappedRows:
    """Whitened rows ``[(X - mean) projection, constant]`` of rows that are too many to keep, made when they are read.

    Attributes
    ----------
    X : matrix (n, d)
        With ``rows_together`` and ``of_images``, such as ``PatchMatrix``.
    mean : ndarray (d,)
    projection : ndarray (d, r)
        Of float64 or float32, as the rows are to be.
    constant : float
    """

    X: Any
    mean: FloatMatrix
    projection: FloatMatrix
    constant: float

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, r + 1)``."""
        return len(self.X), self.projection.shape[1] + 1

    @property
    def size(self) -> int:
        """Entries."""
        return self.shape[0] * self.shape[1]

    def __len__(self) -> int:
        return len(self.X)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Precision in which rows are made."""
        return self.projection.dtype

    def __getitem__(self, part: slice) -> FloatMatrix:
        return self._whitened(self.X[part])

    def of_images(self, index: Any) -> FloatMatrix:
        """The rows of some images."""
        return self._whitened(self.X.of_images(index))

    def in_single_precision(self, factor: float = 1.0) -> MappedRows:
        """The rows times a factor, in float32."""
        mean, projection = self.mean.astype(np.float32), (factor * self.projection).astype(np.float32)
        return MappedRows(self.X, mean, projection, factor * self.constant)

    def _whitened(self, block: FloatMatrix) -> FloatMatrix:
        rows = np.empty((len(block), self.shape[1]), dtype=self.dtype)
        centred = block.astype(self.dtype)
        centred -= self.mean
        np.matmul(centred, self.projection, out=rows[:, :-1])
        rows[:, -1] = self.constant
        return rows


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
        mapped = isinstance(self.rows, MappedRows)
        return replace(
            self,
            rows=replace(self.rows, projection=projection)
            if mapped
            else np.hstack([self.rows[:, :k] * phi, self.rows[:, -1:]]),
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
            rows[part, :-1] = np.ldexp(centred @ self.projection, exponent)
        return rows

    def coordinates(self, responses: Float, sample_weight: Float) -> Float:
        """Least-squares ``u`` of ``rows u = responses``: (n, m) -> (r + 1, m)."""
        products: Float = self.rows.T @ (sample_weight[:, None] * responses)
        products[:-1] /= (self.filter**2)[:, None]
        return products


def centre(X: FloatMatrix, mean: Float) -> tuple[Float, int]:
    """Return ``(X - mean) / 2^e`` in float64 and the exponent ``e``, 0 unless the difference could overflow."""
    X, exponent = np.asarray(X, dtype=np.float64), _headroom(X, mean)
    if exponent:
        return np.ldexp(X, -exponent) - np.ldexp(mean, -exponent), exponent
    return X - mean, exponent


def _headroom(X: FloatMatrix, mean: Float) -> int:
    """Exponent to take off before a difference that could overflow, else 0."""
    edges = X.min(initial=0), X.max(initial=0), mean.min(initial=0), mean.max(initial=0)
    return 16 if max(abs(float(edge)) for edge in edges) > 2.0**1007 else 0


@np.errstate(all="ignore")
def whiten(
    X: FloatMatrix,
    sample_weight: Float | None = None,
    *,
    rank: int | float | None = None,
    spectral_filter: float | None = None,
    input_eps: float = float(np.finfo(np.float64).eps),
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
        if _is_mapped(X, X.shape[1]):
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
        values, directions = spectrum(gram / norms / norms[:, None])
        back, phi = directions / values / norms[:, None], np.ones(r)
        back = np.ldexp(back, -exponents[:, None])
    else:
        values, directions = spectrum(np.ldexp(gram, exponents + exponents[:, None]))
        resolved = int(np.count_nonzero(values**2 > RESOLVED * values[0] ** 2))
        phi = _kept_filter(values, len(values), rank, spectral_filter)
        if len(phi) + (r is None) > resolved:  # also: is there anything beyond?
            return None
        r, directions = r or resolved, directions[:, : len(phi)]
        back = directions / values[: len(phi)]
    based = projection_of if _is_mapped(X, len(phi)) else basis_of
    basis = based(X, weights, np.ldexp(found.mean, found.exponents), _padded(back, kept, X.shape[1]))
    if basis is None:
        return None
    whitening = columns.whitening(basis.rows, basis.projection[kept], directions, values, phi, r, basis.departure)
    if basis.rows is not None:
        return whitening
    constant = 1 / np.sqrt(whitening.total_weight)
    return replace(whitening, rows=MappedRows(X, whitening.mean, whitening.projection, constant))


def _is_mapped(X: FloatMatrix, rank: int) -> bool:
    """Whether whitened rows are made when they are read: of patches, where they would be too many."""
    return hasattr(X, "of_images") and len(X) * (rank + 1) > _KEPT_ENTRIES


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


@np.errstate(all="ignore")
def batch_normalize(X: FloatMatrix, weight: Float, sample_weight: Float) -> Float:
    """Return ``C X w / ||C X w||`` for every column of ``weight``: (n, d), (d, m) -> (n, m).

    The statistics are those of the rows given, with their weights; the columns of the result have unit
    weighted norm. A direction on which the data do not vary gives a zero column.
    """
    total = sample_weight.sum()
    first = np.asarray(X[0], dtype=np.float64)  # relative to a row: no offset, no overflow
    exponent = _headroom(X, first)
    first, scaled = np.ldexp(first, -exponent), np.ldexp(weight, exponent)
    response = np.empty((len(X), weight.shape[1]))
    for part, rows in blocks(X):
        relative = (np.ldexp(rows, -exponent) if exponent else rows) - first
        np.matmul(relative, scaled, out=response[part])
    response -= sample_weight @ response / total
    response -= sample_weight @ response / total
    peaks = np.abs(response).max(axis=0)
    response /= np.where(peaks > 0, peaks, 1)
    norms = np.sqrt(np.einsum("ij,ij,i->j", response, response, sample_weight))
    normalized: Float = np.divide(response, norms, out=np.zeros_like(response), where=norms > 0)
    return normalized


class RowStatistics:
    """Batch norm of very many rows by their mean and Gram matrix, which are read once for any number of neurons.

    Parameters
    ----------
    X : matrix (n, d)
    sample_weight : ndarray (n,)
    """

    def __init__(self, X: FloatMatrix, sample_weight: Float) -> None:
        found = moments(X, sample_weight)
        self.X, self.mean = X, np.ldexp(found.mean, found.exponents)
        self.gram = np.ldexp(found.gram, found.exponents + found.exponents[:, None])

    def norms(self, weight: Float) -> Float:
        """``||C X w||`` of every column (d, m) of ``weight``: (m,)."""
        norms: Float = np.sqrt(np.maximum(np.einsum("dm,dm->m", weight, self.gram @ weight), 0))
        return norms

    def products(self, weight: Float, projection: Float) -> tuple[Float, np.ndarray]:
        """``projection'C X'`` times the normalised responses of every column of ``weight``, and which of these vary."""
        norms = self.norms(weight)
        return projection.T @ self.gram @ weight / np.where(norms > 0, norms, 1.0), norms > 0

    def blocks(self, weight: Float, together: int) -> Iterator[tuple[slice, Float]]:
        """``batch_normalize`` of rows whose number is a multiple of ``together``, block by block."""
        norms = self.norms(weight)
        scaled = weight * np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
        size = -(-_RESPONSES // (max(weight.shape[1], 1) * together)) * together
        for start in range(0, len(self.X), size):
            part = slice(start, start + size)
            yield part, (np.asarray(self.X[part], dtype=np.float64) - self.mean) @ scaled


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
