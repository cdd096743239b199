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

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from convexbn._types import EPS, Bool, Float, FloatMatrix
from convexbn.data import qr
from convexbn.data.columns import Columns
from convexbn.data.gram import by_gram
from convexbn.data.kernels import projected
from convexbn.data.moments import cached_rows
from convexbn.data.rounding import CutByRounding
from convexbn.data.row_matrix import ProjectedRows, Rows, is_projected, row_matrix
from convexbn.data.scaling import headroom, powers, times_power
from convexbn.data.spectrum import Directions, Kept, kept_filter


@dataclass(frozen=True)
class Whitening:
    """The whitened data ``A`` of a training set, and the map that takes a new row to its row of ``A``.

    Attributes
    ----------
    rows : ndarray (n, r + 1), or ProjectedRows
        Row ``a(x_i) = [(x_i - mean)' projection, 1 / sqrt(total_weight)]`` of every training row. The columns of
        ``diag(sqrt(w)) rows`` are orthogonal, with norms ``filter`` and 1.
    mean : ndarray (d,)
        Weighted column means, in the units of the data.
    projection : ndarray (d, r)
        ``V S^{-1} Phi``: from centred data to the whitened space.
    directions : ndarray (d, r)
        ``V``: right singular vectors (of the standardised columns for ``rank=None``).
    singular_values : ndarray
        All singular values that were found: of the standardised columns for ``rank=None``, else of the centred data, in
        its own units.
    total_weight : float
        Sum of the sample weights: the number of rows if they are 1.
    numerical_rank, rank_cut : int, float
        Number of independent directions in the data, more than ``rank`` if truncated, and the singular value of the
        standardised data, relative to the largest, below which there are none; a direction has its own cut above it.
    cut : CutByRounding
        What was left out although it may be more than rounding.
    constant : ndarray (d,) of bool
        Columns that do not vary. They carry no information and are left out.
    filter : ndarray (r,)
        ``phi``, in (0, 1]; ones without a spectral filter.
    deviations : ndarray (d,)
        Weighted standard deviations of the columns, 0 of constant ones.
    departure : float or None
        Measured departure of ``diag(sqrt(w)) A`` from orthonormal columns, ``||A'A - I||_F``, if the Gram matrix was
        used; None for a QR, which is orthonormal to rounding.
    """

    rows: Rows
    mean: Float
    projection: Float
    directions: Float
    singular_values: Float
    total_weight: float
    numerical_rank: int
    constant: Bool
    rank_cut: float
    filter: Float
    deviations: Float
    cut: CutByRounding
    departure: float | None = None

    @property
    def rank(self) -> int:
        """Number of directions kept, ``r``."""
        return int(self.projection.shape[1])

    @property
    def truncated(self) -> bool:
        """Whether directions that the data have were left out."""
        return self.rank < self.numerical_rank

    @property
    def stretch(self) -> float:
        """Factor of dual norms on ``A`` for its departure from orthonormal columns.

        If ``||A'A - I|| <= delta``, orthonormal columns of the same range are ``Q = A (A'A)^{-1/2}``: coordinates ``s``
        on ``Q`` are ``(A'A)^{-1/2} s`` on ``A``, of a norm of at most ``(1 - delta)^{-1/2} ||s||``. A dual norm, the
        maximum over ``||s|| <= 1``, is on ``Q`` at most this multiple of that on ``A``.
        """
        return float((1 - (self.departure or 0.0)) ** -0.5)

    @property
    def filtered(self) -> bool:
        """Whether a spectral filter shrinks directions."""
        return bool((self.filter < 1).any())

    def leading(self, rank: int | float | None, spectral_filter: float | None = None) -> Whitening:
        """Whitening that ``whiten`` gives for a smaller ``rank`` or with a filter, without another SVD.

        None keeps all directions and the filter. The directions must be in order, as they are unless ``whiten`` was
        called with ``rank=None`` and no filter; a filter cannot follow another one.
        """
        phi = kept_filter(self.singular_values, self.rank, rank, spectral_filter)
        k = len(phi)
        projection, directions = self.projection[:, :k] * phi, self.directions[:, :k].copy()
        if isinstance(self.rows, ProjectedRows):
            rows: Any = replace(self.rows, projection=projection)
        else:
            rows = np.hstack([self.rows[:, :k] * phi, self.rows[:, -1:]])
        phi = self.filter[:k] * phi
        return replace(self, rows=rows, projection=projection, directions=directions, filter=phi)

    def transform(self, X: FloatMatrix) -> Float:
        """Rows of ``A`` (n, r + 1) for new points (n, d), by the stored statistics alone."""
        rows = np.full((len(X), self.rank + 1), 1 / np.sqrt(self.total_weight))
        exponent = headroom(X, self.mean)
        shared = [np.ldexp(self.mean, -exponent), self.projection, *powers(-exponent)]
        row_matrix(X).map(projected, cached_rows(X), shared=shared, out=rows[:, :-1])
        rows[:, :-1] = times_power(rows[:, :-1], exponent)
        return rows

    def coordinates(self, responses: Float, sample_weight: Float) -> Float:
        """Least-squares ``u`` (r + 1, m) of ``rows u = responses`` for responses (n, m)."""
        products = self.rows[:].T @ (sample_weight[:, None] * responses)
        products[:-1] /= (self.filter**2)[:, None]
        return products


