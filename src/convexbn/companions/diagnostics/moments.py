"""Channel moments: mean and standard deviation of the outputs of each layer, by channel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from convexbn._types import Float
from convexbn.companions.diagnostics.running import copied


@dataclass(frozen=True, eq=False)
class ChannelMoments:
    """Moments of the outputs of a layer, over the batch and the positions in it.

    Attributes
    ----------
    layer, kind : str
        Its name in the module and the name of its class.
    mean, std : ndarray (C,)
        By channel, the second axis of the outputs; the biased standard deviation.
    """

    layer: str
    kind: str
    mean: Float
    std: Float


def channel_moments(module: nn.Module, X: Any, *, training: bool = True) -> list[ChannelMoments]:
    """Mean and standard deviation by channel of the outputs of each layer, in the order of the forward.

    There is one item for each call of a layer without layers inside whose output is a tensor (n, C, ...). At
    initialisation both moments grow exponentially with the depth of a residual network without batch norm, and stay as
    they are with it (Bjorck et al. 2018).

    Parameters
    ----------
    module : torch.nn.Module
        It is not changed: a copy is run.
    X : Tensor (n, ...)
        A batch, as the module takes it.
    training : bool, default=True
        Train mode, with the statistics of the batch, or eval mode.

    Examples
    --------
    >>> module, X = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8)), torch.randn(50, 3)
    >>> [bool(abs(found.std.mean() - 1) < 1e-3) for found in channel_moments(module, X)]
    [False, True]
    """
    found: list[ChannelMoments] = []

    def gather(name: str, layer: nn.Module, _: Any, outputs: Any) -> None:
        if isinstance(outputs, torch.Tensor) and outputs.ndim > 1:
            channels = outputs.detach().double().transpose(0, 1).flatten(1)
            variance, mean = torch.var_mean(channels, dim=1, correction=0)
            found.append(ChannelMoments(name, type(layer).__name__, mean.cpu().numpy(), variance.sqrt().cpu().numpy()))

    with copied(module, training) as run, torch.no_grad():
        for name, layer in run.named_modules():
            if not layer._modules:
                layer.register_forward_hook(partial(gather, name))
        run(X)
    return found
