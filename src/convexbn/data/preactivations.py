"""Batch-normalised responses of many neurons, by a basis of the space that their weights span.

``m`` columns of weights of which ``r`` are independent take ``2 n d r`` flops instead of ``2 n d m``. The weights of a
network on truncated data span no more than its rank, and no weights span more than the features. The basis is
orthonormal for columns of the data in units of their range, so that rounding is that of the plain product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg

from convexbn._types import EPS, Float, FloatMatrix
from convexbn.data.blocks import BlockSize
from convexbn.data.kernels import projected
from convexbn.data.moments import blocks, cached_rows, moments
from convexbn.data.row_matrix import ProjectedRows, Rows, is_projected, row_matrix
from convexbn.data.scaling import centre_columns, powers

#: Columns of the span beyond those that are expected.
_SPARE = 8
#: Share of ``m`` up to which a basis is worth computing.
_WORTHWHILE = 0.7
#: Rows of a block of the triangle.
_BLOCK_ROWS = 4096
#: Multiple of the machine epsilon, relative to a column, by which the basis may miss it.
_MISSED = 16.0


@dataclass(frozen=True)
class PreActivations:
    """``C X w_j / ||C X w_j|| = basis coefficients[:, j]`` on some rows; made by ``compute``.

    ``rows`` (n, r + 1) are the basis and the constant column ``1 / sqrt(total weight)``. ``coefficients`` (r, m) are
    zero for a neuron that does not vary on the rows. ``norms`` (m,) are ``||C X w_j||``, and ``offsets`` (m,) are
    ``(mu - mean)'w_j`` if a ``mean`` other than that of the rows, ``mu``, was given. ``triangle`` (r, r) is that of a
    QR of the centred basis. If the Gram matrix is exact there are instead ``covariances`` (d, m),
    ``X' C X w_j / ||C X w_j||``, and ``directions`` (d, m), ``w_j / ||C X w_j||``.
    """

    rows: Rows
    coefficients: Float
    norms: Float
    offsets: Float
    triangle: Float | None = None
    covariances: np.ndarray | None = None
    directions: np.ndarray | None = None

    @classmethod
    @np.errstate(all="ignore")
    def compute(
        cls, X: FloatMatrix, weight: Float, sample_weight: Float, *, rank: int | None = None, mean: Float | None = None
    ) -> PreActivations:
        """Responses of rows (n, d) to the columns of ``weight`` (d, m), normalised by the rows' own statistics.

        Parameters
        ----------
        X, weight, sample_weight : ndarray (n, d) or PatchMatrix, ndarray (d, m), (n,)
            The sample weights are positive; norms and means are weighted.
        rank : int, optional
            Expected number of independent columns; a larger number is detected.
        mean : ndarray (d,), optional
            Mean from which ``offsets`` are taken.
        """
        first, exponents = _units(X)
        scaled = np.ldexp(weight, exponents[:, None])
        lengths = np.frexp(np.abs(scaled).max(axis=0, initial=0.0))[1]
        plain = np.ldexp(scaled, -lengths)
        span, coefficients = _span_of(plain, rank)
        constant, gram = 1 / np.sqrt(sample_weight.sum()), None
        rows: Any
        triangle = covariances = directions = None
        if is_projected(X, span.shape[1]):
            found = moments(X, sample_weight)
            own, gram = np.ldexp(found.mean, found.exponents), found.exact
            rows = ProjectedRows(X, own, np.ldexp(span, -exponents[:, None]), constant)
            centre = (np.ldexp(own, -exponents) - first) @ span
        else:
            rows = np.full((len(X), span.shape[1] + 1), constant)
            row_matrix(X).map(projected, cached_rows(X), shared=[first, span, *powers(-exponents)], out=rows[:, :-1])
            centre = centre_columns(rows[:, :-1], sample_weight)
        if gram is None:
            triangle = _triangle(rows, sample_weight)
            norms = np.linalg.norm(triangle @ coefficients, axis=0)
        else:
            by_feature = np.ldexp(plain, -exponents[:, None])
            covariances = gram @ by_feature
            norms = np.sqrt(np.maximum(np.einsum("ij,ij->j", by_feature, covariances), 0)).astype(np.float64)
            lengths_or_none = np.where(norms > 0, norms, np.inf)
            covariances, directions = covariances / lengths_or_none, by_feature / lengths_or_none
        unit = np.divide(coefficients, norms, out=np.zeros_like(coefficients), where=norms > 0)
        offsets = np.zeros(len(norms))
        if mean is not None:
            offsets = centre @ coefficients
            offsets += (first - np.ldexp(mean, -exponents)) @ plain
        norms, offsets = np.ldexp(norms, lengths), np.ldexp(offsets, lengths)
        return cls(rows, unit, norms, offsets, triangle, covariances, directions)

    @property
    def normalized(self) -> Float:
        """``C X w_j / ||C X w_j||``, one per column: (n, m)."""
        return self.rows[:][:, :-1] @ self.coefficients

    def orthonormal(self) -> Float:
        """Coordinates of ``C X w_j / ||C X w_j||``, weighted, in an orthonormal basis, one per column."""
        if self.triangle is not None:
            return self.triangle @ self.coefficients
        assert self.covariances is not None
        assert self.directions is not None
        gram = self.directions.T @ self.covariances.astype(np.float64)
        values, vectors = scipy.linalg.eigh((gram + gram.T) / 2)
        found: Float = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
        return found

    def products(self, rows: Any, sample_weight: Float) -> Float:
        """``A' diag(w) C X w_j / ||C X w_j||`` for rows ``[A, constant]`` (n, q), without the responses: (q - 1, m)."""
        if self.covariances is not None and isinstance(rows, ProjectedRows) and rows.X is getattr(self.rows, "X", None):
            return (rows.projection.T @ self.covariances).astype(np.float64)
        products = np.zeros((rows.shape[1] - 1, len(self.coefficients)))
        for part, block in blocks(rows):
            products += (sample_weight[part, None] * block[:, :-1]).T @ self.rows[part][:, :-1]
        return products @ self.coefficients


