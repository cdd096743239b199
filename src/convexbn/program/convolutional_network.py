"""ConvolutionalNetwork: a batch-normalised network on the patches of images, with pooling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convexbn._types import Float, FloatMatrix
from convexbn.data.convolution import Convolution
from convexbn.data.patches import PatchMatrix
from convexbn.program.network import BatchNormNetwork

#: Hidden activations held at once when predicting.
_CHUNK_ENTRIES = 1 << 23


@dataclass(frozen=True, eq=False)
class ConvolutionalNetwork(BatchNormNetwork):
    """``F(x) = sum_j sum_r pool_r(phi(gamma_j BN(patches w_j) + shift_j / sqrt(N))) output_jr`` with stored statistics.

    Attributes
    ----------
    convolution : Convolution
        Filter sizes, input shape and pooling.
    weight, gamma, shift, output, mean, n_effective, gates, gate_offsets, gate_index
        As in :class:`BatchNormNetwork` with patches for rows: ``weight`` (h, m) holds the filters in torch's order
        (channel, down, across), ``mean`` (h,) is that of the patches, ``n_effective`` the weight of all patches, and
        ``output`` (m, R K) has the regions of a neuron one after the other.
    """

    convolution: Convolution = field(kw_only=True)

    @classmethod
    def of(cls, network: BatchNormNetwork, convolution: Convolution) -> ConvolutionalNetwork:
        """The network on patches, used on images."""
        return cls(**network.neurons(), mean=network.mean, n_effective=network.n_effective, convolution=convolution)

    @property
    def n_outputs(self) -> int:
        """``K``."""
        return int(self.output.shape[1] // self.convolution.pool.n_regions)

    @property
    def n_features(self) -> int:
        """Numbers of an image."""
        return self.convolution.geometry.n_features

    def neurons(self) -> dict[str, Any]:
        """The arrays that belong to neurons, by name: what a certificate takes."""
        found = super().neurons()
        del found["convolution"]
        return found

    def hidden(self, X: FloatMatrix) -> Float:
        """Pooled activations of images, region by region: (n, features) -> (n, R m)."""
        pooled = [self.convolution.pool.pool(hidden) for hidden in self._chunks(X)]
        return np.concatenate([chunk.reshape(len(chunk), chunk.shape[1] * chunk.shape[2]) for chunk in pooled])

    def predict(self, X: FloatMatrix) -> Float:
        """Outputs ``F(X)``: (n, features) -> (n, K), in chunks of bounded memory."""
        pool = self.convolution.pool
        return np.concatenate([pool.outputs(hidden, self.output) for hidden in self._chunks(X)])

    def _chunks(self, X: FloatMatrix) -> Iterator[Float]:
        """Activations at all locations (b Kp, m) of some images at a time."""
        geometry = self.convolution.geometry
        size = max(1, _CHUNK_ENTRIES // (geometry.n_locations * max(self.n_neurons, geometry.patch_size)))
        for start in range(0, max(len(X), 1), size):
            images = np.asarray(X[start : start + size])
            yield super().hidden(PatchMatrix(images, geometry)[:])
