"""Certificates of torch networks: how far one is from the optimum of its own loss and optimiser."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import nn

from convexbn.nn.convolution import ConvolutionalLayers, is_convolutional, read_convolutional
from convexbn.nn.last_layers import LastLayers, as_targets, as_tensor, read_last_layers
from convexbn.training.audit import Effort, audit, effort_of
from convexbn.training.audit_report import Audit
from convexbn.training.trained_objective import Objective, TrainedLoss, loss_names, torch_losses


def certify(
    module: nn.Module, X: Any, y: Any, *, loss: nn.Module | str, optimizer: Any = None,
    weight_decay: float | None = None, **effort: Unpack[Effort],
) -> Audit:  # fmt: skip
    """Certify a network that torch trained: objective, lower bound over all widths, gap and its cause.

    The network ends in Linear, BatchNorm1d, ReLU, Linear, which are judged on the features that earlier layers compute
    in eval mode. Or it consists of Conv, BatchNorm, ReLU, pooling, Linear; its batch norm counts a row for every
    location, so that ``n`` of the weight decay is then ``N``.

    The batch norm that is judged has the statistics of all rows of ``X``, as in train mode on one batch. The audit also
    reports the loss in eval mode, with the stored statistics (averages over batches, of unbiased variances). The module
    is not changed: a copy is run.

    The objective is ``factor * sum of losses + weight decay / 2 * squares`` of batch norm's scale and offset and of the
    last layer, with the reduction of ``loss`` and the decay of ``optimizer``. Decay on layers before batch norm does
    not count: they can be scaled down for free, so that it does not change the optimum. (With ``eps`` this makes the
    network's own objective larger, but never the bound invalid.) Dropout is taken to be off.

    Parameters
    ----------
    module : torch.nn.Module
        In any mode, on any device.
    X, y : ndarray or Tensor (n, ...), array-like or Tensor (n,) or (n, K)
        All training rows, as the module takes them, and their targets, as the loss takes them.
    loss : torch.nn.Module or str
        ``nn.MSELoss()``, ``nn.HuberLoss()``, ``nn.CrossEntropyLoss()`` (label smoothing included) or
        ``nn.BCEWithLogitsLoss()``, of reduction mean or sum. Or a loss of this package, summed over rows: ``"squared"``
        (half the squares), ``"huber"`` (of delta 1), ``"cross_entropy"``, ``"logistic"`` and ``"squared_hinge"``
        (targets -1 and +1).
    optimizer : torch.optim.Optimizer, optional
        The optimiser that trained it, for its weight decay: SGD, Adam and others that add it to the gradient, with
        the ``lambd`` of ASGD. AdamW does not add it, and minimises no such objective: give ``weight_decay`` instead.
    weight_decay : float, optional
        Instead of an optimiser, beta of ``sum of losses + beta / 2 * (gamma^2 + shift^2 + output^2)``, with
        ``gamma = sqrt(n) * scale`` and ``shift = sqrt(n) * offset``, and a last bias without decay. A common decay
        ``lam`` of an optimiser is ``lam / (factor * sqrt(n))``: with a mean loss ``lam * sqrt(n)``.
    **effort
        ``tol`` (float, default 1e-6): relative gap that counts as optimal. ``time_limit`` (float or None, default 60):
        seconds for our own training and the proof, which tell the causes of a gap apart; 0 computes the cheapest bound
        alone, None does a stated amount of work. ``random_state`` (int, default 0): seed of our own training.

    Returns
    -------
    Audit
        Read ``audit.explanation`` first.

    Raises
    ------
    TypeError, ValueError
        As ``read_last_layers``; for losses, optimisers and targets that have no such objective; for neurons that do not
        vary over the rows.

    Examples
    --------
    >>> import numpy as np, torch, convexbn, convexbn.nn
    >>> X = np.random.default_rng(0).standard_normal((12, 20))
    >>> model = convexbn.ConvexBNRegressor(activation="relu", weight_decay=0.5).fit(X, X[:, 0])
    >>> module = convexbn.nn.to_module(model.network_, dtype=torch.float64)
    >>> found = convexbn.nn.certify(module, X, X[:, 0], loss="squared", weight_decay=0.5)
    >>> found.status.value, found.cause.value, found.relative_gap <= 1e-6
    ('CERTIFIED', 'none', True)
    """
    chosen = effort_of("certify", {"tol": 1e-6, "time_limit": 60.0, "random_state": 0}, effort)
    rows = as_tensor(X)
    last = read_convolutional(module, rows) if is_convolutional(module) else read_last_layers(module)
    objective = _objective(_trained_loss(loss, y, len(last.layers.output_bias)), last, optimizer, weight_decay)
    if isinstance(last, LastLayers):
        return audit(last.layers, last.features(rows), objective, deep=bool(last.before), **chosen)
    locations = last.convolution.geometry.n_locations
    hidden = objective.hidden_decay * (1 if weight_decay is None else locations)
    objective = replace(objective, rows_together=locations, hidden_decay=hidden)
    return audit(last.layers, last.convolution.rows(rows.numpy()), objective, convolution=last.convolution, **chosen)


#: Optimisers that add weight_decay times the parameter to the gradient, unless they are told to decouple it.
_IN_THE_GRADIENT = ("SGD", "Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "ASGD")


def _trained_loss(loss: Any, y: Any, n_outputs: int) -> TrainedLoss:
    """Loss of a torch module or a name, bound to its targets."""
    targets = as_targets(y)
    if isinstance(loss, str):
        return TrainedLoss.from_name(loss, targets, n_outputs)
    name = type(loss).__name__
    if name not in torch_losses() or type(loss) is not getattr(nn, name):
        raise TypeError(
            f"loss must be {', '.join(f'nn.{known}()' for known in torch_losses())} or one of the names "
            f"{', '.join(loss_names())}; got {loss!r}."
        )
    for setting in ("weight", "pos_weight"):
        if getattr(loss, setting, None) is not None:
            raise ValueError(
                f"{name} has {setting}, which weights the loss of rows but not their batch norm statistics; this is "
                "not supported: train without."
            )
    if loss.reduction not in ("mean", "sum"):
        raise ValueError(f"{name} has reduction={loss.reduction!r}: give the one that was trained, 'mean' or 'sum'.")
    if targets.ndim == 1 and (targets == getattr(loss, "ignore_index", None)).any():
        raise ValueError(f"{name} ignores the rows of y that are {loss.ignore_index}: leave them out of X and y.")
    return TrainedLoss.from_name(
        name, targets, n_outputs,
        reduction=str(loss.reduction), label_smoothing=float(getattr(loss, "label_smoothing", 0.0)),
        huber_delta=float(getattr(loss, "delta", 1.0)),
    )  # fmt: skip


def _objective(
    loss: TrainedLoss, last: LastLayers | ConvolutionalLayers, optimizer: Any, weight_decay: float | None
) -> Objective:
    """Objective of a weight decay of this package, or of an optimiser that holds the layers' parameters."""
    if (optimizer is None) == (weight_decay is None):
        raise ValueError(
            "give optimizer=, whose weight decay the network was trained with, or weight_decay=, this package's own "
            "(lam of an optimiser with a mean loss is lam * sqrt(n)), and not both."
        )
    if weight_decay is not None:
        return Objective.with_weight_decay(loss, float(weight_decay))
    decays = _decays(last, optimizer)
    scale, offset = decays[f"{last.batch_norm}.weight"], decays[f"{last.batch_norm}.bias"]
    if scale != offset:
        raise ValueError(
            f"the optimiser's weight decay is {scale} for weight and {offset} for bias of BatchNorm "
            f"'{last.batch_norm}', and certificates need one for both: give the weight_decay that you mean."
        )
    output = decays[f"{last.output}.weight"]
    return Objective.with_optimizer_decay(loss, scale, output, decays.get(f"{last.output}.bias", 0.0))


def _decays(last: LastLayers | ConvolutionalLayers, optimizer: Any) -> dict[str, float]:
    """Weight decay of batch norm and of the last layer, by parameter name."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    groups = {id(tensor): group for group in optimizer.param_groups for tensor in group["params"]}
    decays = {}
    for layer in (last.batch_norm, last.output):
        module = last.module.get_submodule(layer)
        for key, tensor in module.named_parameters():
            if id(tensor) not in groups:
                raise ValueError(
                    f"the optimiser does not hold {key} of {type(module).__name__} '{layer}': give the one that "
                    "trained it, or weight_decay."
                )
            if not tensor.requires_grad and (layer, key) != (last.output, "bias"):  # the bias may be held
                raise ValueError(
                    f"{key} of {type(module).__name__} '{layer}' is frozen, so that no weight decay acts on it, and "
                    "certificates need one for all: give the weight_decay that you mean."
                )
            group = groups[id(tensor)]
            _check_in_the_gradient(optimizer, group)
            decays[f"{layer}.{key}"] = float(group["weight_decay"]) + float(group.get("lambd", 0.0))  # ASGD has both
    return decays


def _check_in_the_gradient(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    name = type(optimizer).__name__
    known = name in _IN_THE_GRADIENT and type(optimizer) is getattr(torch.optim, name)
    if not known or group.get("decoupled_weight_decay", False):
        raise ValueError(
            f"{name} does not add its weight decay to the gradient, as SGD and Adam do, or is not known to do so, and "
            "so minimises no objective of loss plus squares: give the weight_decay to certify for."
        )
    if group.get("maximize", False):
        raise ValueError(f"{name} maximises: give the optimiser that minimised the loss, or weight_decay.")
