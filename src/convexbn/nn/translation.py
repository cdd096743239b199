"""Torch's loss modules and optimisers in the terms of this package."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from convexbn.nn.convolution import ConvolutionalTail
from convexbn.nn.tail import Tail, kind_of
from convexbn.training.trained_objective import LOSS_NAMES, TORCH_LOSSES, Objective, TrainedLoss

#: Optimisers that add weight_decay times the parameter to the gradient, unless they are told to decouple it.
_IN_THE_GRADIENT = (
    "SGD", "Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "ASGD"
)  # fmt: skip


def trained_loss(loss: Any, y: Any, n_outputs: int) -> TrainedLoss:
    """Loss of a torch module, or by name, bound to its targets.

    Parameters
    ----------
    loss : torch.nn.Module or str
        ``MSELoss``, ``HuberLoss``, ``CrossEntropyLoss`` or ``BCEWithLogitsLoss`` of reduction ``"mean"`` or ``"sum"``,
        without class weights; or a name of ``TrainedLoss.of``.
    y : array-like or Tensor
        Targets as that loss takes them.
    n_outputs : int

    Raises
    ------
    TypeError, ValueError
        For other losses, and for settings that this package has not.
    """
    targets = y.detach().cpu().numpy() if isinstance(y, torch.Tensor) else np.asarray(y)
    if isinstance(loss, str):
        return TrainedLoss.of(loss, targets, n_outputs)
    name = type(loss).__name__
    if not isinstance(loss, nn.Module) or name not in TORCH_LOSSES or type(loss) is not getattr(nn, name):
        raise TypeError(
            f"loss must be {', '.join(f'nn.{known}()' for known in TORCH_LOSSES)} or one of the names "
            f"{', '.join(LOSS_NAMES)}; got {loss!r}."
        )
    for setting in ("weight", "pos_weight"):
        if getattr(loss, setting, None) is not None:
            raise ValueError(
                f"{name} has {setting}, which weights the loss of rows and not their batch norm statistics; this "
                "package has no such loss: train without."
            )
    if loss.reduction not in ("mean", "sum"):
        raise ValueError(f"{name} has reduction={loss.reduction!r}: give the one that was trained, 'mean' or 'sum'.")
    if targets.ndim == 1 and (targets == getattr(loss, "ignore_index", None)).any():
        raise ValueError(f"{name} ignores the rows of y that are {loss.ignore_index}: leave them out of X and y.")
    return TrainedLoss.of(
        name, targets, n_outputs,
        reduction=str(loss.reduction), label_smoothing=float(getattr(loss, "label_smoothing", 0.0)),
        huber_delta=float(getattr(loss, "delta", 1.0)),
    )  # fmt: skip


def objective_of(
    loss: TrainedLoss, tail: Tail | ConvolutionalTail, optimizer: Any, weight_decay: float | None
) -> Objective:
    """The objective of a weight decay of this package, or of an optimiser that holds the layers' parameters.

    Raises
    ------
    TypeError
        For what is no optimiser.
    ValueError
        For none or both, for an optimiser whose decay is decoupled from the gradient, and for decays that do not make
        one objective.
    """
    if (optimizer is None) == (weight_decay is None):
        raise ValueError(
            "give optimizer=, whose weight decay was trained with, or weight_decay=, this package's own "
            "(an optimiser's lam with a mean loss is lam * sqrt(n)), and not both."
        )
    if weight_decay is not None:
        return Objective.with_weight_decay(loss, float(weight_decay))
    decays = _decays(tail, optimizer)
    scale, offset = decays[f"{tail.batch_norm}.weight"], decays[f"{tail.batch_norm}.bias"]
    if scale != offset:
        raise ValueError(
            f"the optimiser's weight decay is {scale} for weight and {offset} for bias of BatchNorm1d "
            f"'{tail.batch_norm}': only with one for both is the objective that of a program; give the weight_decay "
            "that you mean."
        )
    output = decays[f"{tail.output}.weight"]
    return Objective.with_optimizer_decay(loss, scale, output, decays.get(f"{tail.output}.bias", 0.0))


def _decays(tail: Tail | ConvolutionalTail, optimizer: Any) -> dict[str, float]:
    """Weight decay of batch norm and of the last layer, by parameter name."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    groups = {id(tensor): group for group in optimizer.param_groups for tensor in group["params"]}
    decays = {}
    for layer in (tail.batch_norm, tail.output):
        module = tail.module.get_submodule(layer)
        for key, tensor in module.named_parameters():
            if id(tensor) not in groups:
                raise ValueError(
                    f"the optimiser does not hold {key} of {kind_of(module)} '{layer}': give the one that trained it, "
                    "or weight_decay."
                )
            _check_in_the_gradient(optimizer, groups[id(tensor)])
            decays[f"{layer}.{key}"] = float(groups[id(tensor)]["weight_decay"])
    return decays


def _check_in_the_gradient(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    name = type(optimizer).__name__
    known = name in _IN_THE_GRADIENT and type(optimizer) is getattr(torch.optim, name)
    if not known or group.get("decoupled_weight_decay", False):
        raise ValueError(
            f"{name} does not add its weight decay to the gradient, as SGD and Adam do, but shrinks the parameters "
            "beside it (or is not known to do so), and so minimises no objective of loss plus squares: give the "
            "weight_decay to certify for."
        )
    if group.get("maximize", False):
        raise ValueError(f"{name} maximises: give the optimiser that minimised the loss, or weight_decay.")
