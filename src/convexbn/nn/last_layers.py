"""The last layers of a torch module: its final Linear, BatchNorm1d, ReLU, Linear, found and judged by outputs.

Which layers these are is read off the order in which the module defines them; that its forward uses them so, whatever
code it holds, is checked by comparing outputs. The module itself is never run or changed: a copy is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from convexbn._types import Float
from convexbn.program.layers import Layers
from convexbn.program.output_check import output_error

#: Layers that change nothing in eval mode, on rows of numbers.
NO_OPS = (nn.Identity, nn.Flatten, nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout)

_ENDING = "only networks that end in Linear, BatchNorm1d, ReLU, Linear can be read"

#: Largest difference of outputs, relative to the largest: far above rounding, far below what another activation makes.
_SAME_FUNCTION = 1e-6

#: Rows a pass.
_BATCH = 1024


@dataclass(frozen=True, eq=False)
class LastLayers:
    """The last Linear, BatchNorm1d, ReLU, Linear of a module.

    Attributes
    ----------
    module : torch.nn.Module
        The whole module, taken out of wrappers such as DataParallel.
    linear, batch_norm, output : str
        Names of the layers in it.
    layers : Layers
        Their numbers, as stored.
    before : tuple of str
        Names of the layers that come before, other than ReLU and those that change nothing.
    """

    module: nn.Module
    linear: str
    batch_norm: str
    output: str
    layers: Layers
    before: tuple[str, ...]

    def features(self, X: Any) -> Float:
        """Inputs of the first Linear in eval mode and float64: rows as the module takes them -> (n, d).

        Raises
        ------
        ValueError
            When the module does not run on the rows, or its outputs are not those of the layers on the features.
        """
        features, outputs = self._run(as_tensor(X))
        expected = self.layers.predict(features)
        error = output_error(expected, outputs) if outputs.shape == expected.shape else np.inf
        if not error <= _SAME_FUNCTION:
            raise ValueError(
                f"the forward of the {kind_of(self.module)} does not use {self.linear!r}, {self.batch_norm!r} and "
                f"{self.output!r} as Linear, BatchNorm1d, ReLU, Linear, one after the other: its outputs differ by "
                f"{error:.1e} of their scale; {_ENDING}."
            )
        return features

    def _run(self, X: torch.Tensor) -> tuple[Float, Float]:
        """Inputs of the first Linear and outputs, of a copy."""
        d = len(self.layers.weight)
        features = [torch.empty(0, d, dtype=torch.float64, device="cpu")]
        try:
            module = copy.deepcopy(self.module).to(device="cpu", dtype=torch.float64).eval()
            linear = module.get_submodule(self.linear)
            linear.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].reshape(-1, d).clone()))
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                outputs = [module(part).reshape(len(part), -1) for part in torch.split(X, _BATCH)]
        except Exception as error:  # whatever a forward can raise
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"a copy of the {kind_of(self.module)} does not run in float64 on rows of shape {tuple(X.shape[1:])} "
                f"({reason}): give X in the shape that it takes, or the layers in a Sequential."
            ) from error
        return torch.cat(features).numpy(), torch.cat(outputs).numpy()


def read_last_layers(module: nn.Module) -> LastLayers:
    """Last Linear, BatchNorm1d, ReLU, Linear of a module, as it defines them.

    Parameters
    ----------
    module : torch.nn.Module
        In any mode, on any device, of any floating type; it is not changed.

    Raises
    ------
    TypeError, ValueError
        As ``from_module``, but for an output bias and for layers that come before.
    """
    module = unwrapped(module)
    leaves = [(name, layer) for name, layer in leaves_of(module, "") if type(layer) not in (*NO_OPS, nn.ReLU)]
    for place, kind in ((-1, nn.Linear), (-2, nn.BatchNorm1d), (-3, nn.Linear)):
        if len(leaves) < -place:
            raise TypeError(f"the {kind_of(module)} has no {kind.__name__} before its last {-1 - place}: {_ENDING}.")
        _check_kind(*leaves[place], kind)
    names = [name for name, _ in leaves]
    linear, batch_norm, output = (layer for _, layer in leaves[-3:])
    layers = _layers(names[-3:], linear, batch_norm, output)
    return LastLayers(module, names[-3], names[-2], names[-1], layers, tuple(names[:-3]))


def _layers(names: list[str], linear: Any, batch_norm: Any, output: Any) -> Layers:
    """Numbers of the three layers, checked."""
    first, last = f"Linear '{names[0]}'", f"Linear '{names[2]}'"
    weight = numbers_of(first, "weight", linear.weight).T
    return read_layers(names, weight, linear, batch_norm, numbers_of(last, "weight", output.weight).T, output)


def read_layers(names: list[str], weight: Float, linear: Any, batch_norm: Any, by_neuron: Float, output: Any) -> Layers:
    """Numbers of the layers with given weights (d, m) and (m, K), checked."""
    first, where, last = (
        f"{kind_of(layer)} '{name}'" for name, layer in zip(names, (linear, batch_norm, output), strict=True)
    )
    if batch_norm.weight is None:
        raise ValueError(f"{where} has no scale and shift: train it with affine=True.")
    if batch_norm.running_mean is None:
        raise ValueError(f"{where} has no stored statistics: train it with track_running_stats=True.")
    layers = Layers(
        weight=weight,
        bias=np.zeros(weight.shape[1]) if linear.bias is None else numbers_of(first, "bias", linear.bias),
        running_mean=numbers_of(where, "running_mean", batch_norm.running_mean),
        running_var=numbers_of(where, "running_var", batch_norm.running_var),
        eps=float(batch_norm.eps),
        scale=numbers_of(where, "weight", batch_norm.weight),
        offset=numbers_of(where, "bias", batch_norm.bias),
        output=by_neuron,
        output_bias=np.zeros(output.out_features) if output.bias is None else numbers_of(last, "bias", output.bias),
    )
    if not batch_norm.num_batches_tracked:
        raise ValueError(f"{where} is untrained (num_batches_tracked is 0): run batches through it in train mode.")
    if not weight.shape[1] == len(layers.scale) == len(by_neuron):
        sizes = f"{weight.shape[1]}, {len(layers.scale)} and {len(by_neuron)} features"
        raise ValueError(f"{first}, {where} and {last} do not follow one another: they have {sizes}; {_ENDING}.")
    if not ((layers.running_var >= 0) & (layers.running_var + layers.eps > 0)).all():
        raise ValueError(f"{where} has a running_var that is no variance: run batches through it in train mode.")
    return layers


def numbers_of(where: str, name: str, tensor: torch.Tensor) -> Float:
    """Numbers of a parameter in float64, finite."""
    if tensor.is_meta or not tensor.is_floating_point():
        raise TypeError(f"{name} of {where} holds no real numbers: it is {tensor.dtype} on device {tensor.device}.")
    array: Float = tensor.detach().to(device="cpu", dtype=torch.float64, copy=True).numpy()
    if not np.isfinite(array).all():
        raise ValueError(f"{name} of {where} is not finite: the training diverged, so train it again.")
    return array


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what DataParallel, its distributed kin and ``torch.compile`` wrap."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}.")
    while True:
        wrapped = getattr(module, "_orig_mod", None)
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            wrapped = module.module
        if not isinstance(wrapped, nn.Module):
            return module
        module = wrapped


def leaves_of(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Layers in the order of their definition, one that is used twice in a Sequential twice."""
    children = [(key, child) for key, child in module._modules.items() if child is not None]
    if not children:
        yield name, module
    for key, child in children:
        yield from leaves_of(child, f"{name}.{key}" if name else key)


