"""Losses of the training program: value, negative gradient, dual value ``D(V) = -L*(-V)`` and its domain.

Every loss is a weighted sum over rows, ``L(F) = sum_i w_i l(f_i, y_i)``, with outputs ``F`` (n, K). The dual
variable lives where the negative gradient does: ``V = -grad L(F)`` (weights included), and the
Fenchel-Young equality ``L(F) = D(V) - <V, F>`` holds there (mathematics, section 6).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeAlias

import numpy as np
from array_api_compat import device

from convexbn._types import EPS, Bool, Float, Index
from convexbn.data.kernels import namespace, positive_part
from convexbn.program.gauss_newton import Derivative, sum_of_squares
from convexbn.program.rays import Formula, NoFormulaError, shrunk_rays, two_sides, with_norm

#: Distance outside its domain up to which a dual variable may lie from rounding alone.
_ROUNDING = 64 * EPS


@dataclass(frozen=True)
class Loss:
    """A weighted loss bound to its targets.

    Parameters
    ----------
    targets, weights : ndarray (n, K), (n,)
        The sample weights are positive.
    constant : float
        Added to the value and to the dual value; merging rows with equal features leaves it behind.
    """

    targets: Float
    weights: Float
    constant: float = 0.0

    #: Public name, and tasks: ``"classification"``, ``"regression"`` or both.
    name: ClassVar[str] = ""
    tasks: ClassVar[frozenset[str]] = frozenset()
    #: Kind of targets: ``"numbers"``, ``"signs"`` (-1 and +1, or soft labels between) or ``"probabilities"``.
    target_kind: ClassVar[str] = "numbers"
    #: Name of the loss that takes its place for two classes, which have one output; its own if empty.
    binary_name: ClassVar[str] = ""
    #: Whether outputs are logits, whose softmax models the probabilities of classes.
    models_probabilities: ClassVar[bool] = False
    #: Torch's module of this loss, and the factor by which its sum over rows and outputs exceeds this one.
    torch_name: ClassVar[str] = ""
    torch_factor: ClassVar[float] = 1.0
    #: Upper bound of the second derivative of ``l`` in any direction of ``f``.
    curvature: ClassVar[float]
    #: Derivative of ``V`` in the targets, in units of the sample weights; None unless ``l`` has a second derivative.
    target_slope: ClassVar[float | None] = None
    #: Whether rows of equal outputs depend on their targets through the mean alone.
    depends_on_means: ClassVar[bool] = True
    #: Whether ``l`` keeps its curvature where gradient descent goes: unstable steps then diverge.
    nearly_quadratic: ClassVar[bool] = False

    @classmethod
    def takes_outputs(cls, n_outputs: int) -> bool:
        """Whether the loss is defined for so many outputs."""
        return n_outputs > 1 or not cls.binary_name

    @property
    def output_scale(self) -> float:
        """Typical size of outputs: 1, or for losses of regression the root mean square of the targets' norms."""
        if "regression" not in self.tasks:
            return 1.0
        peak = float(np.abs(self.targets).max(initial=0.0)) or 1.0
        squares = np.square(self.targets / peak).sum(axis=1)
        return peak * float(np.sqrt(self.weights @ squares / self.weights.sum())) or 1.0

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
    def without_bias(self) -> Loss:
        """Loss at a given output bias, which outputs then contain; itself for a loss that has none."""
        return self

    @property
    def bias_decay(self) -> float:
        """Weight decay of the output bias."""
        return 0.0

    def best_bias(self, outputs: Float, near: Float | None = None) -> Float:
        """Output bias (K,) that the loss adds to outputs, begun ``near`` one; zeros for a loss that has none."""
        return np.zeros(outputs.shape[1])

    def value_and_dual(self, outputs: Float) -> tuple[float, Float]:
        """Value and negative gradient, which share their exponentials."""
        return self.value(outputs), self.negative_gradient(outputs)

    def dual_at(self, outputs: Float, bias: Float) -> Float:
        """Negative gradient at the best output bias (K,), which is known."""
        return self.negative_gradient(outputs)

    def value_at(self, outputs: Float, bias: Float | float) -> float:
        """Value of outputs with an output bias (K,)."""
        return self.value(outputs + bias)

    def total_curvature(self, outputs: Float, dual: Float) -> Float:
        """``sum_i w_i d2 l(f_i) / df_i2`` (K, K), given the negative gradient ``dual`` at the outputs."""
        side = self.hessian_root(outputs).transpose(1, 0, 2).reshape(outputs.shape[1], -1)
        return side @ side.T

    def hessian_root(self, outputs: Float) -> Float:
        """``R`` (n, K, K) with ``R_i R_i' = w_i d2 l(f_i) / df_i2``, generalised where ``l`` has a kink."""
        n, K = outputs.shape
        return np.sqrt(self.weights)[:, None, None] * np.broadcast_to(self._root(outputs), (n, K, K))

    def _root(self, outputs: Float) -> Float:
        """``R`` for weights of 1: (n, K, K), or (K, K) if it is the same for all rows."""
        raise NotImplementedError

    def gauss_newton(self, outputs: Float, derivative: Derivative, size: int) -> Float:
        """``J' L'' J`` (size, size) for outputs with derivative ``J`` in ``size`` variables.

        Parameters
        ----------
        outputs, derivative, size : ndarray (n, K), Derivative, int
        """
        return sum_of_squares(self.hessian_root(outputs), derivative, size)

    def full_rank(self, weight_decay: float) -> Formula:
        """Optimal hidden units (n, m), times ``sqrt(w)``, and output layer (m, K) at rank n - 1, or NoFormulaError."""
        raise NoFormulaError(f"there is no formula for {type(self).__name__}.")

    def shifted(self, bias: Float) -> Loss:
        """Loss of outputs to which a bias (K,) is added, or NoFormulaError; losses of regression are of residuals."""
        if "regression" not in self.tasks:
            raise NoFormulaError(f"there is no formula for {type(self).__name__} with an output bias.")
        return replace(self, targets=self.targets - bias)

    def reweighted(self, index: Index, weights: Float) -> Loss:
        """Loss of some of the rows with other weights."""
        return replace(self, targets=self.targets[index], weights=weights, constant=0.0)

    def of_rows(self, part: Index | slice) -> Loss:
        """Loss of some of the rows."""
        return replace(self, targets=self.targets[part], weights=self.weights[part], constant=0.0)

    def __getitem__(self, part: Index | slice) -> Loss:
        return self.of_rows(part)

    def merged(self, groups: np.ndarray, n_groups: int) -> Loss:
        """Loss as a function of one output row per group of rows; a TypeError unless it ``depends_on_means``."""
        if not self.depends_on_means:
            raise TypeError(f"rows of {type(self).__name__} cannot be merged: it depends on each target of a group.")
        weights: Float = np.bincount(groups, self.weights, n_groups).astype(np.float64)
        sums = np.zeros((n_groups, self.targets.shape[1]))
        np.add.at(sums, groups, self.weights[:, None] * self.targets)
        means = sums / weights[:, None]
        constant = self.constant + self._left_behind(means[groups])
        return replace(self, targets=means, weights=weights, constant=constant)

    def _left_behind(self, means: Float) -> float:
        """Part of the value that replacing targets by group means removes, whatever the outputs."""
        return 0.0


