"""Losses of the training program: value, negative gradient, dual value ``D(V) = -L*(-V)`` and its domain.

Every loss is a weighted sum over rows, ``L(F) = sum_i w_i l(f_i, y_i)``, with outputs ``F`` (n, K). The dual
variable lives where the negative gradient does: ``V = -grad L(F)`` (weights included), and the
Fenchel-Young equality ``L(F) = D(V) - <V, F>`` holds there (mathematics, section 6).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeAlias

import numpy as np

from convexbn._types import EPS, Float, FloatMatrix, Index

#: What a dual variable may lie outside its domain by rounding alone.
_ROUNDING = 64 * EPS


@dataclass(frozen=True)
class Loss:
    """A weighted loss bound to its targets.

    Parameters
    ----------
    targets : ndarray (n, K)
        Targets, one row a sample.
    weights : ndarray (n,)
        Positive sample weights.
    constant : float
        Added to the value and to the dual value: what merging rows with equal features leaves behind.
    """

    targets: Float
    weights: Float
    constant: float = 0.0

    #: Upper bound of the second derivative of ``l`` in any direction of ``f``.
    curvature: ClassVar[float]

    #: Whether rows of equal outputs depend on their targets through the mean alone.
    depends_on_means: ClassVar[bool] = True

    #: Whether the loss is the sum of those of its rows.
    separable: ClassVar[bool] = True

    #: Whether ``l`` keeps its curvature where gradient descent goes: steps beyond what is stable then diverge.
    nearly_quadratic: ClassVar[bool] = False

    @property
    def output_scale(self) -> float:
        """Size of the outputs that the loss asks for: 1 for labels, that of the targets for numbers."""
        return 1.0

    def value(self, outputs: Float) -> float:
        """``L(F)``."""
        raise NotImplementedError

    def negative_gradient(self, outputs: Float) -> Float:
        """``V = -grad L(F)``."""
        raise NotImplementedError

    def dual_value(self, dual: Float) -> float:
        """``D(V)``, rounded downwards; ``-inf`` outside the domain."""
        raise NotImplementedError

    @property
    def rows_together(self) -> int:
        """Consecutive rows that share a term: blocks of rows hold whole terms."""
        return 1

    @property
    def of_cases(self) -> Loss:
        """The loss as a function of what its terms see: of the outputs of rows where each has a term of its own."""
        return self

    def pooled(self, hidden: FloatMatrix) -> FloatMatrix:
        """Hidden units (n, m) as the output layer sees them, (n, R m) for ``R`` regions of each neuron, here one."""
        return hidden

    def unpooled(self, gradient: FloatMatrix, hidden: FloatMatrix) -> FloatMatrix:
        """Gradient by the hidden units from that by the pooled ones."""
        return gradient

    def by_region(self, output: FloatMatrix) -> FloatMatrix:
        """An output layer (m, R K), one row a neuron, as one (R m, K) of the pooled units."""
        return output

    def by_neuron(self, regional: FloatMatrix) -> FloatMatrix:
        """The way back: (R m, K) as (m, R K)."""
        return regional

    def outputs(self, hidden: FloatMatrix, output: FloatMatrix) -> FloatMatrix:
        """What the terms see of hidden units (n, m) and an output layer (m, R K)."""
        outputs: FloatMatrix = self.pooled(hidden) @ self.by_region(output)
        return outputs

    def pull_back(self, dual: FloatMatrix, hidden: FloatMatrix, output: FloatMatrix) -> tuple[FloatMatrix, FloatMatrix]:
        """``<dual, outputs(hidden, output)>`` differentiated by both."""
        by_hidden = self.unpooled(dual @ self.by_region(output).T, hidden)
        return by_hidden, self.by_neuron(self.pooled(hidden).T @ dual)

    def spread(self, dual: Float) -> Float:
        """A dual point of what the terms see as one of the hidden units."""
        return dual

    def arranged(self, rows: Float) -> Float:
        """Rows (n, q) as the hidden units are made of them: one each, or the largest of a group, (n, G, q)."""
        return rows

    @property
    def hidden_norm(self) -> float:
        """Upper bound of ``||hidden units|| / ||rows||``."""
        return 1.0

    def of_rows(self, part: Index | slice) -> Loss:
        """The terms of some rows."""
        return replace(self, targets=self.targets[part], weights=self.weights[part], constant=0.0)

    def at_best_bias(self, outputs: Float) -> tuple[Loss, Float, float | None]:
        """Loss without output bias, outputs with the best one, and the decay of the bias: None where there is none."""
        return self, outputs, None

    def merged(self, groups: np.ndarray, n_groups: int) -> Loss:
        """The same loss as a function of one output row per group of rows, where it ``depends_on_means``.

        Raises
        ------
        TypeError
            For one that does not.
        """
        if not self.depends_on_means:
            raise TypeError(f"rows of {type(self).__name__} cannot be merged: it depends on each target of a group.")
        weights: Float = np.bincount(groups, self.weights, n_groups).astype(np.float64)
        sums = np.zeros((n_groups, self.targets.shape[1]))
        np.add.at(sums, groups, self.weights[:, None] * self.targets)
        means = sums / weights[:, None]
        constant = self.constant + self._left_behind(means[groups])
        return replace(self, targets=means, weights=weights, constant=constant)

    def _left_behind(self, means: Float) -> float:
        """Value that does not depend on the outputs when targets are replaced by group means."""
        return 0.0


@dataclass(frozen=True)
class SquaredLoss(Loss):
    """``1/2 sum_i w_i ||f_i - y_i||^2``."""

    curvature: ClassVar[float] = 1.0
    nearly_quadratic: ClassVar[bool] = True

    @property
    def output_scale(self) -> float:
        return root_mean_square(self.targets, self.weights)

    def value(self, outputs: Float) -> float:
        residual = outputs - self.targets
        return float(0.5 * self.weights @ np.square(residual).sum(axis=1)) + self.constant

    def negative_gradient(self, outputs: Float) -> Float:
        return self.weights[:, None] * (self.targets - outputs)

    def dual_value(self, dual: Float) -> float:
        half = 0.5 * dual / self.weights[:, None]
        return _sum_downwards(dual * (self.targets - half)) + self.constant

    def _left_behind(self, means: Float) -> float:
        return SquaredLoss(self.targets, self.weights).value(means)


@dataclass(frozen=True)
class HuberLoss(Loss):
    """``sum_i w_i sum_k h(f_ik - y_ik)``: ``r^2 / 2`` up to ``|r| = delta``, ``delta (|r| - delta / 2)`` beyond.

    Parameters
    ----------
    delta : float, default=1.0
        Residual from which on the loss grows linearly, in the units of the targets.

    Examples
    --------
    >>> loss = HuberLoss(np.array([[0.0], [0.0]]), np.ones(2), delta=1.0)
    >>> loss.value(np.array([[0.5], [3.0]]))
    2.625
    """

    curvature: ClassVar[float] = 1.0
    depends_on_means: ClassVar[bool] = False
    nearly_quadratic: ClassVar[bool] = True

    delta: float = field(default=1.0, kw_only=True)

    @property
    def output_scale(self) -> float:
        return root_mean_square(self.targets, self.weights)

    def value(self, outputs: Float) -> float:
        size = np.abs(outputs - self.targets)
        near = np.minimum(size, self.delta)
        return float(self.weights @ (near * (size - 0.5 * near)).sum(axis=1)) + self.constant

    def negative_gradient(self, outputs: Float) -> Float:
        return self.weights[:, None] * np.clip(self.targets - outputs, -self.delta, self.delta)

    def dual_value(self, dual: Float) -> float:
        q = dual / self.weights[:, None]
        if np.abs(q).max(initial=0.0) > self.delta * (1 + _ROUNDING):
            return -np.inf
        sizes = np.abs(dual) * (np.abs(self.targets) + 0.5 * np.abs(q))
        return _sum_downwards(dual * (self.targets - 0.5 * q), sizes) + self.constant


@dataclass(frozen=True)
class SquaredHingeLoss(Loss):
    """``1/2 sum_i w_i sum_k (1 - y_ik f_ik)_+^2``, targets -1 or +1; a target in between is a soft label.

    A soft label is a share ``(1 + y) / 2`` of rows with +1 and the rest with -1. Between the margins, ``|f| <= 1``, the
    loss is then ``((f - y)^2 + 1 - y^2) / 2``.
    """

    curvature: ClassVar[float] = 1.0
    nearly_quadratic: ClassVar[bool] = True

    def value(self, outputs: Float) -> float:
        # roots before squares: what a hard label leaves out is 0 even where its square overflows
        p = 0.5 * (1 + self.targets)
        above, below = np.sqrt(p) * np.maximum(1 - outputs, 0), np.sqrt(1 - p) * np.maximum(1 + outputs, 0)
        return float(0.5 * self.weights @ (above**2 + below**2).sum(axis=1)) + self.constant

    def negative_gradient(self, outputs: Float) -> Float:
        p = 0.5 * (1 + self.targets)
        pull = p * np.maximum(1 - outputs, 0) - (1 - p) * np.maximum(1 + outputs, 0)
        return self.weights[:, None] * pull

    def dual_value(self, dual: Float) -> float:
        """``y q - q^2 / 2 + (1 - y^2) / 2`` between the margins, ``|q| - q^2 / (1 +- y)`` beyond one of them."""
        y, q = self.targets, dual / self.weights[:, None]
        hard = np.abs(y) == 1
        if np.any(hard & (y * q < -_ROUNDING * np.abs(q).max(initial=0.0))):
            return -np.inf
        beyond = ~hard & (np.abs(y - q) > 1)
        linear, apart = np.where(beyond, np.sign(q), y), np.where(beyond, 0.0, 0.5 * (1 - y) * (1 + y))
        square = q / np.where(beyond, 1 + np.sign(q) * y, 2.0)
        w = self.weights[:, None]
        terms, sizes = q * (linear - square) + apart, np.abs(q) * (np.abs(linear) + np.abs(square)) + apart
        return _sum_downwards(w * terms, w * sizes) + self.constant


@dataclass(frozen=True)
class LogisticLoss(Loss):
    """``sum_i w_i log(1 + exp(-y_i f_i))``, targets -1 or +1; a target in between is a soft label."""

    curvature: ClassVar[float] = 0.25

    def value(self, outputs: Float) -> float:
        # log(1 + e^f) - p f with p = (1 + y) / 2, in the form that never overflows
        losses = np.logaddexp(0, -np.abs(outputs)) + 0.5 * (np.abs(outputs) - self.targets * outputs)
        return float(self.weights @ losses.sum(axis=1)) + self.constant

    def negative_gradient(self, outputs: Float) -> Float:
        p = 0.5 * (1 + self.targets)
        return self.weights[:, None] * (p * _sigmoid(-outputs) - (1 - p) * _sigmoid(outputs))

    def dual_value(self, dual: Float) -> float:
        p, q = 0.5 * (1 + self.targets), dual / self.weights[:, None]
        if (p - q).min() < -_ROUNDING or (p - q).max() > 1 + _ROUNDING:
            return -np.inf
        terms = _entropy_downwards(p, q) + _entropy_downwards(1 - p, -q)
        return _sum_downwards(self.weights[:, None] * terms) + self.constant


@dataclass(frozen=True)
class CrossEntropyLoss(Loss):
    """``sum_i w_i (log sum_k exp(f_ik) - <y_i, f_i>)``, targets one-hot or any rows of the simplex."""

    curvature: ClassVar[float] = 0.5

    def value(self, outputs: Float) -> float:
        peak, exponentials = _shifted(outputs)
        rest = exponentials.sum(axis=1, where=~peak)
        below = outputs[peak][:, None] - outputs
        losses = (self.targets * below).sum(axis=1) + np.log1p(rest)
        return float(self.weights @ losses) + self.constant

    def negative_gradient(self, outputs: Float) -> Float:
        # y (1 - p) - (1 - y) p, where 1 - p of the largest is the sum of the others: no digits are lost
        peak, exponentials = _shifted(outputs)
        total = exponentials.sum(axis=1, keepdims=True)
        rest = exponentials.sum(axis=1, keepdims=True, where=~peak)
        others = np.where(peak, rest, total - exponentials)
        dual: Float = self.targets * others - (1 - self.targets) * exponentials
        dual *= self.weights[:, None] / total
        return dual

    def dual_value(self, dual: Float) -> float:
        q = dual / self.weights[:, None]
        p = self.targets - q
        if p.min() < -_ROUNDING or np.abs(p.sum(axis=1) - 1).max() > _ROUNDING * p.shape[1]:
            return -np.inf
        return _sum_downwards(self.weights[:, None] * _entropy_downwards(self.targets, q)) + self.constant


#: What binds targets and weights of rows to a loss.
LossKind: TypeAlias = Callable[[Float, Float], Loss]

#: The losses by their public names.
LOSSES: dict[str, type[Loss]] = {
    "squared": SquaredLoss,
    "huber": HuberLoss,
    "squared_hinge": SquaredHingeLoss,
    "logistic": LogisticLoss,
    "cross_entropy": CrossEntropyLoss,
}


def loss_kind(name: str, *, huber_delta: float = 1.0) -> LossKind:
    """The loss of a public name, and for ``"huber"`` its ``delta``.

    Examples
    --------
    >>> loss_kind("huber", huber_delta=0.5)(np.zeros((1, 1)), np.ones(1)).value(np.ones((1, 1)))
    0.375
    """
    return functools.partial(HuberLoss, delta=huber_delta) if name == "huber" else LOSSES[name]


def softmax(outputs: Float) -> Float:
    """Rows ``exp(f) / sum exp(f)``, without overflow."""
    exponentials = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    normalised: Float = exponentials / exponentials.sum(axis=1, keepdims=True)
    return normalised


def root_mean_square(targets: Float, weights: Float) -> float:
    """Weighted root mean square of the rows' norms, 1 where all are zero."""
    peak = float(np.abs(targets).max(initial=0.0)) or 1.0
    return peak * float(np.sqrt(weights @ np.square(targets / peak).sum(axis=1) / weights.sum())) or 1.0


