"""Losses of the training program: value, negative gradient, dual value ``D(V) = -L*(-V)`` and its domain.

Every loss is a weighted sum over rows, ``L(F) = sum_i w_i l(f_i, y_i)``, with outputs ``F`` (n, K). The dual
variable lives where the negative gradient does: ``V = -grad L(F)`` (weights included), and the
Fenchel-Young equality ``L(F) = D(V) - <V, F>`` holds there (mathematics, section 6).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from convexbn._typing import Float, FloatMatrix, Index

_EPS = float(np.finfo(np.float64).eps)

#: What a dual variable may lie outside its domain by rounding alone.
_ROUNDING = 64 * _EPS


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

    def outputs(self, hidden: FloatMatrix, output: FloatMatrix) -> FloatMatrix:
        """What the terms see of hidden units (n, m) and an output layer (m, K)."""
        return hidden @ output

    def pull_back(self, dual: FloatMatrix, hidden: FloatMatrix, output: FloatMatrix) -> tuple[FloatMatrix, FloatMatrix]:
        """``<dual, outputs(hidden, output)>`` differentiated by both."""
        return dual @ output.T, hidden.T @ dual

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
        """The same loss as a function of one output row per group of rows (for rows with equal features)."""
        weights: Float = np.bincount(groups, self.weights, n_groups).astype(np.float64)
        sums = np.zeros((n_groups, self.targets.shape[1]))
        np.add.at(sums, groups, self.weights[:, None] * self.targets)
        means = sums / weights[:, None]
        return type(self)(means, weights, self.constant + self._left_behind(means[groups]))

    def _left_behind(self, means: Float) -> float:
        """Value that does not depend on the outputs when targets are replaced by group means."""
        return 0.0


@dataclass(frozen=True)
class SquaredLoss(Loss):
    """``1/2 sum_i w_i ||f_i - y_i||^2``."""

    curvature: ClassVar[float] = 1.0

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


#: The losses by their public names.
LOSSES: dict[str, type[Loss]] = {
    "squared": SquaredLoss,
    "logistic": LogisticLoss,
    "cross_entropy": CrossEntropyLoss,
}


def softmax(outputs: Float) -> Float:
    """Rows ``exp(f) / sum exp(f)``, without overflow."""
    exponentials = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    normalised: Float = exponentials / exponentials.sum(axis=1, keepdims=True)
    return normalised


def _sum_downwards(terms: Float) -> float:
    """Sum of the terms less what rounding may have added (numpy sums pairwise in blocks of 128)."""
    slack = _EPS * (32 + np.log2(max(terms.size, 1)))
    return float(terms.sum() - slack * np.abs(terms).sum())


def _entropy_downwards(y: Float, q: Float) -> Float:
    """``-p log p`` at ``p = y - q``, 0 at 0, less what rounding in ``p`` may add.

    Hard labels keep full relative accuracy: ``p`` is ``-q`` or its logarithm is ``log1p(-q)``; what remains is the
    rounding of ``q`` itself. Soft labels lose an absolute epsilon in the difference.
    """
    p = y - q
    live = p > 0
    logarithm = np.where(y == 1, np.log1p(-np.where(live, q, 0.0)), np.log(np.where(live, p, 1.0)))
    doubt = np.where(y == 0, 0.0, np.where(y == 1, np.abs(q), 1.0)) * _EPS
    terms: Float = np.where(live, -p * logarithm, 0.0) - doubt * (2 - np.maximum(logarithm, np.log(_EPS)))
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
