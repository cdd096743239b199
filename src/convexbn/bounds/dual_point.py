"""Choose the dual point instead of scaling the residual: squared loss, one output.

A lower bound of the program comes from any ``v`` with a valid bound ``B(v)`` of ``max |v'(A u)_+|``:

    max over 0 <= t <= beta / B(v) of D(t v),   D(v) = <v, y> - ||v||^2 / 2.

The scaled residual takes ``v = y - f``, whose true maximum is about beta but whose bound is not. Here this value is
maximised over ``v`` and the multipliers of both relaxations together. At fixed signs of ``v`` the relaxation (module
``relaxation``) is jointly convex in the weighted multipliers and ``v``, so that the local ascent by L-BFGS in
``v_i = sign_i z_i^2`` solves one conic program. The rigorous bound checks whatever it ends at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convexbn._types import Float, share_of
from convexbn.bounds.bound import Bound
from convexbn.bounds.relaxation import Relaxed, bound_at, relaxation, smoothed, stages
from convexbn.data.scaling import unit_scale

_CONSTANT = 100.0  # penalty on a dual point along the constant, which is taken out in the end
_STEPS = 400  # of L-BFGS in all
_FIRST_SHARE = 1 / 3  # of the time, for the relaxation that the ascent begins with
_SATURATED = 2.0  # largest multiplier that a stage starts from; beyond, the substitution is flat and it would not move


@dataclass(frozen=True)
class DualPoint(Bound):
    """Dual point (n, 1) and its bound ``max |dual'(A u)_+| <= value``: ``dual * min(1, beta / value)`` is feasible."""

    dual: Float


def dual_point(
    targets: Float, V: Float, A: Float, weight_decay: float, *, deadline: float | None = None,
    first: Relaxed | None = None, constant: Float | None = None,
) -> DualPoint:  # fmt: skip
    """Dual point for ``1/2 ||F - y||^2``, scaled to be feasible; of no smaller dual value than the scaled residual.

    Parameters
    ----------
    targets, V : ndarray (n, 1)
        ``y`` (weighted data: times ``sqrt(w)``), and the residual, or any dual point to start from.
    A : ndarray (n, q)
        Orthonormal columns.
    weight_decay : float
    deadline : float, optional
    first : Relaxed, optional
        ``relaxation(V, A)``, if it is known.
    constant : ndarray (n,), optional
        Unit vector to which dual points are orthogonal, as ``V`` is: with an output bias that of ``sqrt(w)``.
    """
    scale = unit_scale(targets)
    y, beta, n = targets[:, 0] / scale, weight_decay / scale, len(A)
    first = relaxation(V, A, deadline=share_of(deadline, _FIRST_SHARE)) if first is None else first
    known = Bound(first.value / scale, first.rounding / scale, first.work)
    best = rescaled(V[:, 0] / scale, known, y, beta)
    constant = np.zeros(n) if constant is None else constant
    ascent, work = _Ascent(y, A, beta, best.dual[:, 0], constant), first.work
    # zero entries are moved off the stationary point z = 0
    point = np.concatenate([np.sqrt(ascent.size + 1e-6), *(x.ravel() for x in first.multipliers)])
    point[n:] = np.clip(point[n:], -_SATURATED, _SATURATED)
    for found, evaluations in stages(ascent.objective, point, _STEPS, deadline):
        work += 2 * evaluations
        best = max(best, ascent.check(found), key=lambda candidate: dual_value(candidate.dual[:, 0], y))
        np.clip(found[n:], -_SATURATED, _SATURATED, out=found[n:])  # where the next stage begins
    return DualPoint(best.value * scale, best.rounding * scale, work, best.dual * scale)


def dual_value(v: Float, y: Float) -> float:
    """``D(v) = <v, y> - ||v||^2 / 2``."""
    return float(v @ y - 0.5 * v @ v)


def rescaled(v: Float, bound: Bound, y: Float, beta: float) -> DualPoint:
    """Multiple of a dual point of largest dual value among those that its bound makes feasible.

    Parameters
    ----------
    v, y, bound, beta : ndarray (n,), ndarray (n,), Bound, float
    """
    free = max(float(v @ y), 0.0) / max(float(v @ v), 1e-300)
    t = min(free, beta / bound.value) if bound.value > 0 else free
    return DualPoint(t * bound.value, t * bound.rounding, bound.work, t * v[:, None])


class _Ascent:
    """Scaled dual value as a function of ``(z, multipliers of +v, multipliers of -v)``, ``v = sign z^2``."""

    def __init__(self, y: Float, A: Float, beta: float, v: Float, constant: Float) -> None:
        self.y, self.A, self.beta, self.constant = y, A, beta, constant
        self.signs = np.where(v >= 0, 1.0, -1.0)
        self.unit = float(np.linalg.norm(v)) or 1.0
        self.size = np.abs(v) / self.unit

    def objective(self, point: Float, eps: float) -> tuple[float, Float]:
        """Minus the scaled dual value by smoothed bounds, in units of ``||y||^2``, and its gradient."""
        z, (plus, minus) = self._parts(point)
        v = self.signs * z**2
        sides = (smoothed(sign * v, self.A, x, eps) for sign, x in ((1, plus), (-1, minus)))
        values, slopes, inner = zip(*sides, strict=True)
        larger, shares = _soft_maximum(np.array(values), eps)
        t = self.beta / larger
        shift = _CONSTANT * float(self.constant @ v)
        along, square = float(v @ self.y), float(v @ v) + shift**2 / _CONSTANT
        free = along / square
        by_t = along - t * square
        if t > free:  # the bound does not bind
            t, by_t = free, 0.0
        unit = float(self.y @ self.y)
        by_bound = -by_t * t / larger
        by_size = by_bound * (shares[0] * slopes[0] + shares[1] * slopes[1])
        by_v = t * self.y - t**2 * (v + shift * self.constant)
        by_multipliers = (by_bound * s * g.ravel() for s, g in zip(shares, inner, strict=True))
        gradient = np.concatenate([2 * z * (by_size + self.signs * by_v), *by_multipliers])
        return -(t * along - 0.5 * t**2 * square) / unit, -gradient / unit

    def check(self, point: Float) -> DualPoint:
        """Dual point with its rigorous bound."""
        z, (plus, minus) = self._parts(point)
        v = self.unit * self.signs * z**2
        v -= self.constant * (self.constant @ v)
        values, slacks = zip(bound_at(v, self.A, plus), bound_at(-v, self.A, minus), strict=True)
        return rescaled(v, Bound(max(values), max(slacks), 2), self.y, self.beta)

    def _parts(self, point: Float) -> tuple[Float, Float]:
        n = len(self.y)
        return point[:n], point[n:].reshape(2, n, 2)


def _soft_maximum(values: Float, eps: float) -> tuple[float, Float]:
    """``||values_+||_k`` with ``k`` about ``1 / eps``, homogeneous like the bounds, and its gradient."""
    k = min(0.1 / eps, 1e3)
    top = float(values.max())
    ratios = np.maximum(values, 0) / top
    total = float((ratios**k).sum())
    return top * total ** (1 / k), total ** (1 / k - 1) * ratios ** (k - 1)
