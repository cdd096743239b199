"""Batch-normalised responses of many neurons, by a basis of the space that their weights span.

``m`` columns of weights, of which at most ``r`` are independent, take ``2 n d r`` flops in place of ``2 n d m``: those
of a network on truncated data span no more than its rank, and no network spans more than the features. The basis is
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
from convexbn.data.moments import Moments, blocks, cached_rows, moments
from convexbn.data.row_matrix import ProjectedRows, Rows, is_projected, row_matrix
from convexbn.data.scaling import powers

#: Columns of the span beyond those that are expected.
_SPARE = 8

#: Share of ``m`` that a basis may take to be worth its making.
_WORTHWHILE = 0.7

#: Rows of a block of the triangle.
_BLOCK_ROWS = 4096

#: Multiple of the machine epsilon, relative to a column, by which the basis may miss it.
_MISSED = 16.0


@dataclass(frozen=True)
class PreActivations:
    """``C X w_j / ||C X w_j|| = basis coefficients[:, j]`` on some rows; made by ``compute``.

    Attributes
    ----------
    rows : ndarray (n, r + 1), or ProjectedRows
        The basis, and the constant column ``1 / sqrt(total weight)``.
    coefficients : ndarray (r, m)
        Zero for a direction on which the rows do not vary.
    norms, offsets : ndarray (m,)
        ``||C X w_j||``, and ``(mu - mean)'w_j`` where a mean other than that of the rows was given.
    covariances : ndarray (d, m), or None
        ``X' C X w_j / ||C X w_j||`` where the Gram matrix is exact.
    """

    rows: Rows
    coefficients: Float
    norms: Float
    offsets: Float
    covariances: np.ndarray | None = None

    @classmethod
    @np.errstate(all="ignore")
    def compute(
        cls,
        X: FloatMatrix,
        weight: Float,
        sample_weight: Float,
        *,
        rank: int | None = None,
        mean: Float | None = None,
    ) -> PreActivations:
        """PreActivations of rows (n, d), with their own statistics, to the columns of ``weight`` (d, m).

        Parameters
        ----------
        X : ndarray (n, d), or PatchMatrix
        weight : ndarray (d, m)
        sample_weight : ndarray (n,)
            Positive weights; norms and means are weighted.
        rank : int, optional
            Number of independent columns that is expected; more are found to be more.
        mean : ndarray (d,), optional
            What ``offsets`` are taken to.
        """
        first, exponents = _units(X)
        scaled = np.ldexp(weight, exponents[:, None])
        lengths = np.frexp(np.abs(scaled).max(axis=0, initial=0.0))[1]
        plain = np.ldexp(scaled, -lengths)
        span, coefficients = _spanned(plain, rank)
        gram = covariances = None
        rows: Rows
        if is_projected(X, span.shape[1]):
            found = moments(X, sample_weight)
            rows, centre = _mapped_basis(X, span, found, sample_weight, first, exponents)
            gram = found.exact
        else:
            rows, centre = _kept_basis(X, span, sample_weight, first, exponents)
        if gram is None:
            norms = _norms(rows, coefficients, sample_weight)
        else:
            norms, covariances = _by_gram(gram, np.ldexp(plain, -exponents[:, None]))
        with np.errstate(all="ignore"):
            unit = np.where(norms > 0, coefficients / np.where(norms > 0, norms, 1.0), 0.0)
        offsets = np.zeros(len(norms))
        if mean is not None:
            offsets = centre @ coefficients
            offsets += (first - np.ldexp(mean, -exponents)) @ plain
        return cls(rows, unit, np.ldexp(norms, lengths), np.ldexp(offsets, lengths), covariances)

    @property
    def normalized(self) -> Float:
        """``C X w_j / ||C X w_j||``, one a column: (n, m)."""
        return self.rows[:][:, :-1] @ self.coefficients

    @property
    def _seen(self) -> Any:
        """The matrix that the rows are made of when they are read."""
        return self.rows.X if isinstance(self.rows, ProjectedRows) else None

    def products(self, rows: Any, sample_weight: Float) -> Float:
        """``A' diag(w) C X w_j / ||C X w_j||`` for rows ``[A, constant]`` (n, q), without the responses: (q - 1, m)."""
        if self.covariances is not None and isinstance(rows, ProjectedRows) and rows.X is self._seen:
            return (rows.projection.T @ self.covariances).astype(np.float64)
        products = np.zeros((rows.shape[1] - 1, len(self.coefficients)))
        for part, block in blocks(rows):
            products += (sample_weight[part, None] * block[:, :-1]).T @ self.rows[part][:, :-1]
        return products @ self.coefficients


