"""Loss at the best output bias, for networks whose last layer has one.

    L_b(F) = min over b in R^K   L(F + 1 b') + decay / 2 ||b||^2

is convex in ``F`` like every loss. Its negative gradient is that of ``L`` at the best bias, and its dual value is
``D(V) - ||1'V||^2 / (2 decay)``; without decay the dual needs ``1'V = 0`` (mathematics, section 2f).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import numpy as np
import scipy.optimize

from convexbn._types import EPS, Float, Index
from convexbn.program.gauss_newton import Derivative, sum_of_squares
from convexbn.program.losses import Loss, SquaredLoss
from convexbn.program.rays import Formula, NoFormulaError

#: Newton's method stops long before, unless no bias is best: a class without rows drives its bias to infinity.
_MOST_STEPS = 60
#: Relative size below which eigenvalues of the second derivative in the bias are 0: the softmax ignores a common bias.
_FLAT = 1e-12
#: Relative decrease of a loss that its rounded values tell.
_TOLD = 1e-12
#: Relative sum of a dual point that counts as zero where a formula does not move the bias.
_BALANCED = 1e-12


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

    inner: Loss = field(kw_only=True)
    decay: float = field(kw_only=True)

    @classmethod
    def with_decay(cls, inner: Loss, decay: float) -> WithOutputBias:
        """Loss with a bias of this decay."""
        return cls(inner.targets, inner.weights, inner=inner, decay=decay)

    @property
    def without_bias(self) -> Loss:
        """``L``."""
        return self.inner

    @property
    def bias_decay(self) -> float:
        """Weight decay of the bias."""
        return self.decay

    @functools.cached_property
    def output_scale(self) -> float:
        """That of the targets about their mean."""
        if "regression" not in self.inner.tasks:
            return 1.0
        mean = self.weights @ self.targets / self.weights.sum()
        return replace(self.inner, targets=self.targets - mean).output_scale

    def value(self, outputs: Float) -> float:
        """``L_b(F)``."""
        return self.value_at(outputs, self.best_bias(outputs))

    def value_at(self, outputs: Float, bias: Float | float) -> float:
        """Value with a bias (K,), and its weight decay."""
        return self.inner.value(outputs + bias) + 0.5 * self.decay * float(np.square(bias).sum())

    def negative_gradient(self, outputs: Float) -> Float:
        """``-grad L(F + 1 b')`` at the best bias; its sum over the rows is ``decay b`` up to rounding."""
        return self.dual_at(outputs, self.best_bias(outputs))

    def dual_at(self, outputs: Float, bias: Float) -> Float:
        """Negative gradient at the best bias, which is known."""
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

    def hessian_root(self, outputs: Float) -> Float:
        """``R`` of the inner loss at the best bias; ``gauss_newton`` takes the part of the bias away."""
        return self.inner.hessian_root(outputs + self.best_bias(outputs))

    def gauss_newton(self, outputs: Float, derivative: Derivative, size: int) -> Float:
        """``J' L'' J`` of the loss at the best bias, after its ``K`` variables are eliminated (Schur complement)."""
        return eliminated(self.hessian_root(outputs), derivative, size, self.decay)

    def full_rank(self, weight_decay: float) -> Formula:
        """Formula of the loss at the best bias: the value of a formula is convex in the bias."""

        def with_bias(bias: Float) -> tuple[Formula, float, Float]:
            shifted = self.inner.shifted(bias)
            hidden, output = shifted.full_rank(weight_decay)
            outputs = hidden @ output / np.sqrt(self.weights)[:, None]
            value = shifted.value(outputs) + weight_decay * float(np.linalg.norm(output, axis=1).sum())
            value += 0.5 * self.decay * float(bias @ bias)
            return (hidden, output), value, self.decay * bias - shifted.negative_gradient(outputs).sum(axis=0)

        start = self.best_bias(np.zeros_like(self.targets))
        try:
            self.inner.shifted(start)
        except NoFormulaError:
            return self._balanced_formula(weight_decay)
        if len(start) == 1:
            unit = float(np.ptp(self.targets)) or 1.0
            low, high = (float(end) for end in (self.targets.min() - unit, self.targets.max() + unit))
            root = scipy.optimize.brentq(lambda b: with_bias(np.array([b]))[2][0], low, high, xtol=EPS * unit)
            bias = np.atleast_1d(root)
        else:
            unit = self.weights.sum()
            bias = scipy.optimize.minimize(
                lambda b: tuple(part / unit for part in with_bias(b)[1:]), start, jac=True, method="BFGS",
                options={"gtol": 1e-13},
            ).x  # fmt: skip
        return with_bias(bias)[0]

    def _balanced_formula(self, weight_decay: float) -> Formula:
        """Formula without a bias, if no bias improves on it: classes of equal weight."""
        hidden, output = self.inner.full_rank(weight_decay)
        dual = self.inner.negative_gradient(hidden @ output / np.sqrt(self.weights)[:, None])
        if np.abs(dual.sum(axis=0)).max() > _BALANCED * np.abs(dual).sum():
            name = type(self.inner).__name__
            raise NoFormulaError(f"no formula: {name} has one with an intercept for classes of equal weight only.")
        return hidden, output

    def best_bias(self, outputs: Float, near: Float | None = None) -> Float:
        """Minimiser ``b`` (K,), by Newton's method with halved steps; exact for the squared loss."""
        if isinstance(self.inner, SquaredLoss):
            return self.weights @ (self.targets - outputs) / (self.weights.sum() + self.decay)
        starts = [np.zeros(outputs.shape[1]), self._alone] if near is None else [near]
        return self._newton(outputs, *starts)

    @functools.cached_property
    def _alone(self) -> Float:
        """Best bias of outputs of zero, where the search for others may begin."""
        outputs = np.zeros_like(self.targets)
        return np.nan_to_num(self._newton(outputs, outputs[0]))

    def _newton(self, outputs: Float, *starts: Float) -> Float:
        """Newton's method from the best of some biases (K,)."""
        bias = min(starts, key=lambda start: self.value_at(outputs, start)) if len(starts) > 1 else starts[0]
        (value, dual), last = self._value_and_dual_at(outputs, bias), np.inf
        for _ in range(_MOST_STEPS):
            slope = dual.sum(axis=0) - self.decay * bias
            hessian = self.inner.total_curvature(outputs + bias, dual) + self.decay * np.eye(len(bias))
            step = np.linalg.pinv(hessian, rcond=_FLAT, hermitian=True) @ slope  # without a common bias of the softmax
            if (straight := hessian.diagonal() == 0).any():
                ahead = np.diag(slope / self.weights.sum())[straight]
                step = np.sum([self._far(outputs, bias, one) for one in ahead], axis=0)
            told = slope @ step > _TOLD * abs(value)  # else the slope alone tells, and steps shrink down to rounding
            following, dual = self._value_and_dual_at(outputs, bias + step)
            while told and following > value:
                step = 0.5 * step
                following, dual = self._value_and_dual_at(outputs, bias + step)
            bias, value, size = bias + step, following, np.abs(step).max()
            if size <= 4 * EPS * (self.output_scale + np.abs(bias).max()) or not (told or size < 0.5 * last):
                break
            last = size
        return bias

    def _value_and_dual_at(self, outputs: Float, bias: Float) -> tuple[float, Float]:
        """Value with a bias (K,) and its weight decay, and the negative gradient of the loss there."""
        value, dual = self.inner.value_and_dual(outputs + bias)
        return value + 0.5 * self.decay * float(bias @ bias), dual

    def _far(self, outputs: Float, bias: Float, step: Float) -> Float:
        """Step in one output, where the loss is linear, doubled for as long as that lowers the value."""
        while self.value_at(outputs, bias + 2 * step) < self.value_at(outputs, bias + step):
            step = 2 * step
        return step


def eliminated(
    root: Float, derivative: Derivative, size: int, decay: float, by_bias: Float | None = None, rows_per_case: int = 1
) -> Float:
    """``J' L'' J`` of a loss at its best bias: the Schur complement of the ``K`` variables of the bias.

    Parameters
    ----------
    root : ndarray (n, K, K)
        ``R`` of the loss with a bias that is held, see ``Loss.hessian_root``.
    derivative, size : Derivative, int
        As in ``Loss.gauss_newton``.
    decay : float
        Weight decay of the bias.
    by_bias, rows_per_case : ndarray (n, K', K), int
        Share of every row in the ``R`` of its case, by default ``root`` itself, and the rows of a case.
    """
    shares = root if by_bias is None else by_bias
    K = shares.shape[1]

    def with_bias(half: Float, part: slice) -> Float:
        turned = shares[part].transpose(0, 2, 1)
        return np.concatenate([derivative(half, part).reshape(*turned.shape[:2], size), turned], axis=2)

    total = sum_of_squares(root, with_bias, size + K, rows_per_case)
    coupling, bias = total[:size, size:], total[size:, size:] + decay * np.eye(K)
    taken: Float = coupling @ np.linalg.pinv(bias, rcond=_FLAT, hermitian=True) @ coupling.T
    return total[:size, :size] - taken
