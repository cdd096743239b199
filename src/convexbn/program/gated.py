"""The gated convex program on whitened data: an operator, a norm and a loss.

    min over S_i   L(sum_i D_i A S_i) + weight_decay * sum_i ||S_i||

with fixed gates ``D_i`` (mathematics, section 2b). Its dual is ``max_V D(V)`` subject to
``max_i ||A' D_i V||_* <= weight_decay``: exact and cheap to check.

Dense: the operator masks the rows, ``S_i`` is (q, K), and the norm is Frobenius'. Convolutional: with fixed gates the
pooled units are linear in the weights, ``F = sum_i sum_r T_r D_i A S_ir``, so that the rows ``B_i = [T_r D_i A]`` of a
gate are computed once, and an image costs what a row costs elsewhere. With several regions many neurons share a gate,
each with a filter and an output layer over the regions, and the norm is the nuclear norm of ``S_i`` (q, R K)
(mathematics, section 3).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np

from convexbn._types import EPS, Bool, Float, FloatMatrix, Index
from convexbn.data.blocks import BlockSize
from convexbn.data.row_matrix import Rows, row_matrix
from convexbn.program.kernels import masked_correlations, masked_outputs
from convexbn.program.losses import Loss
from convexbn.program.readout import Readout

#: Entries of the row-wise products held at once: 4 MB in float64, 2 MB in float32; and the fewest rows of a block.
_BLOCK_ENTRIES, _LEAST_ROWS = 1 << 19, 64
#: Entries of pooled rows that are formed at a time.
_POOLED_ENTRIES = 1 << 22


class GateBlocks(NamedTuple):
    """Nonzero blocks of a gated program: the gates (m,) that they are on, and their values (m, q, K)."""

    gate_index: Index
    values: Float


def block_norms(blocks: Float) -> Float:
    """Frobenius norm of every block: (m, q, K) -> (m,)."""
    return np.sqrt(np.einsum("mqk,mqk->m", blocks, blocks))


@dataclass(frozen=True)
class Frobenius:
    """Frobenius norm of blocks, its own dual.

    Examples
    --------
    >>> Frobenius().of(np.array([[[3.0], [4.0]]])), Frobenius().prox(np.array([[[3.0], [4.0]]]), 2.5).ravel()
    (array([5.]), array([1.5, 2. ]))
    """

    name = "Frobenius"
    of = dual = staticmethod(block_norms)

    def prox(self, blocks: Float, threshold: float) -> Float:
        """Proximal map of ``threshold * sum_i ||S_i||``: ``(1 - threshold / ||S_i||)_+ S_i``."""
        norms = block_norms(blocks)
        factors = np.maximum(1 - np.divide(threshold, norms, out=np.ones_like(norms), where=norms > 0), 0)
        return factors[:, None, None] * blocks


@dataclass(frozen=True)
class Nuclear:
    """Nuclear norm of blocks, the sum of their singular values; the dual norm is the largest one.

    Examples
    --------
    >>> float(Nuclear().of(np.diag([3.0, 4.0])[None])[0]), float(Nuclear().dual(np.diag([3.0, 4.0])[None])[0])
    (7.0, 4.0)
    """

    name = "nuclear"

    def of(self, blocks: Float) -> Float:
        """Sum of the singular values of every block: (m, q, K) -> (m,)."""
        return np.linalg.svd(blocks, compute_uv=False).sum(axis=1)

    def dual(self, correlations: Float) -> Float:
        """Largest singular value of every correlation: (m, q, K) -> (m,)."""
        return np.linalg.svd(correlations, compute_uv=False).max(axis=1, initial=0.0)

    def prox(self, blocks: Float, threshold: float) -> Float:
        """Proximal map of ``threshold * sum_i ||S_i||``: the singular values lose the threshold."""
        left, values, right = np.linalg.svd(blocks, full_matrices=False)
        return (left * np.maximum(values - threshold, 0)[:, None, :]) @ right


Norm: TypeAlias = Frobenius | Nuclear


@dataclass(frozen=True)
class MaskedRows:
    """Operator ``F = sum_j D_i(j) A S_j`` from blocks to outputs: a gate masks the rows on which it is closed.

    Both kernels are matrix products of ``2 n q P K`` flops in the precision of ``rows``. The row-wise products that
    they read are formed in cache-sized blocks of rows: no ``n x qK`` or ``n x PK`` array is ever in memory.

    Parameters
    ----------
    rows : ndarray (n, q) or RowMatrix
        Whitened rows ``A`` with the constant column, ``q = r + 1``.
    patterns : ndarray (n, P) of bool
        Diagonals of the gates ``D_i``.
    """

    rows: Any
    patterns: Bool
    readout: ClassVar[Readout] = Readout()
    norm: ClassVar[Norm] = Frobenius()

    def block_shape(self, n_outputs: int) -> tuple[int, int]:
        """Shape ``(q, K)`` of a block for ``K`` outputs."""
        return self.rows.shape[1], n_outputs

    def of_cases(self, index: Index) -> MaskedRows:
        """Operator of some of the rows."""
        return MaskedRows(row_matrix(self.rows).of_cases(index), self.patterns[index])

    def gate(self, gate: int) -> Float:
        """``D_i A`` of one gate: (n, q)."""
        return self.patterns[:, [gate]] * self.rows

    def apply(self, gate_index: Index | None, blocks: Float) -> Float:
        """Outputs ``F`` (n, K) of blocks (m, q, K) on the gates ``gate_index`` (m,), or on all."""
        (q, K), dtype = blocks.shape[1:], self.rows.dtype
        shared = [blocks.transpose(0, 2, 1).astype(dtype, copy=False), gate_index]
        return row_matrix(self.rows).map(masked_outputs, self._size(q * K), along=[self.patterns], shared=shared)

    def adjoint(self, dual: Float, gate_index: Index | None = None) -> Float:
        """Correlations ``A' D_i V`` of a dual point (n, K) for every gate, or those of ``gate_index``: (P, q, K)."""
        (q, K), dtype = self.block_shape(dual.shape[1]), self.rows.dtype
        along, size = [self.patterns, dual.astype(dtype, copy=False)], self._size(q * K)
        (total,) = row_matrix(self.rows).reduce(masked_correlations, size, along=along, shared=[gate_index])
        return np.ascontiguousarray(total.reshape(-1, K, q).transpose(0, 2, 1))

    def rounding(self, dual: Float, weights: Float) -> float:
        """Bound on the error of a norm of ``adjoint(dual)`` from rounding in float64."""
        n, q = self.rows.shape
        scaled = np.linalg.norm(dual / np.sqrt(weights)[:, None])
        return float((n + q + 4) * EPS * np.sqrt(q) * scaled)

    def _size(self, width: int) -> BlockSize:
        return BlockSize(max(width, self.patterns.shape[1]), _BLOCK_ENTRIES, _LEAST_ROWS)


