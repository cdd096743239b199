"""Weight gradients of a batch: how heavy their tails are, and whether their summands agree in sign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from convexbn.companions.diagnostics.running import WEIGHTED, Loss, copied, weight_gradients


def gradient_kurtosis(module: nn.Module, X: Any, y: Any, loss: Loss, *, training: bool = True) -> dict[str, float]:
    """Kurtosis of the entries of each weight gradient: 3 for a normal distribution, more for heavy tails.

    Without batch norm the gradients of middle layers are heavy-tailed at initialisation (Bjorck et al. 2018).

    Parameters
    ----------
    module : torch.nn.Module
        It is not changed: a copy is run.
    X, y : Tensor (n, ...), Tensor
        A batch, as module and loss take it.
    loss : callable
        ``loss(outputs, y)``.
    training : bool, default=True
        Train mode, with the statistics of the batch, or eval mode.

    Returns
    -------
    dict of str to float
        By name, for each Linear and convolution that the loss reaches; ``nan`` where all entries are equal.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> X = torch.randn(50, 100)
    >>> list(gradient_kurtosis(nn.Sequential(nn.Linear(100, 3)), X, X[:, :3], nn.MSELoss()))
    ['0']
    """
    with copied(module, training) as run:
        gradients = weight_gradients(run, X, y, loss)
    return {name: _kurtosis(gradient.double()) for name, gradient in gradients.items()}


def _kurtosis(entries: torch.Tensor) -> float:
    squares = (entries - entries.mean()).square()
    return float(squares.square().mean() / squares.mean().square())


@dataclass(frozen=True)
class SignAgreement:
    """Summands ``d`` of the entries of a weight gradient: ``sum |d|`` against ``|sum d|``.

    A summand is the gradient of one output times the input that it was multiplied with, for one sample and position.

    Attributes
    ----------
    absolute : float
        Mean over the entries of ``sum |d|``.
    summed : float
        Mean over the entries of ``|sum d|``.
    ratio : float
        The first over the second: 1 where all signs agree, larger the more the summands cancel.
    """

    absolute: float
    summed: float

    @property
    def ratio(self) -> float:
        """``absolute / summed``; ``inf`` where all cancels."""
        return self.absolute / self.summed if self.summed > 0 else float("inf")


def sign_agreement(module: nn.Module, X: Any, y: Any, loss: Loss, *, training: bool = True) -> dict[str, SignAgreement]:
    """Whether the summands of each weight gradient agree in sign: then the gradient depends little on the data.

    Without batch norm all samples pull a weight in one direction, with it their gradients cancel for the larger part
    (Bjorck et al. 2018).

    Parameters
    ----------
    module, X, y, loss, training
        As for ``gradient_kurtosis``.

    Returns
    -------
    dict of str to SignAgreement
        By name, for each Linear and convolution that the loss reaches, in the order of the forward.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> module, X = nn.Sequential(nn.Linear(2, 1, bias=False)), torch.tensor([[1.0, 1], [1, -1]])
    >>> sign_agreement(module, X, None, lambda outputs, _: outputs.sum())["0"]
    SignAgreement(absolute=2.0, summed=1.0)
    """
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(name: str, layer: Any, inputs: Any, output: torch.Tensor) -> None:
        source = inputs[0].detach().clone()  # a later layer may work in place
        if output.requires_grad and layer.weight.requires_grad:
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: gather(name, layer, source, gradient)
            )

    def gather(name: str, layer: Any, source: torch.Tensor, gradient: torch.Tensor) -> None:
        parts = [_weight_gradient(layer, source, gradient), _weight_gradient(layer, source.abs(), gradient.abs())]
        known = seen.get(name)
        seen[name] = parts if known is None else [a + b for a, b in zip(known, parts, strict=True)]

    with copied(module, training) as run:
        names = [(name, layer) for name, layer in run.named_modules() if isinstance(layer, WEIGHTED)]
        for name, layer in names:
            layer.register_forward_hook(lambda m, inputs, output, name=name: watch(name, m, inputs, output))
        loss(run(X), y).backward()  # type: ignore[no-untyped-call]
    return {
        name: SignAgreement(float(seen[name][1].mean()), float(seen[name][0].abs().mean()))
        for name, _ in names
        if name in seen
    }


def _weight_gradient(layer: Any, source: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Gradient of the weight from an input of the layer and the gradient of its output.

    It is bilinear in both, so that absolute values of both give the sum of the absolute summands.
    """
    with torch.enable_grad():
        output = type(layer).forward(layer, source)  # without the hooks
    found: torch.Tensor = torch.autograd.grad(output, layer.weight, gradient)[0]
    return found.double()
