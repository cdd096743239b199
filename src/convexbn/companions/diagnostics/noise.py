"""The noise of mini-batch gradients, by learning rate and batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from convexbn.companions.diagnostics.running import Loss, copied

#: Rows whose loss is compared with the mean of their losses.
_FEW = 8


@dataclass(frozen=True)
class GradientNoise:
    """Spread of the gradients of the samples, from which the noise of a step follows.

    Attributes
    ----------
    variance : float
        ``C``, the mean over the samples of the squared distance of their gradients from the full gradient.
    n_samples : int

    Examples
    --------
    >>> noise = GradientNoise(variance=6.0, n_samples=10)
    >>> noise.bound(learning_rate=0.5, batch_size=2), noise.expected(learning_rate=1.0, batch_size=10)
    (0.75, 0.0)
    """

    variance: float
    n_samples: int

    def bound(self, learning_rate: float, batch_size: int) -> float:
        """Bound of ``E || a g - a g_batch ||^2``: ``a^2 / B * C``, an equality for samples drawn with replacement."""
        self._check(batch_size)
        return learning_rate**2 * self.variance / batch_size

    def expected(self, learning_rate: float, batch_size: int) -> float:
        """``E || a g - a g_batch ||^2`` of batches drawn without replacement: the bound times ``(n - B) / (n - 1)``."""
        left = (self.n_samples - batch_size) / max(self.n_samples - 1, 1)
        return self.bound(learning_rate, batch_size) * left

    def _check(self, batch_size: int) -> None:
        if not 1 <= batch_size <= self.n_samples:
            raise ValueError(f"batch_size must be 1 to {self.n_samples}, the number of samples, got {batch_size}.")


def gradient_noise(module: nn.Module, X: Any, y: Any, loss: Loss, *, chunk_size: int = 64) -> GradientNoise:
    """Spread of the gradients of single samples, in eval mode.

    In train mode batch norm couples the samples, so that no sample has a gradient of its own. Eval mode uses the stored
    statistics; ``sampled_noise`` draws batches in either mode.

    Parameters
    ----------
    module, X, y : torch.nn.Module, Tensor (n, ...), Tensor (n, ...)
        Module that ``torch.func.vmap`` can run, which is not changed, and all samples.
    loss : callable
        ``loss(outputs, y)`` by functions of torch, such as ``nn.CrossEntropyLoss()``. It must be the mean over the
        samples, or no bound would follow; this is checked on a few.
    chunk_size : int, default=64
        Samples whose gradients are held at once.

    Examples
    --------
    >>> module, X = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0], [-1, 0]])
    >>> gradient_noise(module, X, X[:, :1], lambda outputs, y: outputs.mean()).variance
    1.0
    """
    with copied(module, training=False) as run:
        _check_mean(run, X, y, loss)
        parameters = {name: p.detach() for name, p in run.named_parameters() if p.requires_grad}

        def sample_loss(values: dict[str, torch.Tensor], x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return loss(functional_call(run, values, (x[None],)), target[None])

        gradients = vmap(grad(sample_loss), in_dims=(None, 0, 0), randomness="different")
        total, squares = torch.zeros(()), torch.zeros(())
        for rows, targets in zip(X.split(chunk_size), y.split(chunk_size), strict=True):
            found = torch.cat([part.flatten(1).double() for part in gradients(parameters, rows, targets).values()], 1)
            total = total + found.sum(0)
            squares = squares + found.square().sum()
    n = len(X)
    return GradientNoise(max(float(squares / n - (total / n).square().sum()), 0.0), n)


def sampled_noise(
    module: nn.Module, X: Any, y: Any, loss: Loss, *, batch_size: int, draws: int = 100, training: bool = True,
    random_state: int = 0,
) -> float:  # fmt: skip
    """Variance of mini-batch gradients, ``E || g_batch - E g_batch ||^2``, from batches drawn without replacement.

    Times the squared learning rate it is the noise of a step. In eval mode its expectation is
    ``gradient_noise(...).expected(1, batch_size)``. In train mode the expected gradient of a batch is not the full
    gradient, because of batch norm; the variance is about the former.

    Parameters
    ----------
    module, X, y, loss
        As for ``gradient_noise``.
    batch_size : int
        Samples in a batch.
    draws : int, default=100
        Batches; the estimate is unbiased for two or more.
    training : bool, default=True
        Train mode, with the statistics of each batch, or eval mode.
    random_state : int, default=0
        For the batches.

    Examples
    --------
    >>> module, X = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0], [-1, 0]])
    >>> sampled_noise(module, X, X[:, :1], lambda outputs, y: outputs.mean(), batch_size=2)
    0.0
    """
    if draws < 2:
        raise ValueError(f"draws must be 2 or more for a variance, got {draws}.")
    GradientNoise(0.0, len(X))._check(batch_size)
    generator = torch.Generator().manual_seed(random_state)
    mean, squares = torch.zeros(()), torch.zeros(())
    with copied(module, training) as run:
        parameters = [parameter for parameter in run.parameters() if parameter.requires_grad]
        for t in range(draws):
            batch = torch.randperm(len(X), generator=generator)[:batch_size]
            parts = torch.autograd.grad(loss(run(X[batch]), y[batch]), parameters)
            found = torch.cat([part.flatten().double() for part in parts])
            step = found - mean
            mean = mean + step / (t + 1)
            squares = squares + (step * (found - mean)).sum()
    return float(squares / (draws - 1))


def _check_mean(module: nn.Module, X: Any, y: Any, loss: Loss) -> None:
    rows, targets = X[:_FEW], y[:_FEW]
    with torch.no_grad():
        outputs = module(rows)
        whole = loss(outputs, targets)
        each = torch.stack([loss(*pair) for pair in zip(outputs.split(1), targets.split(1), strict=True)]).mean()
    if not torch.allclose(whole, each, rtol=1e-4, atol=1e-6):
        raise ValueError(
            f"the loss must be the mean over the samples: on {len(rows)} of them it is {float(whole):.6g}, and the "
            f"mean of their losses is {float(each):.6g}."
        )
