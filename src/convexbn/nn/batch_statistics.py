"""Full-batch statistics: the mean and variance of all rows at once, as of batch norm in train mode, for eval mode.

Torch's own running statistics are averages over batches, with the unbiased variance. Here every batch norm gets the
mean and the biased variance of all rows, in the order of the forward: each sees the outputs of the updated ones before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

#: Rows a pass.
_BATCH = 1024


def with_full_batch_statistics(module: nn.Module, names: Iterable[str], rows: torch.Tensor) -> nn.Module:
    """Copy a module in eval mode, with the statistics of all rows in its batch norms, and momentum 0.

    Parameters
    ----------
    module, rows : torch.nn.Module, Tensor (n, ...)
        The rows are in float64 on the CPU, where the statistics are computed.
    names : iterable of str
        Names of layers; the batch norms among them are updated. One without stored statistics is a ValueError.
    """
    found: Any = copy.deepcopy(module).eval()
    measured: Any = copy.deepcopy(found).to(device="cpu", dtype=torch.float64)
    for name in _in_order_of_use(measured, names, rows):
        mean, variance = _statistics(measured, name, rows)
        own, double = found.get_submodule(name), measured.get_submodule(name)
        double.running_mean.copy_(own.running_mean.copy_(mean))  # rounded, as the following layers will see it
        double.running_var.copy_(own.running_var.copy_(variance))
        own.num_batches_tracked.fill_(1)
        own.momentum = 0.0
    return found


def without_momentum(module: nn.Module) -> nn.Module:
    """Copy a module in eval mode whose batch norms keep their stored statistics even when run in train mode."""
    found = copy.deepcopy(module).eval()
    for layer in found.modules():
        if isinstance(layer, _BatchNorm):
            layer.momentum = 0.0
    return found


def outputs_of(module: nn.Module, rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield outputs (batch, K) on the CPU, batch by batch, computed on the module's own device and in its own type."""
    sample = next(module.parameters())
    with torch.no_grad():
        for part in torch.split(rows, _BATCH):
            yield module(part.to(device=sample.device, dtype=sample.dtype)).reshape(len(part), -1).cpu()


def _in_order_of_use(module: nn.Module, names: Iterable[str], rows: torch.Tensor) -> list[str]:
    """Names of the batch norms, in the order in which the forward uses them."""
    used: dict[str, None] = {}
    layers = {name: layer for name in names if isinstance(layer := module.get_submodule(name), _BatchNorm)}
    for name, layer in layers.items():
        if layer.running_mean is None:
            raise ValueError(
                f"{type(layer).__name__} '{name}' has no stored statistics: train it with track_running_stats=True."
            )
    _run(module, rows[:_BATCH], {name: lambda *_, name=name: used.setdefault(name) for name in layers})
    return list(used)


def _statistics(module: nn.Module, name: str, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance, by channel, of the inputs of a batch norm: batches merged (Chan et al. 1983)."""
    count, mean, squares = 0, torch.zeros(1), torch.zeros(1)

    def gather(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal count, mean, squares
        channels = inputs[0].transpose(0, 1).flatten(1)
        new, centre = channels.shape[1], channels.mean(dim=1)
        step = centre - mean
        squares = squares + (channels - centre[:, None]).square().sum(dim=1) + step**2 * (count * new / (count + new))
        mean, count = mean + step * (new / (count + new)), count + new

    _run(module, rows, {name: gather})
    return mean, squares / count


def _run(module: nn.Module, rows: torch.Tensor, hooks: Mapping[str, Callable[..., Any]]) -> None:
    """Run a module with forward pre-hooks in the named layers."""
    handles = [module.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
    for _ in outputs_of(module, rows):
        pass
    for handle in handles:
        handle.remove()
