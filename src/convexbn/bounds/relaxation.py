"""Quadratic relaxation of ``max over ||u|| <= 1 of v'(A u)_+``, one output: valid at any multipliers.

With ``t_i = a_i'u``, every term is bounded by a quadratic on the unit ball, where ``|t_i| <= ||a_i||``:

* ``v_i > 0``: ``t_+ <= t / 2 + alpha / 4 + t^2 / (4 alpha)`` for every ``alpha > 0``, equal at ``|t| = alpha``;
* ``v_i < 0``: ``t_+ >= s_1 t + s_2 (t / 2 + t^2 / (2 ||a_i||))`` for ``s_1, s_2 >= 0, s_1 + s_2 <= 1``.

The sum is maximised over the ball exactly (module ``trust_region``). With
``alpha = ||a_i|| exp(x_1) / 2`` and s a softmax of ``(x_1, x_2, 0)`` the multipliers are unconstrained; up to this
substitution the bound is convex in them. An evaluation costs ``O(n q^2 + q^3)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from convexbn._types import EPS, Float, share_of
from convexbn.bounds import descent, trust_region
from convexbn.bounds.bound import Bound
from convexbn.data.scaling import unit_scale

SMOOTHING = (1e-2, 1e-3, 1e-4)  # relative, from coarse to fine: of the trust-region problem, of the larger sign
_EXPONENT = 40.0
_WORTHWHILE = 1e-4  # relative decrease of the bound that 20 steps have to reach: more than the smoothing leaves open


@dataclass(frozen=True)
class Relaxed(Bound):
    """The bound, with the multipliers (n, 2) of ``v'(A u)_+`` and ``-v'(A u)_+``."""

    multipliers: tuple[Float, Float]


class _Terms:
    """The quadratics ``c_i + l_i t + k_i t^2`` that bound ``sign(v_i) t_+``, one a row, at any multipliers (n, 2).

    The first multiplier of a positive row is the logarithm of ``2 alpha / ||a_i||``; those of others are logits of s.
    """

    def __init__(self, v: Float, A: Float, multipliers: Float) -> None:
        self.positive = v > 0
        self.norms = np.linalg.norm(A, axis=1) * (1 + 64 * EPS) + 1e-150  # rounded upwards, positive
        powers = np.exp(np.clip(multipliers, -_EXPONENT, _EXPONENT))
        self.alpha = 0.5 * self.norms * powers[:, 0]
        self.first, self.second = (powers / (1 + powers.sum(axis=1, keepdims=True))).T  # softmax of (x_1, x_2, 0)
        self.constant = np.where(self.positive, self.alpha / 4, 0.0)
        self.slope = np.where(self.positive, 0.5, -self.first - self.second / 2)
        self.curvature = np.where(self.positive, 0.25 / self.alpha, -self.second / (2 * self.norms))

    def multiplier_gradient(self, mean: Float, square: Float) -> Float:
        """Derivative (n, 2) of ``c_i + l_i mean_i + k_i square_i`` by the multipliers."""
        by_first, by_second = -mean, -mean / 2 - square / (2 * self.norms)
        average = self.first * by_first + self.second * by_second
        of_alpha = self.alpha / 4 - square / (4 * self.alpha)
        by_x1 = np.where(self.positive, of_alpha, self.first * (by_first - average))
        return np.column_stack([by_x1, np.where(self.positive, 0.0, self.second * (by_second - average))])


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
    """
    scale = unit_scale(V)
    signed = (V[:, 0] / scale, -V[:, 0] / scale)
    sides = (_optimise(v, A, steps, share_of(deadline, share)) for v, share in zip(signed, (0.5, 1.0), strict=True))
    values, slacks, work, multipliers = zip(*sides, strict=True)
    return Relaxed(max(values) * scale, max(slacks) * scale, sum(work), multipliers)


def bound_at(v: Float, A: Float, multipliers: Float) -> tuple[float, float]:
    """Rigorous bound of ``v'(A u)_+`` at any multipliers, and the part of it that covers rounding.

    Parameters
    ----------
    v, A, multipliers : ndarray (n,), (n, q), (n, 2)
    """
    terms, size = _Terms(v, A, multipliers), np.abs(v)
    offset = float(size @ terms.constant)
    linear, Q = A.T @ (size * terms.slope), (A.T * (size * terms.curvature)) @ A
    magnitude = offset + float(np.linalg.norm(np.abs(A).T @ (size * np.abs(terms.slope))))
    magnitude += float(np.trace((A.T * (size * np.abs(terms.curvature))) @ A))
    rounding = EPS * (len(A) + 32 * A.shape[1]) * magnitude
    return max(offset + trust_region.maximum(linear, Q) + rounding, 0.0), rounding


def smoothed(v: Float, A: Float, multipliers: Float, eps: float) -> tuple[float, Float, Float]:
    """Smoothed bound, its gradient by ``|v|`` (n,) at fixed signs, and by the multipliers (n, 2).

    Parameters
    ----------
    v, A, multipliers, eps : ndarray (n,), ndarray (n, q), ndarray (n, 2), float
    """
    terms, size = _Terms(v, A, multipliers), np.abs(v)
    linear, Q = A.T @ (size * terms.slope), (A.T * (size * terms.curvature)) @ A
    largest, u, U = trust_region.smoothed_maximum(linear, Q, eps)
    mean, square = A @ u, np.einsum("ij,ij->i", A @ U, A)
    by_size = terms.constant + terms.slope * mean + terms.curvature * square
    return float(size @ terms.constant) + largest, by_size, size[:, None] * terms.multiplier_gradient(mean, square)


def _optimise(v: Float, A: Float, steps: int, deadline: float | None) -> tuple[float, float, int, Float]:
    """Best rigorous bound of one sign, its rounding, the work and the multipliers, from stages of falling smoothing."""
    point = np.zeros((len(A), 2))  # alpha_i = ||a_i|| / 2 and equal shares
    best, work = (*bound_at(v, A, point), point), 1
    scale = float(np.linalg.norm(v)) or 1.0

    def objective(flat: Float, eps: float) -> tuple[float, Float]:
        value, _, gradient = smoothed(v / scale, A, flat.reshape(-1, 2), eps)
        return value, gradient.ravel()

    for flat, evaluations in stages(objective, point.ravel(), steps, deadline):
        point, work = flat.reshape(-1, 2), work + evaluations + 1
        best = min(best, (*bound_at(v, A, point), point), key=lambda side: side[0])
    return best[0], best[1], work, best[2]


def stages(
    objective: Callable[..., tuple[float, Float]], start: Float, steps: int, deadline: float | None
) -> Iterator[tuple[Float, int]]:
    """Minimisers at smoothings that fall, each from the one before it as it is left, and the evaluations of each.

    Parameters
    ----------
    objective : callable
        ``(point, eps) -> value, gradient``.
    start, deadline : ndarray, float or None
    steps : int
        Steps of L-BFGS of all stages together.
    """
    point = start
    for k, eps in enumerate(SMOOTHING):
        point, evaluations = descent.minimise(
            functools.partial(objective, eps=eps), point, max_iter=max(steps // len(SMOOTHING), 1),
            deadline=share_of(deadline, 1 / (len(SMOOTHING) - k)), worthwhile=_WORTHWHILE,
        )  # fmt: skip
        yield point, evaluations
