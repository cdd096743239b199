"""The gated program of a convolutional network: the same on the pooled rows of every gate.

    F = sum_i sum_r T_r D_i A S_ir,   S_ir in R^{(r+1) x K}

With fixed gates the pooled units are linear in the weights, so that the rows ``B_i = [T_r D_i A]`` (n, q R) of a gate
are computed once, and an image costs what a row costs elsewhere. One region: one Frobenius norm a gate, as for dense
data. Several: many neurons share a gate, each with a filter and an output layer over the regions, and the penalty is
the nuclear norm of ``S_i`` in R^{q x R K} (mathematics, sections 2b and 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convexbn._types import EPS, Bool, Float, FloatMatrix, Index
from convexbn.program.gated import GatedProgram, block_norms
from convexbn.program.losses import Loss
from convexbn.program.pooled_loss import PooledLoss

#: Entries of the gated rows that are formed at a time.
_BLOCK_ENTRIES = 1 << 22


@dataclass(frozen=True)
class PooledProgram(GatedProgram):
    """Data of the program; ``rows`` and ``patterns`` are those of all patches, ``loss`` that of the images.

    Parameters
    ----------
    pooled_loss : PooledLoss
        The loss on the rows.
    features : ndarray (n, P, q R)
        ``B_i`` of every gate; the regions of a whitened direction side by side.
    """

    pooled_loss: PooledLoss = field(kw_only=True)
    features: FloatMatrix = field(kw_only=True, repr=False)

    @classmethod
    def of(cls, rows: Float, patterns: Bool, loss: PooledLoss, weight_decay: float) -> PooledProgram:
        """The program on whitened patches (N, q), or rows that are mapped when they are read, and patterns (N, P).

        Raises
        ------
        ValueError
            For max pooling, which is not linear in the weights under fixed gates.
        """
        if not loss.pooling.linear:
            raise ValueError(
                "gated networks are linear under fixed gates, and max pooling is not: use pooling='average', or "
                "activation='relu'."
            )
        features = _pooled(rows, patterns, loss)
        return cls(rows, patterns, loss.of_images, weight_decay, pooled_loss=loss, features=features)

    @property
    def on_rows(self) -> Loss:
        """The loss as the patches see it."""
        return self.pooled_loss

    @property
    def n_regions(self) -> int:
        """``R``."""
        return self.pooled_loss.pooling.n_regions

    @property
    def penalty(self) -> str:
        """Norm of a block: ``"nuclear"`` where there are several regions."""
        return "nuclear" if self.n_regions > 1 else "Frobenius"

    @property
    def block_shape(self) -> tuple[int, int]:
        """Shape ``(q, R K)`` of one block ``S_i``: a filter's weights, and an output layer's."""
        return self.features.shape[2] // self.n_regions, self.n_regions * self.loss.targets.shape[1]

    def in_single_precision(self) -> GatedProgram:
        """The same program with float32 kernels."""
        raise TypeError("this solver does not take convolutional programs: use solver='proximal' or 'conic'.")

    def gated_rows(self, gate: int) -> Float:
        """``B_i`` (n, q R)."""
        return self.features[:, gate]

    def outputs(self, gate_index: Index, blocks: Float) -> Float:
        """``F = sum_j B_{i(j)} S_j`` for blocks (m, q, R K) on the gates ``gate_index`` (m,): (n, K)."""
        n, P, width = self.features.shape
        every = len(gate_index) == P and np.array_equal(gate_index, np.arange(P))
        features = (self.features if every else self.features[:, gate_index]).reshape(n, len(gate_index) * width)
        outputs: Float = features @ blocks.reshape(features.shape[1], self.loss.targets.shape[1])
        return outputs

    def outputs_on(self, rows: Any, patterns: Bool, blocks: Float) -> Float:
        """Outputs on other rows (N, q') of patches with patterns (N, m) for blocks (m, q', R K): (n, K)."""
        index, pooling, outputs = np.arange(len(blocks)), self.pooled_loss.pooling, []
        for part in _image_parts(len(rows), pooling.n_locations, max(len(index), blocks.shape[2])):
            of_part = self.pooled_loss.of_rows(part)
            seen = GatedProgram(rows[part], patterns[part], of_part, self.weight_decay)
            outputs.append(pooling.gather(seen.outputs(index, blocks)))
        return np.concatenate(outputs)

    def correlations(self, dual: Float, gate_index: Index | None = None) -> Float:
        """``B_i'V`` for every gate (or those of ``gate_index``): (P, q, R K)."""
        features = self.features if gate_index is None else self.features[:, gate_index]
        flat = features.reshape(len(features), features.shape[1] * features.shape[2])
        products: Float = flat.T @ dual
        return products.reshape(features.shape[1], *self.block_shape)

    def norms(self, blocks: Float) -> Float:
        """Norm of every block: (m, q, R K) -> (m,)."""
        if self.penalty == "Frobenius":
            return block_norms(blocks)
        total: Float = np.linalg.svd(blocks, compute_uv=False).sum(axis=1)
        return total

    def dual_norms(self, correlations: Float) -> Float:
        """Dual norm of every correlation, the largest singular value where there are several regions."""
        if self.penalty == "Frobenius":
            return block_norms(correlations)
        largest: Float = np.linalg.svd(correlations, compute_uv=False).max(axis=1, initial=0.0)
        return largest

    def shrink(self, blocks: Float, threshold: float) -> Float:
        """Proximal map of the penalty: of the nuclear norm the singular values lose the threshold."""
        if self.penalty == "Frobenius":
            return super().shrink(blocks, threshold)
        left, values, right = np.linalg.svd(blocks, full_matrices=False)
        shrunk: Float = (left * np.maximum(values - threshold, 0)[:, None, :]) @ right
        return shrunk

    def correlation_rounding(self, dual: Float) -> float:
        """What rounding may take from a norm of ``correlations(dual)``, and what it left out of the features."""
        n, _, width = self.features.shape
        terms = n + self.pooled_loss.pooling.n_locations + width + 4
        scaled = np.linalg.norm(dual / np.sqrt(self.loss.weights)[:, None]) * self.pooled_loss.pooling.norm
        return float(terms * EPS * np.sqrt(width) * scaled)


def _pooled(rows: Float, patterns: Bool, loss: PooledLoss) -> Float:
    """``T_r D_i A`` of every image and gate: (n, P, q R)."""
    pooling, (N, q), P = loss.pooling, rows.shape, patterns.shape[1]
    count = pooling.n_locations
    features = np.empty((N // count, P, q, pooling.n_regions))
    for part in _image_parts(N, count, max(P, q * pooling.n_regions)):
        spread = np.einsum("rk,nkq->nkqr", pooling.matrix, rows[part].reshape(-1, count, q), optimize=True)
        opened = patterns[part].reshape(-1, count, P).transpose(0, 2, 1).astype(np.float64)
        flat = opened @ spread.reshape(len(spread), count, -1)
        first = part.start // count
        features[first : first + len(flat)] = flat.reshape(len(flat), P, q, -1)
    return features.reshape(len(features), P, -1)


def _image_parts(n: int, together: int, width: int) -> Iterator[slice]:
    """Slices of the rows of whole images, of bounded size when each row has ``width`` numbers."""
    size = max(1, _BLOCK_ENTRIES // (together * width)) * together
    for start in range(0, n, size):
        yield slice(start, start + size)