def _units(X: FloatMatrix) -> tuple[Float, np.ndarray]:
    """A row of the data, and exponents of the columns' ranges, in units of which that row is given."""
    low, high = (np.asarray(edge, dtype=np.float64) for edge in (X.min(axis=0), X.max(axis=0)))
    wide = np.ldexp(high, -2) - np.ldexp(low, -2)  # may not overflow
    exponents = np.where(wide > 0, np.frexp(wide)[1] + 2, np.frexp(np.abs(high))[1])
    return np.ldexp(np.asarray(X[0], dtype=np.float64), -exponents), exponents


def _spanned(weight: Float, rank: int | None) -> tuple[Float, Float]:
    """Columns (d, r), and coefficients (r, m) that give the weights in them."""
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


def _kept_basis(
    X: FloatMatrix, span: Float, sample_weight: Float, first: Float, exponents: np.ndarray
) -> tuple[Float, Float]:
    """Rows ``[C X span, constant]`` in units of the columns, and the mean that they had, taken to the first row."""
    total = sample_weight.sum()
    rows = np.full((len(X), span.shape[1] + 1), 1 / np.sqrt(total))
    basis = rows[:, :-1]
    row_matrix(X).map(projected, cached_rows(X), shared=[first, span, *powers(-exponents)], out=basis)
    centre = sample_weight @ basis / total
    basis -= centre
    again = sample_weight @ basis / total  # offsets leave a mean behind: centre twice
    basis -= again
    return rows, centre + again


def _mapped_basis(
    X: Any, span: Float, found: Moments, sample_weight: Float, first: Float, exponents: np.ndarray
) -> tuple[ProjectedRows, Float]:
    """The same for rows that are made when they are read."""
    mean = np.ldexp(found.mean, found.exponents)
    rows = ProjectedRows(X, mean, np.ldexp(span, -exponents[:, None]), 1 / np.sqrt(sample_weight.sum()))
    return rows, (np.ldexp(mean, -exponents) - first) @ span


def _by_gram(gram: np.ndarray, weight: Float) -> tuple[Float, np.ndarray]:
    """``||C X w_j||`` and ``X' C X w_j / ||C X w_j||`` by the exact Gram matrix of the columns, without the rows."""
    covariances = gram @ weight
    norms = np.sqrt(np.maximum(np.einsum("ij,ij->j", weight, covariances), 0)).astype(np.float64)
    return norms, covariances / np.where(norms > 0, norms, np.inf)


def _norms(rows: Rows, coefficients: Float, sample_weight: Float) -> Float:
    """Weighted norms of ``basis coefficients[:, j]``, by the triangle of the basis, all columns but the last."""
    r = rows.shape[1] - 1
    triangle = np.zeros((0, r))
    for part in BlockSize(1, _BLOCK_ROWS).slices(len(rows)):
        stacked = np.vstack([triangle, np.sqrt(sample_weight[part])[:, None] * rows[part][:, :-1]])
        triangle = scipy.linalg.qr(stacked, mode="r", check_finite=False)[0][:r]
    return np.linalg.norm(triangle @ coefficients, axis=0)
