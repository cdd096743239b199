"""Convolutional networks as plain torch modules and back: Conv, BatchNorm, ReLU, pooling, Flatten, Linear.

How a module pools is read off its layers where it has a pooling layer, and found by its outputs where ``forward`` does
it: average, maximum, or a flattened layer, whichever gives the outputs of a copy.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from convexbn._types import Float, FloatMatrix
from convexbn.data.convolution import Convolution
from convexbn.data.patches import PatchMatrix
from convexbn.nn.last_layers import NO_OPS, leaves_of, numbers_of, read_layers, unwrapped
from convexbn.program.layers import Layers
from convexbn.program.network import BatchNormNetwork
from convexbn.program.output_check import output_error
from convexbn.program.readout import readout_of

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_ADAPTIVE = {
    nn.AdaptiveAvgPool1d: "average", nn.AdaptiveAvgPool2d: "average",
    nn.AdaptiveMaxPool1d: "max", nn.AdaptiveMaxPool2d: "max",
}  # fmt: skip
_WINDOWS = {nn.AvgPool1d: "average", nn.AvgPool2d: "average", nn.MaxPool1d: "max", nn.MaxPool2d: "max"}

#: Largest difference of outputs, relative to the largest.
_SAME_FUNCTION = 1e-6
_ENDING = "only networks of Conv, BatchNorm, ReLU, pooling, Linear can be read"


@dataclass(frozen=True, eq=False)
class ConvolutionalLayers:
    """A module of Conv, BatchNorm, ReLU, pooling, Linear.

    Attributes
    ----------
    module : torch.nn.Module
        Taken out of wrappers.
    batch_norm, output : str
        Names of its layers.
    layers : Layers
        Their numbers on patches, with the pooling.
    convolution : Convolution
    """

    module: nn.Module
    batch_norm: str
    output: str
    layers: Layers
    convolution: Convolution

    def patches(self, X: torch.Tensor) -> PatchMatrix:
        """The patches of images (n, channels, ...)."""
        return PatchMatrix(self.convolution.rows(X.numpy()), self.convolution.geometry)


def is_convolutional(module: Any) -> bool:
    """Whether the last layer but pooling and batch norm is a convolution."""
    kinds = [type(layer) for _, layer in _used(unwrapped(module))]
    kinds = [kind for kind in kinds if kind not in (*_ADAPTIVE, *_WINDOWS)]
    return len(kinds) > 2 and kinds[-1] is nn.Linear and kinds[-2] in _NORMS and kinds[-3] in _CONVOLUTIONS


def read_convolutional(module: nn.Module, X: torch.Tensor) -> ConvolutionalLayers:
    """Layers of a module, judged by the outputs of a copy on images (n, channels, ...).

    Raises
    ------
    TypeError, ValueError
        For other layers and settings, by name; for a forward that does something else.
    """
    module = unwrapped(module)
    used = _used(module)
    pools = [item for item in used if type(item[1]) in (*_ADAPTIVE, *_WINDOWS)]
    names = [name for name, layer in used if type(layer) not in (*_ADAPTIVE, *_WINDOWS)]
    if len(names) != 3 or len(pools) > 1:
        raise ValueError(f"{type(module).__name__} has other layers before its last convolution: {_ENDING}.")
    conv, batch_norm, output = (_layer_of(module, name) for name in names)
    plain = _plain_convolution(conv, names[0], X)
    outputs, failures = _outputs_of(module, X), []
    for layer in _candidates(plain, pools, conv.out_channels, output.in_features):
        own = ConvolutionalLayers(module, names[1], names[2], _layers(names, conv, batch_norm, output, layer), layer)
        found = own.layers.predict(np.asarray(own.patches(X[: len(outputs)]), dtype=np.float64))
        error = output_error(found, outputs) if found.shape == outputs.shape else np.inf
        if error <= _SAME_FUNCTION:
            return own
        failures.append(error)
    raise ValueError(
        f"the forward of the {type(module).__name__} is not that of its layers one after the other: its outputs differ "
        f"by {min(failures, default=np.inf):.1e} of their scale; {_ENDING}."
    )


def from_convolutional(module: nn.Module, X: torch.Tensor, statistics: str = "stored") -> BatchNormNetwork:
    """The network of a module, in terms of the statistics of images; of its function in eval mode or in train mode."""
    own = read_convolutional(module, X)
    if np.abs(own.layers.output_bias).max(initial=0.0) > 0:
        raise ValueError(
            f"Linear '{own.output}' has a bias, which a network of this package has not: train it with bias=False."
        )
    patches = np.asarray(own.patches(X), dtype=np.float64)
    layers = own.layers.with_statistics_of(patches) if statistics == "batch" else own.layers
    return replace(layers.network(patches), convolution=own.convolution)


def layers_of(network: BatchNormNetwork, hidden: list[torch.Tensor], batch_norm: nn.Module | None) -> list[Any]:
    """Modules of a network from the weight (h, m) and bias of its filters, and batch norm unless it is folded."""
    layer, (weight, bias) = network.layer, hidden
    geometry, dims = layer.geometry, layer.dimensions
    kernel, stride, padding = (sizes[-dims:] for sizes in (geometry.kernel, geometry.stride, geometry.padding))
    kind: Any = nn.Conv1d if dims == 1 else nn.Conv2d
    conv = kind(geometry.image[2], weight.shape[1], kernel, stride=stride, padding=padding, device="meta")
    shaped = weight.T.reshape(conv.weight.shape).contiguous()
    conv.load_state_dict({"weight": shaped, "bias": bias}, assign=True)
    return [conv, *([] if batch_norm is None else [batch_norm]), nn.ReLU(), *_pool(layer), nn.Flatten()]


def images_of(network: BatchNormNetwork, rows: FloatMatrix) -> torch.Tensor:
    """Flattened rows as torch takes images: (n, channels, ...)."""
    height, width, channels = network.layer.geometry.image
    images = torch.tensor(rows, device="cpu").reshape(len(rows), height, width, channels).permute(0, 3, 1, 2)
    return images[:, :, 0] if network.layer.dimensions == 1 else images


def probe_images(network: BatchNormNetwork) -> Float:
    """Random images (64, features) about the mean of the patches, whose responses are of size 1 together."""
    geometry = network.layer.geometry
    noise = np.random.default_rng(0).standard_normal((64, geometry.n_features))
    responses = np.asarray(PatchMatrix(noise, geometry)) @ network.weight
    size = float(np.sqrt(np.mean(responses**2))) if responses.size else 0.0
    return float(network.mean.mean()) + noise / (size if size > 0 else 1.0)


def output_weight(network: BatchNormNetwork) -> Float:
    """Weights (m R, K) of the last layer, which sees the regions of a channel one after the other."""
    return network.output.reshape(-1, network.n_outputs)


def _pool(layer: Convolution) -> list[nn.Module]:
    pool = layer.pool
    if pool.flattened:
        return []
    grid: Any = pool.grid[-layer.dimensions :] if layer.dimensions == 2 else pool.grid[-1]
    kinds: dict[tuple[str, int], Any] = {
        ("average", 1): nn.AdaptiveAvgPool1d, ("average", 2): nn.AdaptiveAvgPool2d,
        ("max", 1): nn.AdaptiveMaxPool1d, ("max", 2): nn.AdaptiveMaxPool2d,
    }  # fmt: skip
    return [kinds[layer.pooling, layer.dimensions](grid)]


def _layer_of(module: nn.Module, name: str) -> Any:
    return module.get_submodule(name)


def _used(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, layer) for name, layer in leaves_of(module, "") if type(layer) not in (*NO_OPS, nn.ReLU)]


def _plain_convolution(conv: Any, name: str, X: torch.Tensor) -> Convolution:
    """The layer without its pooling, for images (n, channels, ...)."""
    dims = len(conv.kernel_size)
    if X.ndim != dims + 2 or X.shape[1] != conv.in_channels:
        raise ValueError(f"X must have {conv.in_channels} channels and {dims} dimensions; got shape {tuple(X.shape)}.")
    plain = conv.groups == 1 and set(conv.dilation) == {1} and conv.padding_mode == "zeros"
    if not plain or isinstance(conv.padding, str):
        raise ValueError(
            f"{type(conv).__name__} '{name}' has groups, dilation or padding of another kind than zeros in numbers: "
            f"{_ENDING}."
        )
    return Convolution(conv.kernel_size, conv.stride, conv.padding, input_shape=tuple(X.shape[1:]), channels="first")


def _candidates(
    plain: Convolution, pools: list[tuple[str, nn.Module]], channels: int, n_inputs: int
) -> list[Convolution]:
    """Layers with the pooling of a module, or those that the size of its last layer allows."""
    locations = plain.geometry.locations[-plain.dimensions :]
    if not pools:
        found = [replace(plain, pooling=kind) for kind in ("average", "max")]
        found = found if n_inputs == channels else []
        return [*found, *([replace(plain, regions="all")] if n_inputs == channels * int(np.prod(locations)) else [])]
    name, pool = pools[0]
    if type(pool) in _ADAPTIVE:
        sizes = _tuple(pool.output_size, plain.dimensions)
        return [replace(plain, pooling=_ADAPTIVE[type(pool)], regions=sizes)]
    kernel, stride = (_tuple(size, plain.dimensions) for size in (pool.kernel_size, pool.stride))
    whole = all(size % window == 0 for size, window in zip(locations, kernel, strict=True))
    if kernel != stride or any(_tuple(pool.padding, plain.dimensions)) or not whole:
        raise ValueError(
            f"{type(pool).__name__} '{name}' has windows that overlap or do not divide the {locations} locations: "
            f"{_ENDING}."
        )
    regions = tuple(size // window for size, window in zip(locations, kernel, strict=True))
    return [replace(plain, pooling=_WINDOWS[type(pool)], regions=regions)]


def _tuple(size: Any, dims: int) -> tuple[int, ...]:
    return tuple(size) if isinstance(size, (tuple, list)) else (size,) * dims


def _layers(names: list[str], conv: Any, batch_norm: Any, output: Any, layer: Convolution) -> Layers:
    """Numbers of the layers on patches: filters in columns, and the output layer (m, R K)."""
    weight = numbers_of(f"{type(conv).__name__} '{names[0]}'", "weight", conv.weight)
    flat = numbers_of(f"Linear '{names[2]}'", "weight", output.weight)
    m, R = len(weight), layer.pool.n_regions
    if flat.shape[1] != m * R:
        raise ValueError(f"Linear '{names[2]}' takes {flat.shape[1]} numbers, and pooling gives {m * R}; {_ENDING}.")
    by_region = flat.T.reshape(m, R * len(flat))
    return replace(
        read_layers(names, weight.reshape(m, -1).T, conv, batch_norm, by_region, output), readout=readout_of(layer)
    )


def _outputs_of(module: nn.Module, X: torch.Tensor) -> Float:
    """Outputs of a copy in eval mode and float64 on the first images."""
    try:
        double: Any = copy.deepcopy(module).to(device="cpu", dtype=torch.float64).eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            outputs: Float = double(X[:64]).reshape(min(len(X), 64), -1).numpy()
    except Exception as error:  # whatever a forward can raise
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"a copy of the {type(module).__name__} does not run in float64 on images of shape {tuple(X.shape[1:])} "
            f"({reason}): give X in the shape that it takes."
        ) from error
    return outputs