@dataclass(frozen=True)
class SquaredLoss(Loss):
    """``1/2 sum_i w_i ||f_i - y_i||^2``."""

    name: ClassVar[str] = "squared"
    tasks: ClassVar[frozenset[str]] = frozenset({"classification", "regression"})
    torch_name: ClassVar[str] = "MSELoss"
    torch_factor: ClassVar[float] = 2.0
    curvature: ClassVar[float] = 1.0
    target_slope: ClassVar[float | None] = 1.0
    nearly_quadratic: ClassVar[bool] = True

    def value(self, outputs: Float) -> float:
        residual = outputs - self.targets
        return float(0.5 * self.weights @ namespace(residual).vecdot(residual, residual)) + self.constant

    def negative_gradient(self, outputs: Float) -> Float:
        return self.weights[:, None] * (self.targets - outputs)

    def dual_value(self, dual: Float) -> float:
        half = 0.5 * dual / self.weights[:, None]
        return _sum_downwards(dual * (self.targets - half)) + self.constant

    def total_curvature(self, outputs: Float, dual: Float) -> Float:
        return float(self.weights.sum()) * np.eye(outputs.shape[1])

    def _root(self, outputs: Float) -> Float:
        return np.eye(outputs.shape[1])

    def _left_behind(self, means: Float) -> float:
        return SquaredLoss(self.targets, self.weights).value(means)

    def full_rank(self, weight_decay: float) -> Formula:
        return shrunk_rays(np.sqrt(self.weights)[:, None] * self.targets, weight_decay)


