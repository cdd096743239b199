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
    """A copy whose parameters are ``w - step * g``, g the gradient of the loss on this batch.

    Parameters
    ----------
    module : torch.nn.Module
        It is not changed.
    X, y : Tensor (n, ...), Tensor
        A batch, as module and loss take it.
    loss : callable
        ``loss(outputs, y)``.
    step : float
        The learning rate of the step.
    training : bool, default=True
        Whether the gradient is that of train mode, with the statistics of the batch, or of eval mode.

    Returns
    -------
    torch.nn.Module
        In the mode and with the running statistics of the given one.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> module, X, y = nn.Linear(2, 1), torch.ones(4, 2), torch.zeros(4, 1)
    >>> bool((gradient_step(module, X, y, nn.MSELoss(), 1e-3)(X).abs() < module(X).abs()).all())
    True
    """
    stepped = copy.deepcopy(module)
    with copied(module, training) as run:
        gradients = _gradients(run, X, y, loss)
    _move(stepped, gradients, step)
    return stepped


def relative_losses(
    module: nn.Module, X: Any, y: Any, loss: Loss, steps: Iterable[float], *, training: bool = True
) -> Float:
    """Loss after one gradient step on a batch, relative to that before: ``l(w - a g) / l(w)`` for each ``a``.

    Both losses are those of this batch. Without batch norm they explode at learning rates where a network with it still
    descends (Bjorck et al. 2018).

    Parameters
    ----------
    module, X, y, loss, training
        As for ``gradient_step``.
    steps : iterable of float
        Learning rates ``a``.

    Returns
    -------
    ndarray (len(steps),)
        ``inf`` where the loss is not finite.

    Raises
    ------
    ValueError
        When the loss before the step is not positive and finite.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> module, X, y = nn.Linear(2, 1, bias=False), torch.eye(2), torch.ones(2, 1)
    >>> relative_losses(module, X, y, nn.MSELoss(), [0, 1, 2]).round(6).tolist()  # (1 - a)^2
    [1.0, 0.0, 1.0]
    """
    with copied(module, training) as run:
        gradients = _gradients(run, X, y, loss)
    losses = [_loss_after(module, X, y, loss, gradients, step, training) for step in (0.0, *steps)]
    if not 0 < losses[0] < np.inf:
        raise ValueError(f"the loss before the step must be positive and finite, and it is {losses[0]}.")
    return np.array(losses[1:]) / losses[0]


def _gradients(module: nn.Module, X: Any, y: Any, loss: Loss) -> list[torch.Tensor | None]:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    found = iter(torch.autograd.grad(loss(module(X), y), parameters, allow_unused=True))
    return [next(found) if parameter.requires_grad else None for parameter in module.parameters()]


def _loss_after(
    module: nn.Module, X: Any, y: Any, loss: Loss, gradients: list[torch.Tensor | None], step: float, training: bool
) -> float:
    with copied(module, training) as run, torch.no_grad():
        _move(run, gradients, step)
        value = float(loss(run(X), y))
    return value if np.isfinite(value) else np.inf


def _move(module: nn.Module, gradients: list[torch.Tensor | None], step: float) -> None:
    with torch.no_grad():
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            if gradient is not None:
                parameter.sub_(step * gradient)