def _units(X: FloatMatrix) -> tuple[Float, np.ndarray]:
    """First row in units of the columns' ranges, and the binary exponents of these units."""
    low, high = (np.asarray(edge, dtype=np.float64) for edge in (X.min(axis=0), X.max(axis=0)))
    wide = np.ldexp(high, -2) - np.ldexp(low, -2)  # may not overflow
    exponents = np.where(wide > 0, np.frexp(wide)[1] + 2, np.frexp(np.abs(high))[1])
    return np.ldexp(np.asarray(X[0], dtype=np.float64), -exponents), exponents


def _span_of(weight: Float, rank: int | None) -> tuple[Float, Float]:
    """Basis (d, r) of the span of the weights (d, m), and their coefficients (r, m) in it."""
    d, m = weight.shape
    sampled = min(d, m if rank is None else rank + _SPARE)
    if sampled <= _WORTHWHILE * min(d, m):
        draws = np.random.default_rng(0).standard_normal((m, sampled))
        span = scipy.linalg.qr(weight @ draws, mode="economic", check_finite=False)[0]
        coefficients = span.T @ weight
        missed = np.linalg.norm(weight - span @ coefficients, axis=0)
        if np.all(missed <= _MISSED * np.sqrt(d) * EPS * np.linalg.norm(weight, axis=0)):
            return span, coefficients
    return (weight, np.eye(m)) if m <= d else (np.eye(d), weight)


def _triangle(rows: Rows, sample_weight: Float) -> Float:
    """Triangle of a QR of the weighted basis, all columns but the last."""
    r = rows.shape[1] - 1
    triangle = np.zeros((0, r))
    for part in BlockSize(1, _BLOCK_ROWS).slices(len(rows)):
        stacked = np.vstack([triangle, np.sqrt(sample_weight[part])[:, None] * rows[part][:, :-1]])
        triangle = scipy.linalg.qr(stacked, mode="r", check_finite=False)[0][:r]
    return triangle
