"""The loss along the gradient step: which learning rates a network can stand."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from convexbn._types import Float
from convexbn.companions.diagnostics.running import Loss, copied


def gradient_step(module: nn.Module, X: Any, y: Any, loss: Loss, step: float, *, training: bool = True) -> nn.Module:
    """Copy a module with parameters ``w - step * g``, g the gradient of the loss on this batch.

    Parameters
    ----------
    module : torch.nn.Module
        It is not changed. The copy has its mode and its running statistics.
    X, y, loss : Tensor (n, ...), Tensor, callable
        A batch, and its loss ``loss(outputs, y)``.
    step : float
        Learning rate.
    training : bool, default=True
        Gradient of train mode, with the statistics of the batch, or of eval mode.

    Examples
    --------
    >>> module, X, y = nn.Linear(2, 1), torch.ones(4, 2), torch.zeros(4, 1)
    >>> bool((gradient_step(module, X, y, nn.MSELoss(), 1e-3)(X).abs() < module(X).abs()).all())
    True
    """
    stepped = copy.deepcopy(module)
    _move(stepped, _gradients(module, X, y, loss, training), step)
    return stepped


def relative_losses(
    module: nn.Module, X: Any, y: Any, loss: Loss, steps: Iterable[float], *, training: bool = True
) -> Float:
    """Loss after one gradient step on a batch, relative to that before: ``l(w - a g) / l(w)`` for each ``a``.

    Both losses are those of this batch; that before must be positive and finite, and the ratio is ``inf`` where that
    after is not finite. Without batch norm losses explode at learning rates at which a network with it still descends
    (Bjorck et al. 2018).

    Parameters
    ----------
    module, X, y, loss, training
        As for ``gradient_step``.
    steps : iterable of float
        Learning rates ``a``.

    Examples
    --------
    >>> module, X, y = nn.Linear(2, 1, bias=False), torch.eye(2), torch.ones(2, 1)
    >>> relative_losses(module, X, y, nn.MSELoss(), [0, 1, 2]).round(6).tolist()  # (1 - a)^2
    [1.0, 0.0, 1.0]
    """
    gradients, losses = _gradients(module, X, y, loss, training), []
    for step in (0.0, *steps):
        with copied(module, training) as run, torch.no_grad():
            _move(run, gradients, step)
            losses.append(float(loss(run(X), y)))
    if not 0 < losses[0] < np.inf:
        raise ValueError(f"the loss before the step must be positive and finite, got {losses[0]}.")
    return np.where(np.isfinite(losses[1:]), losses[1:], np.inf) / losses[0]


def _gradients(module: nn.Module, X: Any, y: Any, loss: Loss, training: bool) -> list[torch.Tensor | None]:
    with copied(module, training) as run:
        loss(run(X), y).backward()  # type: ignore[no-untyped-call]
    return [parameter.grad for parameter in run.parameters()]


def _move(module: nn.Module, gradients: list[torch.Tensor | None], step: float) -> None:
    with torch.no_grad():
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            if gradient is not None:
                parameter.sub_(step * gradient)
