"""The objective of a network that torch trained, in the terms of this package.

Torch minimises ``factor * L(F) + 1/2 sum of decays times squares``, with ``L`` a sum over rows. The decays of batch
norm (scale and offset) and of the last layer act through their product alone, since a neuron's two layers can be
rescaled against each other: they are one weight decay (mathematics, sections 1a and 1e).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from convexbn._types import Float
from convexbn.program.layers import Layers
from convexbn.program.losses import LOSSES, LossKind, loss_kind
from convexbn.program.targets import checked_targets, numbers, ranked_labels, require


def torch_losses() -> dict[str, str]:
    """Names of torch's losses, and the losses of this package of which they are multiples."""
    return {loss.torch_name: name for name, loss in LOSSES.items() if loss.torch_name}


def loss_names() -> list[str]:
    """All names of losses: those of this package are sums over rows; torch's are means, as is torch's default."""
    return [*LOSSES, *torch_losses()]


@dataclass(frozen=True, eq=False)
class TrainedLoss:
    """``factor * L(F)``, with ``L`` a loss of this package bound to targets.

    Attributes
    ----------
    name : str
        A key of ``losses.LOSSES``.
    targets : ndarray (n, K)
        In the form that the loss takes.
    factor, huber_delta : float
        Factor of the sum over rows, and the parameter of the Huber loss.
    """

    name: str
    targets: Float
    factor: float
    huber_delta: float = 1.0

    @classmethod
    def from_name(
        cls, name: str, y: Any, n_outputs: int, *, reduction: str = "mean", label_smoothing: float = 0.0,
        huber_delta: float = 1.0,
    ) -> TrainedLoss:  # fmt: skip
        """Loss by a name of this package or of torch, with targets in torch's form.

        Parameters
        ----------
        name : str
            ``"squared"`` (half the sum of squares), ``"huber"``, ``"squared_hinge"``, ``"cross_entropy"`` and
            ``"logistic"`` are sums over rows; ``"MSELoss"``, ``"HuberLoss"``, ``"CrossEntropyLoss"`` and
            ``"BCEWithLogitsLoss"`` are torch's.
        y : array-like (n,) or (n, K)
            Numbers; for cross-entropy class indices or rows of probabilities; for the logistic loss and the squared
            hinge -1 and +1; for ``"BCEWithLogitsLoss"`` numbers in [0, 1].
        n_outputs : int
            ``K``.
        reduction, label_smoothing, huber_delta : {"mean", "sum"}, float, float
            For torch's losses, torch's cross-entropy and the Huber loss.

        Raises
        ------
        ValueError
            For an unknown loss, and targets that do not suit it.

        Examples
        --------
        >>> TrainedLoss.from_name("MSELoss", [1.0, 2.0, 4.0, 5.0], 1).factor
        0.5
        """
        if name not in loss_names():
            raise ValueError(f"loss must be one of {', '.join(loss_names())}; got {name!r}.")
        own = torch_losses().get(name, name)
        of_torch, kind = own != name, LOSSES[own].target_kind
        if of_torch and kind == "signs":
            targets = numbers(y, n_outputs)
            require(bool((np.abs(targets - 0.5) <= 0.5).all()), f"{name} takes targets in [0, 1]")
            targets = 2 * targets - 1
        else:
            targets = checked_targets(y, n_outputs, own)
        if kind == "probabilities":
            targets = (1 - label_smoothing) * targets + label_smoothing / n_outputs
        if not 0 < huber_delta < np.inf:
            raise ValueError(f"huber_delta must be a positive number, got {huber_delta}.")
        factor = LOSSES[own].torch_factor if of_torch else 1.0
        if of_torch and reduction == "mean":
            factor /= len(targets) if kind == "probabilities" else targets.size
        return cls(own, targets, factor, huber_delta)

    @property
    def kind(self) -> LossKind:
        """``L``, not yet bound to targets."""
        return loss_kind(self.name, huber_delta=self.huber_delta)

    def value(self, outputs: Float) -> float:
        """``factor * L(F)``."""
        return self.factor * self.kind(self.targets, np.ones(len(outputs))).value(outputs)