@dataclass(frozen=True)
class HuberLoss(Loss):
    """``sum_i w_i sum_k h(f_ik - y_ik)``: ``r^2 / 2`` up to ``|r| = delta``, ``delta (|r| - delta / 2)`` beyond.

    Parameters
    ----------
    delta : float, default=1.0
        Residual beyond which the loss grows linearly, in the units of the targets.

    Examples
    --------
    >>> loss = HuberLoss(np.array([[0.0], [0.0]]), np.ones(2), delta=1.0)
    >>> loss.value(np.array([[0.5], [3.0]]))
    2.625
    """

    name: ClassVar[str] = "huber"
    tasks: ClassVar[frozenset[str]] = frozenset({"regression"})
    torch_name: ClassVar[str] = "HuberLoss"
    curvature: ClassVar[float] = 1.0
    depends_on_means: ClassVar[bool] = False
    nearly_quadratic: ClassVar[bool] = True

    delta: float = field(default=1.0, kw_only=True)

    def value(self, outputs: Float) -> float:
        xp = namespace(outputs)
        size = xp.abs(outputs - self.targets)
        near = xp.where(size > self.delta, self.delta, size)
        return float(self.weights @ xp.sum(near * (size - 0.5 * near), axis=1)) + self.constant

    def negative_gradient(self, outputs: Float) -> Float:
        near = namespace(outputs).clip(self.targets - outputs, -self.delta, self.delta)
        return self.weights[:, None] * near

    def dual_value(self, dual: Float) -> float:
        q = dual / self.weights[:, None]
        xp = namespace(dual)
        if xp.any(xp.abs(q) > self.delta * (1 + _ROUNDING)):
            return -np.inf
        sizes = xp.abs(dual) * (xp.abs(self.targets) + 0.5 * xp.abs(q))
        return _sum_downwards(dual * (self.targets - 0.5 * q), sizes) + self.constant

    def _root(self, outputs: Float) -> Float:
        return _diagonals(np.where(np.abs(outputs - self.targets) < self.delta, 1.0, 0.0))

    def full_rank(self, weight_decay: float) -> Formula:
        """One neuron for the positive targets, one for the negative ones."""
        if self.targets.shape[1] > 1:
            raise NoFormulaError("no formula: the Huber loss has one for a single output only.")
        return two_sides(self.weights, self.targets[:, 0], functools.partial(self._amplitudes, weight_decay))

    def _amplitudes(self, weight_decay: float, weights: Float, y: Float) -> Float:
        """Minimise ``sum w h(y - f) + beta ||sqrt(w) f||`` over ``f >= 0``, for ``y > 0``.

        ``clip(y - f, -delta, delta) = lambda f``, so that ``f = min(y / (1 + lambda), delta / lambda)``.
        """
        if weight_decay >= np.linalg.norm(np.sqrt(weights) * np.minimum(y, self.delta)):
            return np.zeros_like(y)
        return with_norm(weights, lambda ratio: np.minimum(y / (1 + ratio) * ratio, self.delta) / ratio, weight_decay)


