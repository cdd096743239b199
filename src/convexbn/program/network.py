"""BatchNormNetwork: a two-layer batch-normalised network as ordinary weights."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from convexbn._types import EPS, Float, FloatMatrix, Index
from convexbn.data.scaling import centre, times_power
from convexbn.data.whitening import Whitening
from convexbn.program.gates import distinct_gates, gate_patterns

#: Hidden activations held at once when predicting (rows times neurons).
_CHUNK_ENTRIES = 1 << 21


@dataclass(frozen=True, eq=False)
class BatchNormNetwork:
    """``F(x) = sum_j phi(gamma_j BN(x'w_j) + shift_j / sqrt(n)) output_j`` with stored statistics.

    ``BN(z)_i = (x_i'w - mean'w) / ||C X_train w||``; ``phi`` is the ReLU, or the neuron's fixed gate
    times the identity. Every ``weight`` column is scaled so that ``||C X_train w||^2 = n_effective``
    (unit biased variance), so that the statistics are ``mean`` and ``n_effective`` alone.

    Attributes
    ----------
    weight : ndarray (d, m)
        First-layer weights on the raw features.
    gamma, shift : ndarray (m,)
        The paper's batch-norm scale and shift; ``gamma^2 + shift^2 = ||output row||^2``.
    output : ndarray (m, K)
        Second-layer weights.
    mean : ndarray (d,)
        Training means of the features.
    n_effective : float
        Sum of the sample weights.
    gates, gate_offsets, gate_index : ndarray (d, m), (m,), (m,) or None
        Gate of each neuron: open where ``(x - mean)'g + b >= 0``, and its place among the gates of
        the program. ``None`` for ReLU networks.
    """

    weight: Float
    gamma: Float
    shift: Float
    output: Float
    mean: Float
    n_effective: float
    gates: Float | None = None
    gate_offsets: Float | None = None
    gate_index: Index | None = None

    def __post_init__(self) -> None:
        # BLAS rounds by the layout of its operands: a loaded network must compute what the saved one did
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), np.ndarray):
                object.__setattr__(self, field.name, np.array(value, order="C"))

    @property
    def n_features(self) -> int:
        """Numbers of a row that it is used on."""
        return len(self.mean)

    @property
    def n_neurons(self) -> int:
        """Width ``m``."""
        return int(self.weight.shape[1])

    def hidden(self, X: FloatMatrix) -> Float:
        """Hidden activations, one a neuron: (n, d) -> (n, m). Each row depends on itself alone."""
        return self._hidden(X, self._distinct_gates())

    def predict(self, X: FloatMatrix) -> Float:
        """Outputs ``F(X)``: (n, d) -> (n, K), in chunks of bounded memory."""
        outputs, distinct = np.zeros((len(X), self.output.shape[1])), self._distinct_gates()
        size = max(1, _CHUNK_ENTRIES // max(self.n_neurons, X.shape[1], 1))
        for start in range(0, len(X), size):
            part = slice(start, start + size)
            outputs[part] = self._hidden(X[part], distinct) @ self.output
        return outputs

    def _hidden(self, X: FloatMatrix, distinct: tuple[Float, Float, Index] | None) -> Float:
        centred, exponent = centre(X, self.mean)
        response = times_power(centred @ self.weight, exponent)
        response = (self.gamma * response + self.shift) / np.sqrt(self.n_effective)
        if distinct is None:
            opened = response > 0
        else:
            gates, offsets, place = distinct
            opened = np.take(gate_patterns(X, self.mean, gates, offsets), place, axis=1)
        activations: Float = np.where(opened, response, 0.0)
        return activations

    def _distinct_gates(self) -> tuple[Float, Float, Index] | None:
        """Gates and offsets, of which several neurons may share one, and the place of every neuron among them."""
        if self.gates is None or self.gate_offsets is None:
            return None
        first, place = distinct_gates(self.gates, self.gate_offsets)
        return self.gates[:, first], self.gate_offsets[first], place

    def neurons(self) -> dict[str, Any]:
        """The arrays that belong to neurons, by name: what a certificate takes."""
        names = [f.name for f in fields(self) if f.name not in ("mean", "n_effective")]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @classmethod
    def from_neurons(cls, whitening: Whitening, first: Float, output: Float) -> BatchNormNetwork:
        """ReLU network of first-layer columns (r + 1, m) on the whitened data and output rows (m, K).

        Columns on filtered rows ``A Phi`` are ``Phi^{-1} s_j``. Norms are balanced: each neuron is rescaled so that
        ``||s_j|| = ||output_j||``, which leaves the function and makes the weight decay
        ``sum_j ||s_j|| ||output_j||`` (mathematics, section 1a).
        """
        phi = np.append(whitening.filter, 1.0)[:, None]
        plain = phi * first
        inner, outer = np.linalg.norm(plain, axis=0), np.linalg.norm(output, axis=1)
        live = (inner > 0) & (outer > 0)
        scale = np.sqrt(outer[live] / inner[live])
        balanced = plain[:, live] * scale
        gamma = np.linalg.norm(balanced[:-1], axis=0)
        # a neuron of the constant column alone still needs some direction on which the data vary
        direction = np.where(gamma > 0, first[:-1, live] * scale, np.eye(len(balanced) - 1, 1) / phi[0])
        direction /= np.where(gamma > 0, gamma, 1)
        return cls(
            weight=whitening.projection @ direction * np.sqrt(whitening.total_weight),
            gamma=gamma,
            shift=balanced[-1],
            output=output[live] / scale[:, None],
            mean=whitening.mean,
            n_effective=whitening.total_weight,
        )

    @classmethod
    def from_blocks(
        cls, whitening: Whitening, gate_index: Index, blocks: Float, gates: Float, gate_offsets: Float
    ) -> BatchNormNetwork:
        """Gated network of blocks ``S_i`` (m', q, K): ``rank(S_i)`` neurons each, by its SVD."""
        left, values, right = np.linalg.svd(blocks, full_matrices=False)
        cut = EPS * max(blocks.shape[1:]) * values.max(axis=1, initial=0.0, keepdims=True)
        block, atom = np.nonzero((values > cut) & (values > 0))
        root = np.sqrt(values[block, atom])[:, None]
        plain = cls.from_neurons(whitening, (root * left[block, :, atom]).T, root * right[block, atom])
        index = gate_index[block]
        return cls(
            **plain.neurons(),
            mean=plain.mean,
            n_effective=plain.n_effective,
            gates=gates[:, index],
            gate_offsets=gate_offsets[index],
            gate_index=index,
        )
