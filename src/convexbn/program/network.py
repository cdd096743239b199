"""BatchNormNetwork: a two-layer batch-normalised network as ordinary weights, on rows or on the patches of images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np

from convexbn._types import EPS, Float, FloatMatrix, Index
from convexbn.data.blocks import BlockSize
from convexbn.data.convolution import Convolution
from convexbn.data.patches import PatchMatrix
from convexbn.data.scaling import centre, times_power
from convexbn.data.whitening import Whitening
from convexbn.program.gated import GateBlocks
from convexbn.program.gates import distinct_gates, gate_patterns
from convexbn.program.neurons import Neurons
from convexbn.program.readout import readout_of

#: Hidden activations, rows times neurons, held at once when predicting, and those of images.
_CHUNK_ENTRIES, _IMAGE_ENTRIES = 1 << 21, 1 << 23


@dataclass(frozen=True, eq=False, repr=False)
class BatchNormNetwork:
    """``F(x) = sum_j phi(gamma_j BN(x'w_j) + shift_j / sqrt(n)) output_j + output_bias`` with stored statistics.

    ``BN(z)_i = (x_i'w - mean'w) / ||C X_train w||``; ``phi`` is the ReLU, or the neuron's fixed gate times its input.
    Every ``weight`` column is scaled so that ``||C X_train w||^2 = n_effective`` (unit biased variance): the statistics
    are ``mean`` and ``n_effective`` alone.

    With a ``convolution`` the rows are patches, which pooling reduces to ``R`` regions of an image:
    ``F(x) = sum_j sum_r pool_r(phi(gamma_j BN(patches w_j) + shift_j / sqrt(N))) output_jr``.

    Attributes
    ----------
    weight : ndarray (d, m)
        First-layer weights on the raw features; with a convolution the filters (h, m) in torch's order (channel, down,
        across).
    gamma, shift : ndarray (m,)
        The paper's batch-norm scale and shift; ``gamma^2 + shift^2 = ||output row||^2``.
    output : ndarray (m, K)
        Second-layer weights; (m, R K) with the regions of a neuron one after the other.
    mean : ndarray (d,)
        Training means of the features, or of the patches.
    n_effective : float
        Sum of the sample weights, of all patches with a convolution.
    gates, gate_offsets, gate_index : ndarray (d, m), (m,), (m,), optional
        Gate of each neuron, open if ``(x - mean)'g + b >= 0``, and its place among the gates of the program. None for
        ReLU networks.
    convolution : Convolution, optional
        Filter sizes, input shape and pooling.
    output_bias : ndarray (K,), optional
        Intercept of the outputs, which the weight decay leaves alone; zeros by default.
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
    convolution: Convolution | None = None
    output_bias: Float = None  # type: ignore[assignment]  # zeros of the right shape, below

    def __post_init__(self) -> None:
        if self.output_bias is None:
            object.__setattr__(self, "output_bias", np.zeros(self.n_outputs))
        # BLAS rounds by the layout of its operands: a loaded network must compute what the saved one did
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), np.ndarray):
                object.__setattr__(self, field.name, np.array(value, order="C"))

    def __repr__(self) -> str:
        kind, inputs = "ReLU" if self.gate_index is None else "gated", _count(self.n_features, "input")
        if (layer := self.convolution) is not None:
            *image, channels = layer.geometry.image
            kind, sizes = f"{kind} convolutional", [*image[-layer.dimensions :], channels]
            kernel = layer.geometry.kernel[-layer.dimensions :]
            inputs = f"inputs of {' x '.join(map(str, sizes))}, filters of {' x '.join(map(str, kernel))}"
        counts = [_count(self.n_neurons, "neuron"), _count(self.n_outputs, "output")]
        if self.gate_index is not None:
            counts.append(_count(len(np.unique(self.gate_index)), "gate"))
        return f"<{kind} network: {', '.join([inputs, *counts])}>"

    @property
    def n_features(self) -> int:
        """Features of a row, or numbers of an image."""
        return len(self.mean) if self.convolution is None else self.convolution.geometry.n_features

    @property
    def n_neurons(self) -> int:
        """Width ``m``."""
        return int(self.weight.shape[1])

    @property
    def n_outputs(self) -> int:
        """Outputs ``K``."""
        return int(self.output.shape[1]) // readout_of(self.convolution).n_regions

    def hidden(self, X: FloatMatrix) -> Float:
        """Hidden activations, pooled region by region: (n, features) -> (n, R m)."""
        if self.convolution is None:
            return self._hidden(X, self._distinct_gates())
        readout = readout_of(self.convolution)
        return np.concatenate([readout.pool(hidden) for _, hidden in self._chunks(X)])

    def predict(self, X: FloatMatrix) -> Float:
        """Outputs ``F(X)``: (n, features) -> (n, K), in chunks of bounded memory."""
        outputs, readout = np.zeros((len(X), self.n_outputs)), readout_of(self.convolution)
        for part, hidden in self._chunks(X):
            outputs[part] = readout.outputs(hidden, self.output)
        return outputs + self.output_bias

    def _chunks(self, X: FloatMatrix) -> Iterator[tuple[slice, Float]]:
        """Slices of the rows or images, and their activations (b, m), or (b Kp, m) at all locations of images."""
        distinct = self._distinct_gates()
        if self.convolution is None:
            for part in BlockSize(max(self.n_neurons, X.shape[1]), _CHUNK_ENTRIES).slices(len(X)):
                yield part, self._hidden(X[part], distinct)
            return
        geometry = self.convolution.geometry
        width = geometry.n_locations * max(self.n_neurons, geometry.patch_size)
        for part in BlockSize(width, _IMAGE_ENTRIES).slices(max(len(X), 1)):
            yield part, self._hidden(PatchMatrix(np.asarray(X[part]), geometry)[:], distinct)

    def _hidden(self, X: FloatMatrix, distinct: tuple[Float, Float, Index] | None) -> Float:
        centred, exponent = centre(X, self.mean)
        response = times_power(centred @ self.weight, exponent)
        response = (self.gamma * response + self.shift) / np.sqrt(self.n_effective)
        if distinct is None:
            opened = response > 0
        else:
            gates, offsets, place = distinct
            opened = np.take(gate_patterns(X, self.mean, gates, offsets), place, axis=1)
        return np.where(opened, response, 0.0)

    def _distinct_gates(self) -> tuple[Float, Float, Index] | None:
        """Distinct gates and their offsets, which neurons may share, and the place of every neuron among them."""
        if self.gates is None or self.gate_offsets is None:
            return None
        first, place = distinct_gates(self.gates, self.gate_offsets)
        return self.gates[:, first], self.gate_offsets[first], place

    def influences(self, deviations: Float) -> Float:
        """Changes of the pre-activations, in their own deviations, by one deviation of each feature: (d, m).

        They are ``|w_ij| deviation_i``, whatever the units of the features.

        Parameters
        ----------
        deviations : ndarray (d,)
            Of the features, or of the places of a patch.
        """
        influences: Float = np.abs(self.weight) * deviations[:, None]
        return influences

    def importances(self, deviations: Float) -> Float:
        """Shares of the features in the outputs: ``sum_j |w_ij| deviation_i gamma_j ||c_j||``, with sum 1: (d,).

        All are 0 if no neuron depends on the features.
        """
        found: Float = self.influences(deviations) @ (self.gamma * np.linalg.norm(self.output, axis=1))
        total = found.sum()
        return found / total if total > 0 else found

    @property
    def layer(self) -> Convolution:
        """Convolution of the network; a TypeError for a dense one."""
        if self.convolution is None:
            raise TypeError("the network has no convolution: its rows are features.")
        return self.convolution

    @property
    def fixed_gates(self) -> tuple[Float, Float, Index]:
        """Directions (d, m), offsets (m,) and places (m,) of the neurons' gates; a TypeError for a ReLU network."""
        if self.gates is None or self.gate_offsets is None or self.gate_index is None:
            raise TypeError("the network has no gates: it is a ReLU network.")
        return self.gates, self.gate_offsets, self.gate_index

    @property
    def weight_decay_penalty(self) -> float:
        """Half the squared norm of the scale and shift of batch norm and of the output layer."""
        return float(0.5 * (self.gamma @ self.gamma + self.shift @ self.shift + np.sum(self.output**2)))

    @classmethod
    def from_neurons(
        cls, whitening: Whitening, neurons: Neurons, convolution: Convolution | None = None
    ) -> BatchNormNetwork:
        """ReLU network of neurons on the whitened data.

        Columns on filtered rows ``A Phi`` are ``Phi^{-1} s_j``. Each neuron is rescaled so that
        ``||s_j|| = ||output_j||``: this leaves the outputs and makes the weight decay ``sum_j ||s_j|| ||output_j||``
        (mathematics, section 1a).

        Parameters
        ----------
        whitening, neurons : Whitening, Neurons
            Whitening of the rows, or of the patches.
        convolution : Convolution, optional
        """
        first, output = neurons.first, neurons.output
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
        weight = whitening.projection @ direction * np.sqrt(whitening.total_weight)
        output, n = output[live] / scale[:, None], whitening.total_weight
        return cls(weight, gamma, balanced[-1], output, whitening.mean, n, convolution=convolution)

    @classmethod
    def from_blocks(
        cls,
        whitening: Whitening,
        blocks: GateBlocks,
        gates: Float,
        gate_offsets: Float,
        convolution: Convolution | None = None,
    ) -> BatchNormNetwork:
        """Gated network of blocks ``S_i``, with ``rank(S_i)`` neurons for each by its SVD.

        Parameters
        ----------
        whitening, blocks : Whitening, GateBlocks
        gates, gate_offsets : ndarray (d, P), (P,)
            All gates of the program.
        convolution : Convolution, optional
        """
        left, values, right = np.linalg.svd(blocks.values, full_matrices=False)
        cut = EPS * max(blocks.values.shape[1:]) * values.max(axis=1, initial=0.0, keepdims=True)
        block, atom = np.nonzero((values > cut) & (values > 0))
        root = np.sqrt(values[block, atom])[:, None]
        neurons = Neurons((root * left[block, :, atom]).T, root * right[block, atom])
        index = blocks.gate_index[block]
        plain = cls.from_neurons(whitening, neurons, convolution)
        return replace(plain, gates=gates[:, index], gate_offsets=gate_offsets[index], gate_index=index)


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"
