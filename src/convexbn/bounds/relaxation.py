"""Quadratic relaxation of ``max over ||u|| <= 1 of v'(A u)_+``, one output: valid at any multipliers.

With ``t_i = a_i'u``, every term is bounded by a quadratic on the unit ball, where ``|t_i| <= ||a_i||``:

* ``v_i > 0``: ``t_+ <= t / 2 + alpha / 4 + t^2 / (4 alpha)`` for every ``alpha > 0``, equal at ``|t| = alpha``;
* ``v_i < 0``: ``t_+ >= s_1 t + s_2 (t / 2 + t^2 / (2 ||a_i||))`` for ``s_1, s_2 >= 0, s_1 + s_2 <= 1``.

The sum is maximised over the ball exactly (module ``trust_region``). With
``alpha = ||a_i|| exp(x_1) / 2`` and s a softmax of ``(x_1, x_2, 0)`` the multipliers are unconstrained; up to this
substitution the bound is convex in them. An evaluation costs ``O(n q^2 + q^3)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.optimize

from convexbn._types import EPS, Bool, Float, is_over
from convexbn.bounds import trust_region
from convexbn.bounds.bound import Bound
from convexbn.data.scaling import unit_scale

#: Smoothing of the trust-region problem and of the larger of two signs, relative, from coarse to fine.
SMOOTHING = (1e-2, 1e-3, 1e-4)
_EXPONENT = 40.0


@dataclass(frozen=True)
class Relaxed(Bound):
    """The bound, with the multipliers (n, 2) of ``v'(A u)_+`` and ``-v'(A u)_+``, as ``Terms`` takes them."""

    multipliers: tuple[Float, Float]


@dataclass(frozen=True)
class Terms:
    """The quadratics ``c_i + l_i t + k_i t^2`` that bound ``sign(v_i) t_+``, one a row.

    Attributes
    ----------
    positive : ndarray (n,)
        Rows with ``v_i > 0``.
    norms : ndarray (n,)
        ``||a_i||``, positive.
    multipliers : ndarray (n, 2)
        Any values: logarithm of ``2 alpha / ||a_i||`` (first column) in positive rows, logits of s in the others.
    """

    positive: Bool
    norms: Float
    multipliers: Float

    @property
    def alpha(self) -> Float:
        """``||a_i|| exp(x_1) / 2``, kept in range."""
        return 0.5 * self.norms * np.exp(np.clip(self.multipliers[:, 0], -_EXPONENT, _EXPONENT))

    @property
    def shares(self) -> Float:
        """``(s_1, s_2)`` (n, 2): softmax of ``(x_1, x_2, 0)`` without the last."""
        powers = np.exp(np.clip(self.multipliers, -_EXPONENT, _EXPONENT))
        return powers / (1 + powers.sum(axis=1, keepdims=True))

    def coefficients(self) -> tuple[Float, Float, Float]:
        """Constants, slopes and curvatures of the quadratics."""
        first, second = self.shares.T
        constant = np.where(self.positive, self.alpha / 4, 0.0)
        slope = np.where(self.positive, 0.5, -first - second / 2)
        curvature = np.where(self.positive, 0.25 / self.alpha, -second / (2 * self.norms))
        return constant, slope, curvature

    def multiplier_gradient(self, mean: Float, square: Float) -> Float:
        """Derivative (n, 2) of ``c_i + l_i mean_i + k_i square_i`` by the multipliers."""
        first, second = self.shares.T
        by_first, by_second = -mean, -mean / 2 - square / (2 * self.norms)
        average = first * by_first + second * by_second
        of_alpha = self.alpha / 4 - square / (4 * self.alpha)
        by_x1 = np.where(self.positive, of_alpha, first * (by_first - average))
        return np.column_stack([by_x1, np.where(self.positive, 0.0, second * (by_second - average))])


def relaxation(V: Float, A: Float, *, steps: int = 150, deadline: float | None = None) -> Relaxed:
    """Bound ``max over ||u|| <= 1 of |v'(A u)_+|`` by optimised multipliers; ``work`` counts eigendecompositions.

    Parameters
    ----------
    V : ndarray (n, 1)
    A : ndarray (n, q)
        Orthonormal columns.
    steps : int
        L-BFGS steps for each sign.
    deadline : float, optional
        ``time.monotonic()`` at which to stop improving the multipliers.
    """
    scale = unit_scale(V)
    signed = (V[:, 0] / scale, -V[:, 0] / scale)
    values, slacks, work, multipliers = zip(*(_optimise(v, A, steps, deadline) for v in signed), strict=True)
    return Relaxed(max(values) * scale, max(slacks) * scale, sum(work), multipliers)


def bound_at(v: Float, A: Float, multipliers: Float) -> tuple[float, float]:
    """Rigorous bound of ``v'(A u)_+`` at any multipliers, and the part of it that covers rounding.

    Parameters
    ----------
    v, A, multipliers : ndarray (n,), (n, q), (n, 2)
    """
    constant, slope, curvature = Terms(v > 0, row_norms(A), multipliers).coefficients()
    size = np.abs(v)
    offset = float(size @ constant)
    linear, Q = A.T @ (size * slope), (A.T * (size * curvature)) @ A
    magnitude = offset + float(np.linalg.norm(np.abs(A).T @ (size * np.abs(slope))))
    magnitude += float(np.trace((A.T * (size * np.abs(curvature))) @ A))
    rounding = EPS * (len(A) + 32 * A.shape[1]) * magnitude
    return max(offset + trust_region.maximum(linear, Q) + rounding, 0.0), rounding


def row_norms(A: Float) -> Float:
    """``||a_i||``, rounded upwards, positive."""
    return np.linalg.norm(A, axis=1) * (1 + 64 * EPS) + 1e-150


def smoothed(v: Float, A: Float, multipliers: Float, eps: float) -> tuple[float, Float, Float]:
    """Smoothed bound, its gradient by ``|v|`` (n,) at fixed signs, and by the multipliers (n, 2).

    Parameters
    ----------
    v, A, multipliers : ndarray (n,), (n, q), (n, 2)
    eps : float
    """
    terms = Terms(v > 0, row_norms(A), multipliers)
    constant, slope, curvature = terms.coefficients()
    size = np.abs(v)
    largest, u, U = trust_region.smoothed_maximum(A.T @ (size * slope), (A.T * (size * curvature)) @ A, eps)
    mean, square = A @ u, np.einsum("ij,ij->i", A @ U, A)
    by_size = constant + slope * mean + curvature * square
    return float(size @ constant) + largest, by_size, size[:, None] * terms.multiplier_gradient(mean, square)


def _optimise(v: Float, A: Float, steps: int, deadline: float | None) -> tuple[float, float, int, Float]:
    """Best rigorous bound of one sign, its rounding, the work and the multipliers, from stages of falling smoothing."""
    point = np.zeros((len(A), 2))  # alpha_i = ||a_i|| / 2 and equal shares
    best, work = (*bound_at(v, A, point), point), 1
    scale = float(np.linalg.norm(v)) or 1.0

    def objective(flat: Float, eps: float) -> tuple[float, Float]:
        value, _, gradient = smoothed(v / scale, A, flat.reshape(-1, 2), eps)
        return value, gradient.ravel()

    for eps in SMOOTHING:
        found = minimise(objective, point.ravel(), eps, steps, deadline)
        point, work = found.x.reshape(-1, 2), work + int(found.nfev) + 1
        best = min(best, (*bound_at(v, A, point), point), key=lambda side: side[0])
    return best[0], best[1], work, best[2]


def minimise(
    objective: Callable[..., tuple[float, Float]], start: Float, eps: float, steps: int, deadline: float | None
) -> scipy.optimize.OptimizeResult:
    """Minimise at one smoothing by L-BFGS until a deadline.

    Parameters
    ----------
    objective : callable
        ``(point, eps) -> value, gradient``.
    start, eps : ndarray, float
    steps : int
        Steps of all smoothings together.
    deadline : float or None
    """

    def watch(_: Float) -> None:
        if is_over(deadline):
            raise StopIteration

    options = {"maxiter": max(steps // len(SMOOTHING), 1), "maxcor": 20, "ftol": 1e-10, "gtol": 1e-9}
    return scipy.optimize.minimize(
        objective, start, args=(eps,), jac=True, method="L-BFGS-B", callback=watch, options=options
    )