@dataclass(frozen=True)
class SquaredHingeLoss(Loss):
    """``1/2 sum_i w_i sum_k (1 - y_ik f_ik)_+^2``, targets -1 or +1; a target in between is a soft label.

    A soft label stands for a share ``(1 + y) / 2`` of rows with +1 and the rest with -1. Between the margins,
    ``|f| <= 1``, its loss is ``((f - y)^2 + 1 - y^2) / 2``.
    """

    name: ClassVar[str] = "squared_hinge"
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})
    target_kind: ClassVar[str] = "signs"
    curvature: ClassVar[float] = 1.0
    nearly_quadratic: ClassVar[bool] = True

    def value(self, outputs: Float) -> float:
        # roots before squares: what a hard label leaves out is 0 even where its square overflows
        p, xp = 0.5 * (1 + self.targets), namespace(outputs)
        above, below = xp.sqrt(p) * positive_part(1 - outputs), xp.sqrt(1 - p) * positive_part(1 + outputs)
        return float(0.5 * self.weights @ xp.sum(above**2 + below**2, axis=1)) + self.constant

    def negative_gradient(self, outputs: Float) -> Float:
        p = 0.5 * (1 + self.targets)
        pull = p * positive_part(1 - outputs) - (1 - p) * positive_part(1 + outputs)
        return self.weights[:, None] * pull

    def dual_value(self, dual: Float) -> float:
        """``y q - q^2 / 2 + (1 - y^2) / 2`` between the margins, ``|q| - q^2 / (1 +- y)`` beyond one of them."""
        y, q, xp = self.targets, dual / self.weights[:, None], namespace(dual)
        hard = xp.abs(y) == 1
        if xp.any(hard & (y * q < -_ROUNDING * xp.max(xp.abs(q)))):
            return -np.inf
        beyond = ~hard & (xp.abs(y - q) > 1)
        linear, apart = xp.where(beyond, xp.sign(q), y), xp.where(beyond, 0.0, 0.5 * (1 - y) * (1 + y))
        square = q / xp.where(beyond, 1 + xp.sign(q) * y, 2.0)
        w = self.weights[:, None]
        terms, sizes = q * (linear - square) + apart, xp.abs(q) * (xp.abs(linear) + xp.abs(square)) + apart
        return _sum_downwards(w * terms, w * sizes) + self.constant

    def _root(self, outputs: Float) -> Float:
        p = 0.5 * (1 + self.targets)
        return _diagonals(np.sqrt(p * (outputs < 1) + (1 - p) * (outputs > -1)))

    def shifted(self, bias: Float) -> SquaredLoss:
        """Squared loss: between the margins, where a formula's outputs stay, the two differ by a constant."""
        return SquaredLoss(self.targets - bias, self.weights)

    def full_rank(self, weight_decay: float) -> Formula:
        """Formula of the squared loss: between the margins, where outputs stay, the two differ by a constant."""
        return shrunk_rays(np.sqrt(self.weights)[:, None] * self.targets, weight_decay)