def _sum_downwards(terms: Float, sizes: Float | None = None) -> float:
    """Sum of the terms less what rounding may have added (numpy sums pairwise in blocks of 128).

    ``sizes`` are those of what was subtracted in a term, where that may be more than the term itself.
    """
    slack = EPS * (32 + np.log2(max(terms.size, 1)))
    return float(terms.sum() - slack * (np.abs(terms) if sizes is None else sizes).sum())


def _entropy_downwards(y: Float, q: Float) -> Float:
    """``-p log p`` at ``p = y - q``, 0 at 0, less what rounding in ``p`` may add.

    Hard labels keep full relative accuracy: ``p`` is ``-q`` or its logarithm is ``log1p(-q)``; what remains is the
    rounding of ``q`` itself. Soft labels lose an absolute epsilon in the difference.
    """
    p = y - q
    live = p > 0
    logarithm = np.where(y == 1, np.log1p(-np.where(live, q, 0.0)), np.log(np.where(live, p, 1.0)))
    doubt = np.where(y == 0, 0.0, np.where(y == 1, np.abs(q), 1.0)) * EPS
    terms: Float = np.where(live, -p * logarithm, 0.0) - doubt * (2 - np.maximum(logarithm, np.log(EPS)))
    return terms


def _sigmoid(outputs: Float) -> Float:
    """``1 / (1 + exp(-f))`` to full relative accuracy, without overflow."""
    small = np.exp(-np.abs(outputs))
    sigmoid: Float = np.where(outputs >= 0, 1.0, small) / (1 + small)
    return sigmoid


def _shifted(outputs: Float) -> tuple[np.ndarray, Float]:
    """Mask of the first largest output of every row, and ``exp(f - max f)``."""
    peak = np.arange(outputs.shape[1]) == outputs.argmax(axis=1)[:, None]
    return peak, np.exp(outputs - outputs.max(axis=1, keepdims=True))
