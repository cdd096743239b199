"""Loss at the best output bias, for networks whose last layer has one.

    L_b(F) = min over b in R^K   L(F + 1 b') + decay / 2 ||b||^2

is convex in ``F`` like every loss. Its negative gradient is that of ``L`` at the best bias, and its dual value is
``D(V) - ||1'V||^2 / (2 decay)``; without decay the dual needs ``1'V = 0`` (mathematics, section 2f).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from convexbn._types import EPS, Float, Index
from convexbn.program.gauss_newton import Derivative, sum_of_squares
from convexbn.program.losses import Loss

#: Newton's method stops long before, unless no bias is best: a class without rows drives its bias to infinity.
_MOST_STEPS = 60
#: Relative size below which eigenvalues of the second derivative in the bias are 0: the softmax ignores a common bias.
_FLAT = 1e-12


@dataclass(frozen=True)
class WithOutputBias(Loss):
    """``min over b of L(F + 1 b') + decay / 2 ||b||^2`` for the loss ``inner``, ``L``, and a weight decay of the bias.

    Examples
    --------
    >>> from convexbn.program.losses import SquaredLoss
    >>> loss = WithOutputBias.with_decay(SquaredLoss(np.array([[1.0], [3.0]]), np.ones(2)), decay=0.0)
    >>> loss.best_bias(np.zeros((2, 1))), loss.value(np.zeros((2, 1)))
    (array([2.]), 1.0)
    """

    separable: ClassVar[bool] = False

    inner: Loss = field(kw_only=True)
    decay: float = field(kw_only=True)
    #: Last best bias, where the search for the next begins; overwritten.
    recent: Float = field(kw_only=True, repr=False)

    @classmethod
    def with_decay(cls, inner: Loss, decay: float) -> WithOutputBias:
        """Loss with a bias of this decay."""
        return cls(inner.targets, inner.weights, inner=inner, decay=decay, recent=np.zeros(inner.targets.shape[1]))

    def value(self, outputs: Float) -> float:
        """``L_b(F)``."""
        return self._value(outputs, self.best_bias(outputs))

    def negative_gradient(self, outputs: Float) -> Float:
        """``-grad L(F + 1 b')`` at the best bias; its sum over the rows is ``decay b`` up to rounding."""
        bias = self.best_bias(outputs)
        dual = self.inner.negative_gradient(outputs + bias)
        excess = dual.sum(axis=0) - self.decay * bias
        return dual - np.outer(self.weights / self.weights.sum(), excess)

    def dual_value(self, dual: Float) -> float:
        """``D(V) - ||1'V||^2 / (2 decay)``; ``-inf`` if a bias without decay could lower the loss for ever."""
        total = dual.sum(axis=0)
        if self.decay > 0:
            return self.inner.dual_value(dual) - float(total @ total) / (2 * self.decay) * (1 + 8 * EPS)
        rounding = (32 + len(dual)) * EPS * np.abs(dual).sum()
        return self.inner.dual_value(dual) if np.abs(total).max() <= rounding else -np.inf

    def of_rows(self, part: Index | slice) -> WithOutputBias:
        """Loss of some rows, with their own bias and their share of its decay; the parts sum to at most the whole."""
        inner = self.inner.of_rows(part)
        return WithOutputBias.with_decay(inner, self.decay * float(inner.weights.sum() / self.weights.sum()))

    def gauss_newton(self, outputs: Float, derivative: Derivative, size: int) -> Float:
        """``J' L'' J`` of the loss at the best bias, after its ``K`` variables are eliminated (Schur complement)."""
        root = self.inner.hessian_root(outputs + self.best_bias(outputs))

        def with_bias(half: Float, part: slice) -> Float:
            turned = half.transpose(0, 2, 1)
            return np.concatenate([derivative(half, part).reshape(*turned.shape[:2], size), turned], axis=2)

        total = sum_of_squares(root, with_bias, size + root.shape[1])
        coupling, bias = total[:size, size:], total[size:, size:] + self.decay * np.eye(root.shape[1])
        eliminated: Float = coupling @ np.linalg.pinv(bias, rcond=_FLAT, hermitian=True) @ coupling.T
        return total[:size, :size] - eliminated

    def best_bias(self, outputs: Float) -> Float:
        """Minimiser ``b`` (K,), by Newton's method with halved steps."""
        bias = min(0 * self.recent, self.recent.copy(), key=lambda start: self._value(outputs, start))
        value = self._value(outputs, bias)
        for _ in range(_MOST_STEPS):
            slope = self.inner.negative_gradient(outputs + bias).sum(axis=0) - self.decay * bias
            root = self.inner.hessian_root(outputs + bias)
            side = root.transpose(1, 0, 2).reshape(root.shape[1], -1)
            hessian = side @ side.T + self.decay * np.eye(len(side))
            step = np.linalg.pinv(hessian, hermitian=True) @ slope  # the softmax does not see a common bias
            if (straight := hessian.diagonal() == 0).any():
                ahead = np.diag(slope / self.weights.sum())[straight]
                step = np.sum([self._far(outputs, bias, one) for one in ahead], axis=0)
            # where the value no longer tells, the slope still does
            while (following := self._value(outputs, bias + step)) > value + 4 * EPS * abs(value):
                step = 0.5 * step
            bias, value = bias + step, following
            if np.abs(step).max() <= 4 * EPS * (1 + np.abs(bias).max()):
                break
        self.recent[:] = np.nan_to_num(bias)
        return bias

    def _far(self, outputs: Float, bias: Float, step: Float) -> Float:
        """Step in one output, where the loss is linear, doubled for as long as that lowers the value."""
        while self._value(outputs, bias + 2 * step) < self._value(outputs, bias + step):
            step = 2 * step
        return step

    def _value(self, outputs: Float, bias: Float) -> float:
        return self.inner.value(outputs + bias) + 0.5 * self.decay * float(bias @ bias)