@dataclass(frozen=True, eq=False)
class Objective:
    """``factor * (L(F) + hidden / 2 (scale^2 + offset^2) + output / 2 C^2 + bias / 2 b^2)``.

    Attributes
    ----------
    loss : TrainedLoss
    hidden_decay, output_decay, bias_decay : float
        Of batch norm's scale and offset, the last layer's weight and its bias, relative to the summed loss.
    rows_together : int
        Rows of batch norm for each row of the loss: the locations of a convolution.
    """

    loss: TrainedLoss
    hidden_decay: float
    output_decay: float
    bias_decay: float = 0.0
    rows_together: int = 1

    @classmethod
    def with_weight_decay(cls, loss: TrainedLoss, weight_decay: float) -> Objective:
        """Objective of this package: beta on ``gamma = sqrt(n) scale``, ``shift = sqrt(n) offset`` and ``C``."""
        if not 0 < weight_decay < np.inf:
            raise ValueError(f"weight_decay must be a positive number, got {weight_decay}.")
        return cls(loss, len(loss.targets) * weight_decay, weight_decay)

    @classmethod
    def with_optimizer_decay(
        cls, loss: TrainedLoss, hidden: float, output: float | None = None, bias: float | None = None
    ) -> Objective:
        """Objective of an optimiser that adds its weight decay to the gradient: ``factor L + decay / 2 squares``.

        Parameters
        ----------
        loss : TrainedLoss
        hidden, output, bias : float
            The optimiser's ``weight_decay`` of batch norm, and those of the last layer, by default equal to it.
        """
        output, bias = (hidden if decay is None else decay for decay in (output, bias))
        if not (0 < hidden < np.inf and 0 < output < np.inf and 0 <= bias < np.inf):
            raise ValueError(
                f"the optimiser's weight decay is {hidden} for batch norm and {output} for the last layer: without "
                "both the penalty of a network can be scaled away and there is no optimum; train with both, or give "
                "the weight_decay that you mean."
            )
        return cls(loss, hidden / loss.factor, output / loss.factor, bias / loss.factor)

    @property
    def weight_decay(self) -> float:
        """Beta of the program: ``sqrt(hidden_decay output_decay / n)``, ``n`` the rows of batch norm."""
        return float(np.sqrt(self.hidden_decay * self.output_decay / (len(self.loss.targets) * self.rows_together)))

    def value(self, layers: Layers, outputs: Float) -> float:
        """Objective of layers with these outputs on the training rows, with the penalties of the layers as given."""
        hidden = float(np.sum(layers.scale**2) + np.sum(layers.offset**2))
        penalty = self.hidden_decay * hidden + self.output_decay * float(np.sum(layers.output**2))
        penalty += self.bias_decay * float(layers.output_bias @ layers.output_bias)
        return self.loss.value(outputs) + self.loss.factor * 0.5 * penalty


def targets_of_labels(name: str, y: np.ndarray[Any, Any], n_outputs: int) -> np.ndarray[Any, Any]:
    """Targets of a loss from one column of numbers or class labels.

    Parameters
    ----------
    name : str
        A name that ``TrainedLoss.from_name`` takes.
    y : ndarray (n,)
        Numbers for a squared or Huber loss of one output. Else labels: integers from 0 to K - 1 number the outputs;
        others are ranked.
    n_outputs : int
        ``K``.

    Raises
    ------
    ValueError
        When there are not as many labels as outputs.

    Examples
    --------
    >>> targets_of_labels("CrossEntropyLoss", np.array(["b", "a", "c"]), 3)
    array([1, 0, 2])
    """
    own = torch_losses().get(name, name)
    kind = LOSSES[own].target_kind
    if "regression" in LOSSES[own].tasks and n_outputs == 1 and y.dtype.kind in "iufb":
        return y
    labels = ranked_labels(y, max(n_outputs, 2))
    if kind == "probabilities":
        return labels
    one_hot = labels[:, None] if n_outputs == 1 else np.eye(n_outputs)[labels]
    return 2 * one_hot - 1 if kind == "signs" and name == own else one_hot
