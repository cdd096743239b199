"""Weight gradients of a batch: how heavy their tails are, and whether their summands agree in sign."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from convexbn.companions.diagnostics.running import Loss, copied

_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)


def gradient_kurtosis(module: nn.Module, X: Any, y: Any, loss: Loss, *, training: bool = True) -> dict[str, float]:
    """Kurtosis of the entries of each weight gradient: 3 for a normal distribution, more for heavy tails.

    Keys are the names of each Linear and convolution that the loss reaches; values are ``nan`` if all entries are
    equal. Without batch norm the gradients of middle layers are heavy-tailed at initialisation (Bjorck et al. 2018).

    Parameters
    ----------
    module : torch.nn.Module
        It is not changed: a copy is run.
    X, y, loss : Tensor (n, ...), Tensor, callable
        A batch, and its loss ``loss(outputs, y)``.
    training : bool, default=True
        Train mode, with the statistics of the batch, or eval mode.

    Examples
    --------
    >>> X, module = torch.randn(50, 100), nn.Sequential(nn.Linear(100, 3))
    >>> list(gradient_kurtosis(module, X, X[:, :3], nn.MSELoss()))
    ['0']
    """
    with copied(module, training) as run:
        loss(run(X), y).backward()  # type: ignore[no-untyped-call]
    found = {}
    for name, layer in run.named_modules():
        if isinstance(layer, _WEIGHTED) and layer.weight.grad is not None:
            entries = layer.weight.grad.double()
            squares = (entries - entries.mean()).square()
            found[name] = float(squares.square().mean() / squares.mean().square())
    return found


@dataclass(frozen=True)
class SignAgreement:
    """Summands ``d`` of the entries of a weight gradient: ``sum |d|`` against ``|sum d|``.

    A summand is the gradient of one output times the input that it was multiplied with, for one sample and position.

    Attributes
    ----------
    absolute, summed : float
        Means over the entries of ``sum |d|`` and of ``|sum d|``.
    """

    absolute: float
    summed: float

    @property
    def ratio(self) -> float:
        """``absolute / summed``: 1 if all signs agree, larger the more the summands cancel, ``inf`` if they all do."""
        return self.absolute / self.summed if self.summed > 0 else float("inf")


def sign_agreement(module: nn.Module, X: Any, y: Any, loss: Loss, *, training: bool = True) -> dict[str, SignAgreement]:
    """Agreement in sign of the summands of each weight gradient; if they agree, it depends little on the data.

    Keys are the names of each Linear and convolution that the loss reaches, in the order of the forward. Without batch
    norm all samples pull a weight in one direction; with it their gradients cancel for the larger part (Bjorck et al.
    2018).

    Parameters
    ----------
    module, X, y, loss, training
        As for ``gradient_kurtosis``.

    Examples
    --------
    >>> module, X = nn.Sequential(nn.Linear(2, 1, bias=False)), torch.tensor([[1.0, 1], [1, -1]])
    >>> sign_agreement(module, X, None, lambda outputs, _: outputs.sum())["0"]
    SignAgreement(absolute=2.0, summed=1.0)
    """
    sums: dict[str, tuple[Any, Any]] = {}

    def watch(name: str, layer: Any, inputs: Any, output: torch.Tensor) -> None:
        source = inputs[0].detach().clone()  # a later layer may work in place

        def gather(gradient: torch.Tensor) -> None:
            absolute, summed = sums.get(name, (0, 0))
            # bilinear in both, so that their absolute values give the sum of the absolute summands
            absolute = absolute + _weight_gradient(layer, source.abs(), gradient.abs())
            sums[name] = absolute, summed + _weight_gradient(layer, source, gradient)

        if output.requires_grad and layer.weight.requires_grad:
            output.register_hook(gather)  # type: ignore[no-untyped-call]

    with copied(module, training) as run:
        names = [name for name, layer in run.named_modules() if isinstance(layer, _WEIGHTED)]
        for name in names:
            run.get_submodule(name).register_forward_hook(partial(watch, name))
        loss(run(X), y).backward()  # type: ignore[no-untyped-call]
    found = {name: sums[name] for name in names if name in sums}
    return {name: SignAgreement(float(a.mean()), float(s.abs().mean())) for name, (a, s) in found.items()}


def _weight_gradient(layer: Any, source: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Gradient of the weight, from an input of the layer and the gradient of its output."""
    with torch.enable_grad():
        output = type(layer).forward(layer, source)  # without the hooks
    return torch.autograd.grad(output, layer.weight, gradient)[0].double()
