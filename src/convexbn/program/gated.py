"""The gated convex program on whitened data, for one or K outputs.

    min over S_i in R^{(r+1) x K}   L(sum_i D_i A S_i) + weight_decay * sum_i ||S_i||_F

with fixed gates ``D_i`` (mathematics, section 2b). Its dual is ``max_V D(V)`` subject to
``max_i ||A' D_i V||_F <= weight_decay``: exact and cheap to check.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from convexbn._types import EPS, Bool, Float, Index
from convexbn.program.losses import Loss

#: Entries of the row-wise products held at once: 4 MB in float64, 2 MB in float32.
_BLOCK_ENTRIES = 1 << 19


@dataclass(frozen=True)
class GatedProgram:
    """Data of the program.

    Parameters
    ----------
    rows : ndarray (n, q)
        Whitened rows ``A`` with the constant column, ``q = r + 1``.
    patterns : ndarray (n, P) of bool
        Diagonals of the gates ``D_i``.
    loss : Loss
        Loss bound to targets (n, K) and sample weights.
    weight_decay : float
        Strength of the weight decay, beta of the mathematics.

    Notes
    -----
    Both kernels are matrix products of ``2 n q P K`` flops in the precision of ``rows``; the row-wise product they
    read is made in cache-sized blocks of rows, so that no ``n x qK`` or ``n x PK`` array is ever in memory.
    """

    rows: Float
    patterns: Bool
    loss: Loss
    weight_decay: float

    @property
    def on_rows(self) -> Loss:
        """The loss as the rows see it."""
        return self.loss

    @property
    def penalty(self) -> str:
        """Norm of a block: ``"Frobenius"``."""
        return "Frobenius"

    def norms(self, blocks: Float) -> Float:
        """Norm of every block: (m, q, K) -> (m,)."""
        return block_norms(blocks)

    def dual_norms(self, correlations: Float) -> Float:
        """Dual norm of every correlation: (m, q, K) -> (m,)."""
        return block_norms(correlations)

    def shrink(self, blocks: Float, threshold: float) -> Float:
        """Proximal map of ``threshold * sum_i ||S_i||``: ``(1 - threshold / ||S_i||)_+ S_i``."""
        norms = block_norms(blocks)
        factors = np.maximum(1 - np.divide(threshold, norms, out=np.ones_like(norms), where=norms > 0), 0)
        shrunk: Float = factors[:, None, None] * blocks
        return shrunk

    @property
    def block_shape(self) -> tuple[int, int]:
        """Shape ``(q, K)`` of one block ``S_i``."""
        return self.rows.shape[1], self.loss.targets.shape[1]

    @property
    def n_gates(self) -> int:
        """Number of gates ``P``."""
        return int(self.patterns.shape[1])

    def in_single_precision(self) -> GatedProgram:
        """The same program with float32 kernels: twice as fast, for iterates that float64 judges."""
        return replace(self, rows=self.rows.astype(np.float32))

    def gated_rows(self, gate: int) -> Float:
        """``D_i A`` of one gate: (n, q)."""
        return self.patterns[:, [gate]] * self.rows

    def with_weight_decay(self, weight_decay: float) -> GatedProgram:
        """The same program at another weight decay."""
        return replace(self, weight_decay=weight_decay)

    def outputs(self, gate_index: Index, blocks: Float) -> Float:
        """``F = sum_j D_{i(j)} A S_j`` for blocks (m, q, K) on the gates ``gate_index`` (m,): (n, K)."""
        q, K = self.block_shape
        result = np.empty((len(self.rows), K), dtype=self.rows.dtype)
        stacked = blocks.transpose(0, 2, 1).reshape(-1, K * q).astype(self.rows.dtype, copy=False)
        for part in self._row_blocks(q * K):
            summed = self._opened(part, gate_index) @ stacked  # sum_j D_j S_j, row by row
            np.einsum("nkq,nq->nk", summed.reshape(-1, K, q), self.rows[part], out=result[part])
        return result

    def outputs_on(self, rows: Any, patterns: Bool, blocks: Float) -> Float:
        """Outputs on other rows (n, q') with patterns (n, m) for blocks (m, q', K), one a pattern: (n, K)."""
        return replace(self, rows=rows, patterns=patterns).outputs(np.arange(len(blocks)), blocks)

    def correlations(self, dual: Float, gate_index: Index | None = None) -> Float:
        """``A' D_i V`` for every gate (or those of ``gate_index``): (P, q, K)."""
        q, K = self.block_shape
        count = self.n_gates if gate_index is None else len(gate_index)
        total = np.zeros((count, K * q), dtype=self.rows.dtype)
        dual = dual.astype(self.rows.dtype, copy=False)
        for part in self._row_blocks(q * K):
            products = (dual[part][:, :, None] * self.rows[part][:, None, :]).reshape(-1, K * q)
            total += self._opened(part, gate_index).T @ products
        return np.ascontiguousarray(total.reshape(count, K, q).transpose(0, 2, 1))

    def correlation_norms(self, dual: Float) -> Float:
        """``||A' D_i V||``, the dual norm, for every gate: (P,)."""
        return self.dual_norms(self.correlations(dual))

    def dual_norm_bound(self, dual: Float) -> tuple[float, float]:
        """Upper bound of ``max_i ||A' D_i V||``, and the part of it that covers rounding."""
        rounding = self.correlation_rounding(dual)
        return float(self.correlation_norms(dual).max(initial=0.0) + rounding), rounding

    def correlation_rounding(self, dual: Float) -> float:
        """What rounding may take from a norm of ``correlations(dual)`` in float64."""
        n, q = self.rows.shape
        scaled = np.linalg.norm(dual / np.sqrt(self.loss.weights)[:, None])
        return float((n + q + 4) * EPS * np.sqrt(q) * scaled)

    def max_weight_decay(self) -> float:
        """Smallest weight decay at which the zero network is optimal: ``max_i ||A' D_i V0||``, exact."""
        n, K = self.loss.targets.shape
        dual = self.loss.negative_gradient(np.zeros((n, K)))
        return float(self.correlation_norms(dual).max(initial=0.0))

    def _opened(self, part: slice, gate_index: Index | None) -> Float:
        patterns = self.patterns[part] if gate_index is None else self.patterns[part][:, gate_index]
        return patterns.astype(self.rows.dtype, copy=False)

    def _row_blocks(self, width: int) -> Iterator[slice]:
        size = max(64, _BLOCK_ENTRIES // max(width, self.n_gates, 1))
        for start in range(0, len(self.rows), size):
            yield slice(start, start + size)


def block_norms(blocks: Float) -> Float:
    """Frobenius norm of every block: (m, q, K) -> (m,)."""
    norms: Float = np.sqrt(np.einsum("mqk,mqk->m", blocks, blocks))
    return norms