@np.errstate(all="ignore")
def whiten(
    X: FloatMatrix,
    sample_weight: Float | None = None,
    *,
    rank: int | float | None = None,
    spectral_filter: float | None = None,
    standardize: bool = False,
    input_eps: float = EPS,
) -> Whitening:
    """Whiten training data in float64: a QR of ``[1, X]`` and an SVD of its triangle.

    Many rows are read in blocks, whatever their type, and whitened by their Gram matrix if it resolves the directions
    that are asked for.

    Standardised columns decide which columns are constant and what the numerical rank is, so that units do not matter.
    ``rank`` refers to the centred data in the user's units, the spectrum that gradient descent sees; ``rank=None``
    keeps all directions, for which units do not matter either.

    Parameters
    ----------
    X : ndarray (n, d)
        Finite data. It is a ``ValueError`` if all features are constant.
    sample_weight : ndarray (n,), optional
        Positive weights; equal to repeating rows (mathematics, section 0b).
    rank : int, float in (0, 1] or None, default=None
        Keep the top ``rank`` directions (at most those that exist), the fewest that hold this share of the variance, or
        all.
    spectral_filter : float or None, default=None
        ``tau / s_1 > 0`` of the filter ``phi_i = s_i / sqrt(s_i^2 + tau^2)``, on the singular values that ``rank``
        refers to. Directions with ``phi_i < 2^-26`` are left out.
    standardize : bool, default=False
        Whether ``rank`` and ``spectral_filter`` refer to the columns divided by their deviations, so that units never
        matter.
    input_eps : float
        Machine epsilon of the numbers that the data may have been rounded to: directions and columns that may be such
        rounding are left out. Numbers of smaller types are exact unless this is said.

    Examples
    --------
    >>> X = np.random.default_rng(0).standard_normal((20, 3))
    >>> A = whiten(X).rows
    >>> bool(np.allclose(A.T @ A, np.eye(4)))
    True
    """
    weights = np.ones(len(X)) if sample_weight is None else sample_weight
    keep, found = Kept(rank, spectral_filter, standardize), None
    if len(X) > 2 * max(qr.BLOCK_ROWS, X.shape[1] + 1):
        found = by_gram(X, weights, keep, input_eps)
        if found is None and is_projected(X, X.shape[1]):
            raise ValueError(
                f"the {len(X)} patches do not vary enough in every direction to be whitened in blocks: keep fewer "
                "directions with rank=, or shrink them with spectral_filter=."
            )
    if found is None:
        found = qr.by_qr(np.asarray(X, dtype=np.float64), weights, keep, input_eps)
    return _filtered(X, *found)


def _filtered(X: FloatMatrix, columns: Columns, found: Directions) -> Whitening:
    """Whitening of orthonormal columns, multiplied by their filter."""
    overflown = np.flatnonzero(~np.isfinite(found.back).all(axis=1))
    if len(overflown):
        raise ValueError(
            f"feature {columns.kept[overflown[0]]} varies by less than 1e-308, where floating point has few digits "
            "left: multiply it by a power of ten; batch norm does not care about units."
        )
    constant = 1 / np.sqrt(columns.total)
    mean = np.ldexp(columns.mean, columns.exponents)
    projection = columns.padded(found.back * found.filter)
    rows: Any = found.rows
    if rows is None:
        rows = ProjectedRows(X, mean, projection, constant)
    else:
        rows[:, :-1] *= found.filter
        rows[:, -1] = constant
    return Whitening(
        rows=rows,
        mean=mean,
        projection=projection,
        directions=columns.padded(found.vectors),
        singular_values=found.values,
        total_weight=columns.total,
        numerical_rank=found.numerical_rank,
        constant=columns.constant,
        rank_cut=columns.rank_cut,
        filter=found.filter,
        deviations=np.ldexp(columns.deviation, columns.exponents),
        cut=found.cut,
        departure=found.departure,
    )