@dataclass(frozen=True)
class LogisticLoss(Loss):
    """``sum_i w_i log(1 + exp(-y_i f_i))``, targets -1 or +1; a target in between is a soft label."""

    name: ClassVar[str] = "logistic"
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})
    target_kind: ClassVar[str] = "signs"
    models_probabilities: ClassVar[bool] = True
    torch_name: ClassVar[str] = "BCEWithLogitsLoss"
    curvature: ClassVar[float] = 0.25
    target_slope: ClassVar[float | None] = 0.5

    @classmethod
    def takes_outputs(cls, n_outputs: int) -> bool:
        return n_outputs == 1

    def value(self, outputs: Float) -> float:
        # log(1 + e^f) - p f with p = (1 + y) / 2, in the form that never overflows
        xp = namespace(outputs)
        size = xp.abs(outputs)
        losses = xp.log1p(xp.exp(-size)) + 0.5 * (size - self.targets * outputs)
        return float(self.weights @ xp.sum(losses, axis=1)) + self.constant

    def negative_gradient(self, outputs: Float) -> Float:
        p, (above, below) = 0.5 * (1 + self.targets), _sigmoids(outputs)
        return self.weights[:, None] * (p * below - (1 - p) * above)

    def dual_value(self, dual: Float) -> float:
        p, q = 0.5 * (1 + self.targets), dual / self.weights[:, None]
        if namespace(dual).any((p - q < -_ROUNDING) | (p - q > 1 + _ROUNDING)):
            return -np.inf
        terms = _entropy_downwards(p, q) + _entropy_downwards(1 - p, -q)
        return _sum_downwards(self.weights[:, None] * terms) + self.constant

    def _root(self, outputs: Float) -> Float:
        residual = self.negative_gradient(outputs) / self.weights[:, None]
        p = np.clip(0.5 * (1 + self.targets) - residual, 0, 1)
        return _diagonals(np.sqrt(p * (1 - p)))

    def full_rank(self, weight_decay: float) -> Formula:
        """One neuron for the rows that lean to +1, one for the rows that lean to -1."""
        return two_sides(self.weights, self.targets[:, 0], functools.partial(self._amplitudes, weight_decay))

    def _amplitudes(self, weight_decay: float, weights: Float, y: Float) -> Float:
        """Minimise ``sum w (log(1 + e^f) - p f) + beta ||sqrt(w) f||`` over ``f >= 0``, ``p = (1 + y) / 2 > 1/2``.

        Hard labels: ``f = log(||sqrt(w)|| / beta - 1)``. Soft ones: ``p - sigmoid(f) = lambda f`` with
        ``lambda ||sqrt(w) f|| = beta``, both monotone, by nested bisection.
        """
        p = 0.5 * (1 + y)
        if weight_decay >= np.linalg.norm(np.sqrt(weights) * (p - 0.5)):
            return np.zeros_like(p)
        if np.all(p == 1):
            return np.full_like(p, np.log(np.sqrt(weights.sum()) / weight_decay - 1))
        return with_norm(weights, lambda ratio: _stationary(p, ratio), weight_decay)


