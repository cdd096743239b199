"""Two-layer networks as other frameworks hold them: affine map, batch norm with stored statistics, ReLU, affine map.

The map between the two forms is that of mathematics, section 1d: weights of unit biased variance, batch-norm scale
``gamma / sqrt(n) * sqrt(1 + eps)`` and offset ``shift / sqrt(n)``. Frameworks convert these arrays and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import DTypeLike

from convexbn._types import EPS, Float
from convexbn.program.network import BatchNormNetwork
from convexbn.program.readout import Readout


@dataclass(frozen=True, eq=False)
class Layers:
    """``x -> relu(scale (weight'x + bias - running_mean) / sqrt(running_var + eps) + offset)'output + output_bias``.

    ``weight`` is (d, m), ``output`` (m, K), ``output_bias`` (K,), and the other arrays are (m,); all are float64. The
    variance ``running_var`` is the one that normalises; ``scale`` and ``offset`` are weight and bias of batch norm. The
    ``readout`` pools the patches of a convolutional network, whose ``output`` is (m, R K).
    """

    weight: Float
    bias: Float
    running_mean: Float
    running_var: Float
    eps: float
    scale: Float
    offset: Float
    output: Float
    output_bias: Float
    readout: Readout = field(default_factory=Readout)

    @classmethod
    @np.errstate(all="ignore")
    def from_network(cls, network: BatchNormNetwork, dtype: DTypeLike, eps: float) -> Layers:
        """Layers of a network, rounded to numbers of ``dtype``.

        The bias centres the pre-activations; the running mean is the part of their mean that rounding leaves.

        Parameters
        ----------
        network, dtype, eps : BatchNormNetwork, dtype, float
        """
        root = np.sqrt(network.n_effective)
        weight, output = rounded(network.weight, dtype), rounded(network.output, dtype)
        mean = network.mean @ weight
        bias = rounded(-mean, dtype)
        running_mean, offset = rounded(mean + bias, dtype), rounded(network.shift / root, dtype)
        scale = rounded(network.gamma / root * np.sqrt(1 + eps), dtype)
        running_var, output_bias = np.ones_like(bias), rounded(network.output_bias, dtype)
        return cls(weight, bias, running_mean, running_var, eps, scale, offset, output, output_bias)

    @property
    def gain(self) -> Float:
        """Factor of each pre-activation in batch norm: (m,)."""
        return self.scale / np.sqrt(self.running_var + self.eps)

    def predict(self, X: Float) -> Float:
        """Outputs from the stored statistics: (n, d) -> (n, K)."""
        response = X @ self.weight + (self.bias - self.running_mean)
        hidden = np.maximum(self.gain * response + self.offset, 0)
        return self.readout.outputs(hidden, self.output) + self.output_bias

    def with_statistics_of(self, X: Float) -> Layers:
        """Layers with the full-batch statistics of rows (n, d), which train mode computes on all of them."""
        mean, deviation = self._statistics(X)
        return replace(self, running_mean=mean @ self.weight + self.bias, running_var=deviation**2)

    def network(self, X: Float) -> BatchNormNetwork:
        """Network of equal outputs with the statistics of rows (n, d); a ValueError if a neuron in use is constant."""
        return self._network(*self._statistics(X), float(len(X)))

    def network_without_rows(self, n_effective: float) -> BatchNormNetwork:
        """Network of equal outputs, as if the stored statistics were those of ``n_effective`` rows.

        Its outputs do not depend on the means of the features, which are ``implied_mean``.
        """
        return self._network(self.implied_mean(), np.sqrt(self.running_var), n_effective)

    def implied_mean(self) -> Float:
        """Smallest means of the features (d,) that explain the stored means of the pre-activations."""
        scale = row_scale(self.weight)
        return np.linalg.lstsq((self.weight / scale).T, self.running_mean - self.bias, rcond=None)[0] / scale[:, 0]

    def _statistics(self, X: Float) -> tuple[Float, Float]:
        """Means of the features (d,) and deviations of the pre-activations (m,), 0 if only rounding varies."""
        mean = X.mean(axis=0)
        mean += (X - mean).mean(axis=0)  # an offset leaves a mean behind: centre twice
        deviation = ((X - mean) @ self.weight).std(axis=0)
        rounding = 8 * EPS * (np.abs(X).max(axis=0) @ np.abs(self.weight))
        return mean, np.where(deviation > rounding, deviation, 0.0)

    def _network(self, mean: Float, deviation: Float, n: float) -> BatchNormNetwork:
        varies = (deviation > 0) & np.isfinite(deviation)
        still = np.flatnonzero(~varies & (self.scale != 0) & self.weight.any(axis=0))
        if len(still):
            raise ValueError(
                f"{len(still)} neurons (the first is {still[0]}) do not vary over the rows, or overflow, so batch norm "
                "has nothing to normalise: give the rows that the network was trained on, or remove these neurons."
            )
        weight = self.weight * (np.where(self.scale < 0, -1.0, 1.0) / np.where(varies, deviation, 1.0))
        gamma = np.sqrt(n) * np.abs(self.gain) * np.where(varies, deviation, 0.0)
        shift = np.sqrt(n) * (self.offset + self.gain * (mean @ self.weight + self.bias - self.running_mean))
        return BatchNormNetwork(weight, gamma, shift, self.output, mean, n, output_bias=self.output_bias)


@np.errstate(all="ignore")
def folded(network: BatchNormNetwork, dtype: DTypeLike) -> tuple[Float, Float]:
    """First affine map with batch norm folded in, in numbers of ``dtype``: (d, m), (m,)."""
    root = np.sqrt(network.n_effective)
    weight = rounded(network.weight * (network.gamma / root), dtype)
    return weight, rounded(network.shift / root - network.mean @ weight, dtype)


def rounded(array: Float, dtype: DTypeLike) -> Float:
    """Array rounded to numbers of a type, in float64."""
    return np.asarray(array).astype(dtype).astype(np.float64)


def row_scale(weight: Float) -> Float:
    """Largest entry of every row (d, 1), 1 for rows of zeros; division takes the units of features out of weights."""
    peaks: Float = np.abs(weight).max(axis=1, initial=0.0, keepdims=True)
    return np.where(peaks > 0, peaks, 1.0)


def convertible(network: BatchNormNetwork) -> BatchNormNetwork:
    """Network with at least one neuron, dead if need be: batch norm of frameworks needs a feature."""
    if not isinstance(network, BatchNormNetwork):
        raise TypeError(f"network must be a BatchNormNetwork, such as model.network_; got {type(network).__name__}.")
    if network.n_neurons:
        return network
    d, zero, output = len(network.mean), np.zeros(1), np.zeros((1, network.output.shape[1]))
    dead = replace(network, weight=np.zeros((d, 1)), gamma=zero, shift=zero, output=output)
    return dead if network.gates is None else replace(dead, gates=np.zeros((d, 1)), gate_offsets=zero)
