"""Objective and accuracy of a module, measured in one way before and after its layers are replaced."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from convexbn._types import Float, Index
from convexbn.nn.batch_statistics import outputs_of
from convexbn.nn.last_layers import as_targets
from convexbn.program.layers import Layers
from convexbn.program.losses import LOSSES, Loss, losses_for
from convexbn.program.targets import checked_labels, class_targets
from convexbn.training.trained_objective import TrainedLoss


@dataclass(frozen=True)
class Evaluation:
    """Objective and accuracy of a module.

    Attributes
    ----------
    objective : float
        Sum of the losses plus ``weight_decay * sum_j ||s_j|| ||c_j||`` of the last batch norm and Linear, with
        full-batch statistics in every batch norm. An output bias counts in the losses and is not penalised.
    weight_decay_objective : float
        Sum of the losses plus ``weight_decay / 2`` times the squares of the parameters as they are:
        ``n (scale^2 + shift^2)`` of the last batch norm, and the weights of the last Linear.
    n_neurons : int
        Width of the last hidden layer.
    train_accuracy, validation_accuracy : float or None
        Share of rows whose largest output is that of their class, in eval mode and the module's own type; None
        without classes or without validation rows.
    """

    objective: float
    weight_decay_objective: float
    n_neurons: int
    train_accuracy: float | None
    validation_accuracy: float | None


@dataclass(frozen=True)
class Task:
    """Training rows with their loss and classes (None if the targets are numbers), weight decay, validation rows."""

    rows: torch.Tensor
    loss: Loss
    labels: Index | None
    weight_decay: float
    validation: tuple[torch.Tensor, Index] | None = None

    @classmethod
    def from_targets(cls, X: torch.Tensor, y: Any, K: int, loss: str, weight_decay: float) -> Task:
        """Bind the loss to the targets, classes or numbers; ValueError if they do not fit the rows or the loss.

        Parameters
        ----------
        X, y : Tensor (n, ...), array-like or Tensor (n,) or (n, K)
        K : int
            Outputs of the module.
        loss, weight_decay : str, float
        """
        if not 0 < weight_decay < np.inf:
            raise ValueError(f"weight_decay must be positive and finite, got {weight_decay}.")
        fitting = [name for name in losses_for("classification") if LOSSES[name].takes_outputs(K)]
        if loss not in fitting:
            raise ValueError(f"loss={loss!r} is not for a module of {K} outputs: give {', '.join(map(repr, fitting))}.")
        values, n, labels = as_targets(y), len(X), None
        if values.dtype.kind in "iub":
            labels = checked_labels(values, K, n)
            targets = class_targets(labels, K, loss)
        else:
            targets = TrainedLoss.from_name(loss, values, K).targets
        if len(targets) != n:
            raise ValueError(f"X has {n} rows and y {len(targets)}: give one target for every row.")
        return cls(X, LOSSES[loss](targets, np.ones(n)), labels, weight_decay)

    def validated_on(self, rows: torch.Tensor, y: Any) -> Task:
        """Task with validation rows and their classes."""
        labels = checked_labels(as_targets(y), self.loss.targets.shape[1], len(rows), "y_val")
        return replace(self, validation=(rows, labels))

    def validates(self, module: nn.Module) -> float:
        """Validation accuracy of a module."""
        assert self.validation is not None
        return _accuracy(module, *self.validation)

    def evaluation(self, module: nn.Module, layers: Layers, features: Float) -> Evaluation:
        """Evaluate a module.

        Parameters
        ----------
        module, layers, features : torch.nn.Module, Layers, ndarray (n, p)
            Module, its last layers, and their inputs.
        """
        network, value = layers.network(features), self.loss.value(layers.predict(features))
        penalty = float(np.hypot(network.gamma, network.shift) @ np.linalg.norm(network.output, axis=1))
        squares = len(features) * (layers.scale @ layers.scale + layers.offset @ layers.offset)
        return Evaluation(
            objective=value + self.weight_decay * penalty,
            weight_decay_objective=float(value + self.weight_decay / 2 * (squares + np.sum(layers.output**2))),
            n_neurons=network.n_neurons,
            train_accuracy=None if self.labels is None else _accuracy(module, self.rows, self.labels),
            validation_accuracy=None if self.validation is None else self.validates(module),
        )


def _accuracy(module: nn.Module, rows: torch.Tensor, labels: Index) -> float:
    outputs = torch.cat(list(outputs_of(copy.deepcopy(module).eval(), rows)))
    found = (outputs[:, 0] > 0) if outputs.shape[1] == 1 else outputs.argmax(dim=1)
    return float(np.mean(found.numpy() == labels))