@dataclass(frozen=True)
class CrossEntropyLoss(Loss):
    """``sum_i w_i (log sum_k exp(f_ik) - <y_i, f_i>)``, targets one-hot or any rows of the simplex."""

    name: ClassVar[str] = "cross_entropy"
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})
    target_kind: ClassVar[str] = "probabilities"
    binary_name: ClassVar[str] = "logistic"
    models_probabilities: ClassVar[bool] = True
    torch_name: ClassVar[str] = "CrossEntropyLoss"
    curvature: ClassVar[float] = 0.5
    target_slope: ClassVar[float | None] = 1.0

    def value(self, outputs: Float) -> float:
        below, _, rest, _ = _shifted(outputs)
        return self._value(below, rest)

    def negative_gradient(self, outputs: Float) -> Float:
        return self.value_and_dual(outputs)[1]

    def value_and_dual(self, outputs: Float) -> tuple[float, Float]:
        # y (1 - p) - (1 - y) p, where 1 - p of the largest is the sum of the others: no digits are lost
        below, exponentials, rest, peak = _shifted(outputs)
        total = rest + 1
        others = namespace(outputs).where(peak, rest, total - exponentials)
        dual = self.targets * others - (1 - self.targets) * exponentials
        return self._value(below, rest), dual * (self.weights[:, None] / total)

    def _value(self, below: Float, rest: Float) -> float:
        losses = _row_sums(self.targets * below) + namespace(below).log1p(rest[:, 0])
        return float(self.weights @ losses) + self.constant

    def dual_value(self, dual: Float) -> float:
        q = dual / self.weights[:, None]
        p, xp = self.targets - q, namespace(dual)
        if xp.any(p < -_ROUNDING) or xp.any(xp.abs(xp.sum(p, axis=1) - 1) > _ROUNDING * p.shape[1]):
            return -np.inf
        return _sum_downwards(self.weights[:, None] * _entropy_downwards(self.targets, q)) + self.constant

    def total_curvature(self, outputs: Float, dual: Float) -> Float:
        p = np.clip(self.targets - dual / self.weights[:, None], 0, 1)
        weighted = self.weights[:, None] * p
        return np.diag(weighted.sum(axis=0)) - weighted.T @ p

    def _root(self, outputs: Float) -> Float:
        """``(I - p 1') diag(p)^(1/2)``, since ``diag(p) - p p' = (I - p 1') diag(p) (I - 1 p')``."""
        residual = self.negative_gradient(outputs) / self.weights[:, None]
        p = np.clip(self.targets - residual, 0, 1)
        root = np.sqrt(p)
        return root[:, None, :] * np.eye(p.shape[1]) - p[:, :, None] * root[:, None, :]

    def full_rank(self, weight_decay: float) -> Formula:
        """One logit row ``amplitude (e_k - 1/K)`` per class; ``1 - p_own = tau`` at the optimum."""
        K, labels = self.targets.shape[1], self.targets.argmax(axis=1)
        if not np.array_equal(self.targets, np.eye(K)[labels]):
            raise NoFormulaError("no formula: rows with equal features have different classes, so labels are soft.")
        totals = np.bincount(labels, self.weights, K)
        hidden = np.sqrt(self.weights / totals[labels])[:, None] * self.targets
        with np.errstate(divide="ignore"):
            tau = weight_decay / np.sqrt(totals) * np.sqrt((K - 1) / K)
        live = tau < (K - 1) / K
        safe = np.where(live, tau, (K - 1) / K)  # amplitude 0
        amplitude = np.where(live, np.log((K - 1) * (1 - safe) / safe), 0.0)
        return hidden, (np.sqrt(totals) * amplitude)[:, None] * (np.eye(K) - 1 / K)


#: Makes a loss from the targets and weights of rows.
LossKind: TypeAlias = Callable[[Float, Float], Loss]

#: Losses by their public names.
LOSSES: dict[str, type[Loss]] = {
    loss.name: loss for loss in (SquaredLoss, HuberLoss, SquaredHingeLoss, LogisticLoss, CrossEntropyLoss)
}


def losses_for(task: str | None = None) -> list[str]:
    """Names of the losses for ``"classification"`` or ``"regression"``, or of all.

    Examples
    --------
    >>> losses_for("regression")
    ['squared', 'huber']
    """
    return [name for name, loss in LOSSES.items() if task is None or task in loss.tasks]


def loss_table() -> str:
    """Markdown table of the losses: name, tasks, value, name in torch, and whether there is a formula."""
    lines = ["| `loss=` | for | value | torch | formula at rank n - 1 |", "|---|---|---|---|---|"]
    for name, loss in LOSSES.items():
        value = (loss.__doc__ or "").partition("\n")[0].rstrip(".").replace("``", "`").replace("|", "\\|")
        torch_name = f"`{loss.torch_name}`" if loss.torch_name else ""
        formula = "yes" if loss.full_rank is not Loss.full_rank else ""
        lines.append(f"| `{name}` | {', '.join(sorted(loss.tasks))} | {value} | {torch_name} | {formula} |")
    return "\n".join(lines) + "\n"


def class_loss(name: str, n_outputs: int) -> type[Loss]:
    """Class of the loss of a public name, for labels with so many outputs.

    Examples
    --------
    >>> class_loss("cross_entropy", 1).name, class_loss("cross_entropy", 3).name
    ('logistic', 'cross_entropy')
    """
    loss = LOSSES[name]
    return LOSSES[loss.binary_name] if n_outputs == 1 and loss.binary_name else loss


