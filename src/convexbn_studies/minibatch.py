"""Mini-batch SGD on a two-layer batch-normalised ReLU network for classification, as torch users run it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from convexbn._types import Float, FloatMatrix

if TYPE_CHECKING:
    from torch import nn

#: Rows, and labels of their classes.
Rows = tuple[FloatMatrix, np.ndarray]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a training.

    Attributes
    ----------
    validation, test : float
        Accuracies with the statistics of all training rows; 0 where the numbers overflowed.
    energies : ndarray (d,)
        ``sum_j ||c_j||^2 gamma_j^2 q_ij^2 / ||q_j||^2`` of every direction, ``q`` the first layer times ``metric``.
    moved : ndarray (d,)
        Root mean square over the neurons of what the training changed of ``q``.
    """

    validation: float
    test: float
    energies: Float
    moved: Float


@dataclass(frozen=True)
class MiniBatch:
    """Settings of a training: SGD, half squared error, one-hot targets.

    Attributes
    ----------
    width : int
    rate : float
        Learning rate at the start; it falls as a cosine to 0.
    epochs : int
    momentum : float
    weight_decay : float
        ``lam`` of the optimiser, on all parameters.
    seed : int
    batch : int
    """

    width: int
    rate: float
    epochs: int
    momentum: float = 0.9
    weight_decay: float = 0.0
    seed: int = 0
    batch: int = 100

    def train(
        self, training: Rows, validation: Rows, test: Rows, *, start: Float | None = None, metric: Float | None = None
    ) -> Outcome:
        """Train in float32 and judge.

        Parameters
        ----------
        training, validation, test : (ndarray (n, d), ndarray (n,))
        start : ndarray (d,), optional
            Deviations of the normal start of the first layer; 1 / sqrt(d) by default.
        metric : ndarray (d,), optional
            From coordinates of the rows to singular directions; ones by default.
        """
        import torch

        d, K = training[0].shape[1], int(training[1].max()) + 1
        deviations = np.full(d, d**-0.5) if start is None else start
        module = self._module(deviations, K)
        first = module[0].weight.detach().numpy().T.copy()
        X = torch.tensor(training[0], dtype=torch.float32)
        self._descend(module, X, torch.nn.functional.one_hot(torch.tensor(training[1]), K).float())
        with_all_statistics(module, X)
        energies, moved = _directions(module, first, np.ones(d) if metric is None else metric)
        return Outcome(accuracy(module, *validation), accuracy(module, *test), energies, moved)

    def _module(self, deviations: Float, K: int) -> Any:
        import torch
        from torch import nn

        rng, m = np.random.default_rng(self.seed), self.width
        module = nn.Sequential(
            nn.Linear(len(deviations), m, bias=False), nn.BatchNorm1d(m), nn.ReLU(), nn.Linear(m, K, bias=False)
        )
        first: Any = module[0].weight
        last: Any = module[3].weight
        with torch.no_grad():
            first.copy_(torch.tensor(rng.standard_normal((m, len(deviations))) * deviations))
            last.copy_(torch.tensor(rng.standard_normal((K, m)) / np.sqrt(m)))
        return module

    def _descend(self, module: nn.Module, X: Any, targets: Any) -> None:
        """All epochs; rows that do not fill a batch wait for the next epoch's order."""
        import torch

        rng, steps = np.random.default_rng([self.seed, 1]), max(1, len(X) // self.batch)
        optimiser = torch.optim.SGD(
            module.parameters(), lr=self.rate, momentum=self.momentum, weight_decay=self.weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.epochs * steps)
        for _ in range(self.epochs):
            order = torch.tensor(rng.permutation(len(X)))
            for part in order[: steps * self.batch].chunk(steps):
                optimiser.zero_grad()
                (0.5 * (module(X[part]) - targets[part]).square().sum(dim=1).mean()).backward()
                optimiser.step()
                schedule.step()


def with_all_statistics(module: Any, X: Any) -> None:
    """Give the batch norm the statistics of all rows, and put the module into eval mode."""
    import torch

    module.eval()
    with torch.no_grad():
        response = module[0](X)
        module[1].running_mean.copy_(response.mean(dim=0))
        module[1].running_var.copy_(response.var(dim=0, unbiased=False))


def accuracy(module: Any, X: FloatMatrix, labels: np.ndarray) -> float:
    """Share of rows whose largest output is their class; 0 for outputs that are not numbers."""
    import torch

    with torch.no_grad():
        outputs = module(torch.tensor(X, dtype=torch.float32)).numpy()
    return float(np.mean(outputs.argmax(axis=1) == labels)) if np.isfinite(outputs).all() else 0.0


def _directions(module: Any, first: Float, metric: Float) -> tuple[Float, Float]:
    """Energies and changes by direction."""
    weight, gamma, output = (
        tensor.detach().double().numpy() for tensor in (module[0].weight, module[1].weight, module[3].weight)
    )
    q = metric[:, None] * weight.T
    shares = q**2 / (q**2).sum(axis=0)
    energies = shares @ (gamma**2 * (output**2).sum(axis=0))
    moved = np.sqrt(np.mean((q - metric[:, None] * first) ** 2, axis=1))
    return energies, moved