@dataclass(frozen=True)
class PooledFeatures:
    """Operator ``F = sum_j B_i(j) S_j`` with ``B_i = [T_r D_i A]``, the pooled rows of images under every gate.

    Parameters
    ----------
    rows, patterns, readout : ndarray (N, q) or RowMatrix, ndarray (N, P) of bool, Readout
        Whitened patches, the gates on them, and average pooling.
    features : ndarray (n, P, q R)
        ``B_i``, with the regions of a whitened direction side by side.
    """

    rows: Any
    patterns: Bool
    readout: Readout
    features: FloatMatrix

    @property
    def norm(self) -> Norm:
        """Nuclear if several neurons share a gate, each with an output layer over the regions."""
        return Nuclear() if self.readout.n_regions > 1 else Frobenius()

    def block_shape(self, n_outputs: int) -> tuple[int, int]:
        """Shape ``(q, R K)`` of a block: weights of a filter, times those of an output layer."""
        R = self.readout.n_regions
        return self.features.shape[2] // R, R * n_outputs

    def of_cases(self, index: Index) -> PooledFeatures:
        """Operator of some of the images."""
        count = self.readout.rows_per_case
        patterns = self.patterns.reshape(-1, count, self.patterns.shape[1])[index].reshape(-1, self.patterns.shape[1])
        rows = row_matrix(self.rows).of_cases(index, count)
        return replace(self, rows=rows, patterns=patterns, features=self.features[index])

    def gate(self, gate: int) -> Float:
        """``B_i`` of one gate: (n, q R)."""
        return self.features[:, gate]

    def apply(self, gate_index: Index | None, blocks: Float) -> Float:
        """Outputs ``F`` (n, K) of blocks (m, q, R K) on the gates ``gate_index`` (m,), or on all."""
        n, P, width = self.features.shape
        every = gate_index is None or np.array_equal(gate_index, np.arange(P))
        features = (self.features if every else self.features[:, gate_index]).reshape(n, len(blocks) * width)
        return features @ blocks.reshape(features.shape[1], blocks.shape[2] // self.readout.n_regions)

    def adjoint(self, dual: Float, gate_index: Index | None = None) -> Float:
        """Correlations ``B_i'V`` of a dual point (n, K) for every gate, or those of ``gate_index``: (P, q, R K)."""
        features = self.features if gate_index is None else self.features[:, gate_index]
        flat = features.reshape(len(features), features.shape[1] * features.shape[2])
        products: Float = flat.T @ dual
        return products.reshape(features.shape[1], *self.block_shape(dual.shape[1]))

    def rounding(self, dual: Float, weights: Float) -> float:
        """Bound on the error of a norm of ``adjoint(dual)`` from rounding, that of the features included."""
        n, _, width = self.features.shape
        terms = n + self.readout.rows_per_case + width + 4
        scaled = np.linalg.norm(dual / np.sqrt(weights)[:, None]) * self.readout.norm
        return float(terms * EPS * np.sqrt(width) * scaled)


def gated_operator(rows: Rows, patterns: Bool, readout: Readout | None = None) -> MaskedRows | PooledFeatures:
    """Operator of whitened rows and gates, pooled if a readout pools.

    Max pooling is a ``ValueError``: it is not linear in the weights under fixed gates.

    Parameters
    ----------
    rows, patterns : ndarray (N, q) or RowMatrix, ndarray (N, P) of bool
    readout : Readout, optional
    """
    if readout is None or readout.rows_per_case == 1:
        return MaskedRows(rows, patterns)
    if not readout.linear:
        raise ValueError(
            "gated networks are linear under fixed gates, and max pooling is not: use pooling='average', or "
            "activation='relu'."
        )
    return PooledFeatures(rows, patterns, readout, _pool_features(rows, patterns, readout))


def _pool_features(rows: Rows, patterns: Bool, readout: Any) -> Float:
    """``T_r D_i A`` of every image and gate: (n, P, q R)."""
    (N, q), P, averages = rows.shape, patterns.shape[1], readout.regions.averages
    R, count = averages.shape
    features = np.empty((N // count, P, q, R))
    for images in BlockSize(count * max(P, q * R), _POOLED_ENTRIES).slices(N // count):
        part = slice(images.start * count, images.stop * count)
        spread = np.einsum("rk,nkq->nkqr", averages, rows[part].reshape(-1, count, q), optimize=True)
        opened = patterns[part].reshape(-1, count, P).transpose(0, 2, 1).astype(np.float64)
        flat = opened @ spread.reshape(len(spread), count, -1)
        features[images] = flat.reshape(len(flat), P, q, -1)
    return features.reshape(len(features), P, -1)


def gated_outputs(rows: Rows, patterns: Bool, blocks: Float, readout: Readout) -> Float:
    """Outputs (n, K) on any rows, for one block on each gate.

    Parameters
    ----------
    rows, patterns : ndarray (N, q) or RowMatrix, ndarray (N, m) of bool
    blocks, readout : ndarray (m, q, R K), linear Readout
    """
    index, count = np.arange(len(blocks)), readout.rows_per_case
    if count == 1:
        return MaskedRows(rows, patterns).apply(index, blocks)
    images = BlockSize(count * max(len(index), blocks.shape[2]), _POOLED_ENTRIES).slices(len(rows) // count)
    parts = (slice(part.start * count, part.stop * count) for part in images)
    masked = (MaskedRows(rows[part], patterns[part]) for part in parts)
    return np.concatenate([readout.gather(some.apply(index, blocks)) for some in masked])


@dataclass(frozen=True)
class GatedProgram:
    """Data of the program.

    Parameters
    ----------
    operator : MaskedRows or PooledFeatures
    loss, weight_decay : Loss, float
        Loss bound to targets (n, K) and sample weights, and beta of the mathematics.

    Examples
    --------
    >>> from convexbn.program.losses import SquaredLoss
    >>> operator = MaskedRows(np.eye(2), np.ones((2, 1), dtype=bool))
    >>> program = GatedProgram(operator, SquaredLoss(np.array([[3.0], [4.0]]), np.ones(2)), weight_decay=1.0)
    >>> program.max_weight_decay()
    5.0
    """

    operator: Any
    loss: Loss
    weight_decay: float

    @property
    def norm(self) -> Any:
        """Penalty of a block, that of the operator."""
        return self.operator.norm

    @property
    def block_shape(self) -> tuple[int, int]:
        """Shape of one block ``S_i``."""
        return self.operator.block_shape(self.loss.targets.shape[1])

    @property
    def n_gates(self) -> int:
        """Number of gates ``P``."""
        return int(self.operator.patterns.shape[1])

    def in_single_precision(self) -> GatedProgram:
        """Program with float32 kernels: twice as fast, for iterates that float64 judges."""
        return replace(self, operator=replace(self.operator, rows=self.operator.rows.astype(np.float32)))

    def with_weight_decay(self, weight_decay: float) -> GatedProgram:
        """Program at another weight decay, with the correlations at zero if they are known."""
        other = replace(self, weight_decay=weight_decay)
        if "correlations_at_zero" in self.__dict__:
            other.__dict__["correlations_at_zero"] = self.correlations_at_zero
        return other

    def outputs(self, gate_index: Index, blocks: Float) -> Float:
        """``F`` (n, K) of blocks on the gates ``gate_index`` (m,)."""
        return self.operator.apply(gate_index, blocks)

    def correlations(self, dual: Float, gate_index: Index | None = None) -> Float:
        """``A' D_i V`` for every gate, or those of ``gate_index``: (P, q, K)."""
        return self.operator.adjoint(dual, gate_index)

    def correlation_norms(self, dual: Float) -> Float:
        """Dual norm ``||A' D_i V||`` for every gate: (P,)."""
        return self.norm.dual(self.correlations(dual))

    def dual_norm_bound(self, dual: Float) -> tuple[float, float]:
        """Upper bound of ``max_i ||A' D_i V||``, and the part of it that covers rounding."""
        rounding = self.correlation_rounding(dual)
        return float(self.correlation_norms(dual).max(initial=0.0) + rounding), rounding

    def correlation_rounding(self, dual: Float) -> float:
        """Bound on the error of ``correlation_norms(dual)`` from rounding in float64."""
        return float(self.operator.rounding(dual, self.loss.weights))

    @functools.cached_property
    def correlations_at_zero(self) -> Float:
        """``A' D_i V0`` of the zero network, ``V0 = -grad L(0)``: (P, q, K)."""
        return self.correlations(self.loss.negative_gradient(np.zeros_like(self.loss.targets)))

    def max_weight_decay(self) -> float:
        """Smallest weight decay at which the zero network is optimal: ``max_i ||A' D_i V0||``, exact."""
        return float(self.norm.dual(self.correlations_at_zero).max(initial=0.0))

    def objective(self, blocks: GateBlocks) -> float:
        """Loss plus penalty of nonzero blocks."""
        value = self.loss.value(self.outputs(*blocks))
        return value + self.weight_decay * float(self.norm.of(blocks.values).sum())