def _check_kind(name: str, layer: nn.Module, kind: type[nn.Module]) -> None:
    if type(layer) is not kind:
        lazy = " (run a batch through it first)" if isinstance(layer, nn.modules.lazy.LazyModuleMixin) else ""
        raise TypeError(f"layer '{name}' is a {kind_of(layer)}{lazy} where a {kind.__name__} is expected: {_ENDING}.")


def kind_of(module: nn.Module) -> str:
    """Name of its class."""
    return type(module).__name__


def as_tensor(X: Any) -> torch.Tensor:
    """Rows in float64 on the CPU: a copy, as layers may work in place.

    Raises
    ------
    TypeError
        For what is not numbers.
    ValueError
        For no rows, and for numbers that are not finite.
    """
    if isinstance(X, torch.Tensor):
        rows = X.detach().to(device="cpu", dtype=torch.float64, copy=True)
    else:
        try:
            rows = torch.from_numpy(np.array(X, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise TypeError(f"X must be an array or tensor of numbers: {error}.") from error
    if rows.ndim == 0 or not len(rows):
        raise ValueError(f"X must have rows, as the module takes them; got shape {tuple(rows.shape)}.")
    if not torch.isfinite(rows).all():
        raise ValueError("X must be finite: leave out or fill the rows that are not.")
    return rows
