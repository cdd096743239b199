"""Non-convex training by torch: two-layer batch-normalised ReLU networks side by side, one a seed, on full batches.

What is minimised is the mean of the losses plus ``lam / 2`` times the squares of batch norm's scale and offset and of
the output layer, coupled (SGD's and Adam's own ``weight_decay``), with ``lam = weight_decay / sqrt(n)``: ``1 / n``
times the program (mathematics, section 1e).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from convexbn._types import Float
from convexbn.program.layers import Layers
from convexbn.program.losses import Loss
from convexbn.program.network import BatchNormNetwork

if TYPE_CHECKING:
    import torch

#: What is added to the variance: nothing that shows.
_EPS = 1e-12


@dataclass(frozen=True)
class Descent:
    """How networks are trained.

    Attributes
    ----------
    optimiser : {"adam", "sgd"}
        SGD has Nesterov momentum 0.9.
    rate : float
        Learning rate at the start; it falls as a cosine to 0.
    steps : int
        Full batches.
    width : int
        Neurons of each network.
    seeds : sequence of int
        One a network.
    """

    optimiser: str
    rate: float
    steps: int
    width: int
    seeds: Sequence[int]

    def train(
        self, X: Float, loss: Loss, weight_decay: float, record: Sequence[int], dtype: str = "float64"
    ) -> Iterator[tuple[int, float, list[BatchNormNetwork | None]]]:
        """Yield steps, CPU seconds of the training until then, and the networks, one a seed, with statistics of X.

        None stands for a network whose numbers have overflowed.

        Parameters
        ----------
        X : ndarray (n, d)
        loss : Loss
            Squared loss or softmax cross-entropy.
        weight_decay : float
            Against the sum of the losses; 0: none.
        record : sequence of int
            Numbers of steps after which to yield.
        dtype : {"float64", "float32"}
            Of the training.
        """
        import torch

        numbers = getattr(torch, dtype)
        rows, targets = (torch.tensor(array, dtype=numbers) for array in (X, loss.targets))
        networks = _Networks.drawn(X.shape[1], self.width, loss.targets.shape[1], self.seeds, numbers)
        optimiser = self._optimiser(networks, weight_decay / np.sqrt(len(X)))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps)
        seconds, wanted = 0.0, set(record)
        for step in range(self.steps + 1):
            if step in wanted:
                yield step, seconds, networks.read(X)
            started = time.process_time()
            optimiser.zero_grad()
            networks.mean_loss(rows, targets, type(loss).__name__).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            seconds += time.process_time() - started

    def last(self, X: Float, loss: Loss, weight_decay: float) -> list[BatchNormNetwork | None]:
        """Networks at the end."""
        ((_, _, networks),) = self.train(X, loss, weight_decay, [self.steps])
        return networks

    def _optimiser(self, networks: _Networks, decay: float) -> torch.optim.Optimizer:
        import torch

        decayed = {"params": [networks.scale, networks.offset, networks.output], "weight_decay": decay}
        groups: list[Any] = [{"params": [networks.weight]}, decayed]
        if self.optimiser == "adam":
            return torch.optim.Adam(groups, lr=self.rate)
        return torch.optim.SGD(groups, lr=self.rate, momentum=0.9, nesterov=True)


@dataclass(frozen=True)
class _Networks:
    """Parameters of B networks: ``weight`` (d, B m), ``scale`` and ``offset`` (B m,), ``output`` (B, m, K)."""

    weight: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    output: torch.Tensor

    @classmethod
    def drawn(cls, d: int, width: int, outputs: int, seeds: Sequence[int], dtype: torch.dtype) -> _Networks:
        """Random parameters of torch's sizes: the same of a seed, whatever the other seeds."""
        import torch

        firsts, lasts = [], []
        for seed in seeds:
            rng = np.random.default_rng(seed)
            firsts.append(rng.uniform(-1, 1, (d, width)) / np.sqrt(d))
            lasts.append(rng.uniform(-1, 1, (width, outputs)) / np.sqrt(width))
        many = width * len(seeds)
        arrays = np.hstack(firsts), np.ones(many), np.zeros(many), np.stack(lasts)
        return cls(*(torch.tensor(array, dtype=dtype, requires_grad=True) for array in arrays))

    def mean_loss(self, rows: torch.Tensor, targets: torch.Tensor, loss: str) -> torch.Tensor:
        """Sum over the networks of the mean loss."""
        import torch
        from torch.nn import functional

        B, m, _ = self.output.shape
        normalised = functional.batch_norm(
            rows @ self.weight, None, None, self.scale, self.offset, training=True, eps=_EPS
        )
        outputs = torch.einsum("nbm,bmk->bnk", functional.relu(normalised).reshape(len(rows), B, m), self.output)
        if loss == "SquaredLoss":
            return 0.5 * (outputs - targets).square().sum() / len(rows)
        labels = targets.argmax(dim=1).repeat(B)
        return functional.cross_entropy(outputs.reshape(B * len(rows), -1), labels) * B

    def read(self, X: Float) -> list[BatchNormNetwork | None]:
        """The networks in float64, with the statistics of the rows; None for one that has overflowed."""
        weight, scale, offset, output = (
            tensor.detach().double().numpy().copy() for tensor in (self.weight, self.scale, self.offset, self.output)
        )
        m, networks = output.shape[1], list[BatchNormNetwork | None]()
        for b, last in enumerate(output):
            own, zeros = slice(b * m, (b + 1) * m), np.zeros(m)
            layers = Layers(
                weight[:, own], zeros, zeros, np.ones(m), _EPS, scale[own], offset[own], last, np.zeros(last.shape[1])
            )
            sound = all(np.isfinite(array).all() for array in (weight[:, own], scale[own], offset[own], last))
            networks.append(layers.with_statistics_of(X).network(X) if sound else None)
        return networks


def balanced_objective(network: BatchNormNetwork | None, X: Float, loss: Loss, weight_decay: float) -> float:
    """Loss plus ``weight_decay * sum_j ||s_j|| ||c_j||``, in float64 from the raw rows that gave the statistics.

    It is what the weight decay becomes when every neuron's layers are rescaled against each other, which changes no
    output: no more than the weight decay of the weights as they are. Infinity for None.
    """
    if network is None:
        return float("inf")
    masses = np.hypot(network.gamma, network.shift) * np.linalg.norm(network.output, axis=1)
    return loss.value(network.predict(X)) + weight_decay * float(masses.sum())
