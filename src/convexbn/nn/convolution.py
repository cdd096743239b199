"""Convolutional networks as plain torch modules and back: Conv, BatchNorm, ReLU, pooling, Flatten, Linear.

A pooling layer of the module says how it pools. If ``forward`` pools itself, the kind is found by comparing the outputs
of a copy with those of average pooling, max pooling and a flattened layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from convexbn._types import Float, FloatMatrix
from convexbn.data.convolution import Convolution
from convexbn.data.patches import PatchMatrix
from convexbn.nn.last_layers import SAME_FUNCTION, leaves_of, read_layers, run_copy, unwrapped
from convexbn.program.layers import Layers
from convexbn.program.network import BatchNormNetwork
from convexbn.program.output_check import output_error
from convexbn.program.readout import readout_of

_POOLS = {
    nn.AdaptiveAvgPool1d: "average", nn.AdaptiveAvgPool2d: "average", nn.AvgPool1d: "average", nn.AvgPool2d: "average",
    nn.AdaptiveMaxPool1d: "max", nn.AdaptiveMaxPool2d: "max", nn.MaxPool1d: "max", nn.MaxPool2d: "max",
}  # fmt: skip

#: Images on which outputs are compared.
_FEW = 64

_ENDING = "only networks of Conv, BatchNorm, ReLU, pooling, Linear can be read"


@dataclass(frozen=True, eq=False)
class ConvolutionalLayers:
    """Module of Conv, BatchNorm, ReLU, pooling, Linear: unwrapped, with names and numbers of its layers on patches."""

    module: nn.Module
    batch_norm: str
    output: str
    layers: Layers
    convolution: Convolution

    def network(self, X: torch.Tensor, statistics: str) -> BatchNormNetwork:
        """Network of the function in eval mode ("stored") or train mode ("batch"), with the statistics of images."""
        patches = _patches(self.convolution, X)
        layers = self.layers.with_statistics_of(patches) if statistics == "batch" else self.layers
        return replace(layers.network(patches), convolution=self.convolution)


def is_convolutional(module: Any) -> bool:
    """Whether the module ends in a convolution, batch norm and Linear, pooling aside."""
    kinds = [type(layer) for _, layer in leaves_of(unwrapped(module)) if type(layer) not in _POOLS]
    ending = (nn.Conv1d, nn.Conv2d), (nn.BatchNorm1d, nn.BatchNorm2d), (nn.Linear,)
    return len(kinds) > 2 and all(kind in known for kind, known in zip(kinds[-3:], ending, strict=True))


def read_convolutional(module: nn.Module, X: torch.Tensor) -> ConvolutionalLayers:
    """Read the layers of a module, checked by the outputs of a copy on images (n, channels, ...).

    Errors refuse other layers and settings, and a forward that does something else.
    """
    module = unwrapped(module)
    leaves = leaves_of(module)
    pools = [item for item in leaves if type(item[1]) in _POOLS]
    named = [item for item in leaves if type(item[1]) not in _POOLS]
    if len(named) != 3 or len(pools) > 1:
        raise ValueError(f"{type(module).__name__} has other layers before its last convolution: {_ENDING}.")
    (_, conv), (batch_norm, _), (output, linear) = named
    plain = _plain_convolution(*named[0], X)
    outputs, failures = run_copy(module, X[:_FEW], {}), []
    for layer in _candidates(plain, pools, conv.out_channels, linear.in_features):
        layers = replace(read_layers(named, layer.pool.n_regions), readout=readout_of(layer))
        found = layers.predict(_patches(layer, X[:_FEW]))
        failures.append(output_error(found, outputs) if found.shape == outputs.shape else np.inf)
        if failures[-1] <= SAME_FUNCTION:
            return ConvolutionalLayers(module, batch_norm, output, layers, layer)
    raise ValueError(
        f"the forward of the {type(module).__name__} is not that of its layers one after the other: its outputs differ "
        f"by {min(failures, default=np.inf):.1e} of their scale; {_ENDING}."
    )


def layers_of(network: BatchNormNetwork, hidden: Sequence[nn.Module]) -> list[nn.Module]:
    """Modules of a network up to Flatten, from a Linear on patches and, unless it is folded, its batch norm."""
    layer = network.layer
    linear: Any = hidden[0]
    geometry, dims = layer.geometry, layer.dimensions
    kernel, stride, padding = (sizes[-dims:] for sizes in (geometry.kernel, geometry.stride, geometry.padding))
    kind: Any = nn.Conv1d if dims == 1 else nn.Conv2d
    conv = kind(geometry.image[2], len(linear.weight), kernel, stride=stride, padding=padding, device="meta")
    weight = linear.weight.detach().reshape(conv.weight.shape).contiguous()
    conv.load_state_dict({"weight": weight, "bias": linear.bias.detach()}, assign=True)
    parts = [conv, *hidden[1:], nn.ReLU()]
    if not layer.pool.flattened:
        kind = getattr(nn, f"Adaptive{'Avg' if layer.pooling == 'average' else 'Max'}Pool{dims}d")
        parts.append(kind(layer.pool.grid if dims == 2 else layer.pool.grid[1]))
    return [*parts, nn.Flatten()]


def images_of(network: BatchNormNetwork, rows: FloatMatrix) -> torch.Tensor:
    """Flattened rows as images (n, channels, ...)."""
    height, width, channels = network.layer.geometry.image
    images = torch.tensor(rows, device="cpu").reshape(len(rows), height, width, channels).permute(0, 3, 1, 2)
    return images[:, :, 0] if network.layer.dimensions == 1 else images


def probe_images(network: BatchNormNetwork) -> Float:
    """Random images (64, features) about the mean of the patches, whose responses have root mean square 1."""
    geometry = network.layer.geometry
    noise = np.random.default_rng(0).standard_normal((_FEW, geometry.n_features))
    responses = np.asarray(PatchMatrix(noise, geometry)) @ network.weight
    size = float(np.sqrt(np.mean(responses**2))) if responses.size else 0.0
    return float(network.mean.mean()) + noise / (size if size > 0 else 1.0)


def _patches(layer: Convolution, X: torch.Tensor) -> Float:
    """Patches of images (n, channels, ...), in float64."""
    return np.asarray(PatchMatrix(layer.rows(X.numpy()), layer.geometry), dtype=np.float64)


def _plain_convolution(name: str, conv: Any, X: torch.Tensor) -> Convolution:
    """First layer without its pooling, for images (n, channels, ...)."""
    dims = len(conv.kernel_size)
    if X.ndim != dims + 2 or X.shape[1] != conv.in_channels:
        raise ValueError(f"X must have {conv.in_channels} channels and {dims} dimensions; got shape {tuple(X.shape)}.")
    plain = conv.groups == 1 and set(conv.dilation) == {1} and conv.padding_mode == "zeros"
    if not plain or isinstance(conv.padding, str):
        raise ValueError(
            f"{type(conv).__name__} '{name}' has groups, dilation or padding that is not a number of zeros: {_ENDING}."
        )
    return Convolution(conv.kernel_size, conv.stride, conv.padding, input_shape=tuple(X.shape[1:]), channels="first")


def _candidates(
    plain: Convolution, pools: Sequence[tuple[str, Any]], channels: int, n_inputs: int
) -> list[Convolution]:
    """First layers with the pooling of a module, or those that the size of its last layer allows."""
    if not pools:
        known = [replace(plain, pooling="average"), replace(plain, pooling="max"), replace(plain, regions="all")]
        return [layer for layer in known if channels * layer.pool.n_regions == n_inputs]
    ((name, pool),) = pools
    dims, regions = plain.dimensions, getattr(pool, "output_size", None)
    if regions is None:
        locations = plain.geometry.locations[-dims:]
        kernel, stride, padding = (_tuple(size, dims) for size in (pool.kernel_size, pool.stride, pool.padding))
        parts = [divmod(size, window) for size, window in zip(locations, kernel, strict=True)]
        if kernel != stride or any(padding) or any(rest for _, rest in parts):
            raise ValueError(
                f"{type(pool).__name__} '{name}' has windows that overlap or do not divide the {locations} locations: "
                f"{_ENDING}."
            )
        regions = [count for count, _ in parts]
    return [replace(plain, pooling=_POOLS[type(pool)], regions=_tuple(regions, dims))]


def _tuple(size: Any, dims: int) -> tuple[int, ...]:
    return tuple(size) if isinstance(size, (tuple, list)) else (size,) * dims