def loss_kind(name: str, *, huber_delta: float = 1.0) -> LossKind:
    """Constructor of the loss of a public name, with the ``delta`` of ``"huber"``.

    Examples
    --------
    >>> loss_kind("huber", huber_delta=0.5)(np.zeros((1, 1)), np.ones(1)).value(np.ones((1, 1)))
    0.375
    """
    return functools.partial(HuberLoss, delta=huber_delta) if name == "huber" else LOSSES[name]


def softmax(outputs: Float) -> Float:
    """Rows ``exp(f) / sum exp(f)``, without overflow."""
    exponentials = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def _sum_downwards(terms: Float, sizes: Float | None = None) -> float:
    """Sum of terms minus what rounding may have added (numpy sums pairwise in blocks of 128).

    ``sizes`` bound what was added and subtracted in each term, if that may exceed the term.
    """
    xp = namespace(terms)
    slack = EPS * (32 + math.log2(max(math.prod(terms.shape), 1)))
    return float(xp.sum(terms) - slack * xp.sum(xp.abs(terms) if sizes is None else sizes))


def _entropy_downwards(y: Float, q: Float) -> Float:
    """``-p log p`` at ``p = y - q``, 0 at 0, minus what rounding in ``p`` may add.

    Hard labels keep full relative accuracy up to the rounding of ``q``: ``p`` is ``-q``, or its logarithm is
    ``log1p(-q)``. Soft labels lose an absolute epsilon in the difference.
    """
    p, xp = y - q, namespace(q)
    live = p > 0
    logarithm = xp.where(y == 1, xp.log1p(-xp.where(live, q, 0.0)), xp.log(xp.where(live, p, 1.0)))
    doubt = xp.where(y == 0, 0.0, xp.where(y == 1, xp.abs(q), 1.0)) * EPS
    floored = xp.where(logarithm < math.log(EPS), math.log(EPS), logarithm)
    return xp.where(live, -p * logarithm, 0.0) - doubt * (2 - floored)


def _sigmoids(outputs: Float) -> tuple[Float, Float]:
    """``1 / (1 + exp(-f))`` and ``1 / (1 + exp(f))`` to full relative accuracy, without overflow."""
    xp = namespace(outputs)
    small = xp.exp(-xp.abs(outputs))
    up, total = outputs >= 0, 1 + small
    return xp.where(up, 1.0, small) / total, xp.where(up, small, 1.0) / total


def _shifted(outputs: Float) -> tuple[Float, Float, Float, Bool]:
    """``max f - f``, ``exp(f - max f)``, the sum of the latter without one of the largest, and a mask of the largest.

    Reductions go over the rows of contiguous transposes: over columns they are ten times as slow for few classes.
    """
    xp = namespace(outputs)
    below = xp.max(xp.asarray(outputs.T, copy=True), axis=0)[:, None] - outputs
    exponentials, peak = xp.exp(-below), below == 0
    rest = _row_sums(xp.where(peak, 0.0, exponentials)) + (_row_sums(xp.where(peak, 1.0, 0.0)) - 1)
    return below, exponentials, rest[:, None], peak


def _row_sums(array: Float) -> Float:
    """Sums over the columns, by a product."""
    xp = namespace(array)
    return array @ xp.ones(array.shape[1], dtype=array.dtype, device=device(array))


def _diagonals(entries: Float) -> Float:
    """Diagonal matrices (n, K, K) of rows (n, K)."""
    return entries[:, :, None] * np.eye(entries.shape[1])


def _stationary(p: Float, ratio: float) -> Float:
    """Root of ``p - sigmoid(f) = ratio f`` in ``f >= 0`` for every ``p``, by bisection."""
    low, high = np.zeros_like(p), np.full_like(p, 0.5 / ratio)
    for _ in range(200):
        middle = 0.5 * (low + high)
        positive = p - 0.5 * (1 + np.tanh(0.5 * middle)) > ratio * middle
        low, high = np.where(positive, middle, low), np.where(positive, high, middle)
    return 0.5 * (low + high)
