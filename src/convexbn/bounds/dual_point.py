"""Choose the dual point instead of scaling the residual: squared loss, one output.

A lower bound of the program comes from any ``v`` with a valid bound ``B(v)`` of ``max |v'(A u)_+|``:

    max over 0 <= t <= beta / B(v) of D(t v),   D(v) = <v, y> - ||v||^2 / 2.

The scaled residual takes ``v = y - f``, whose true maximum is about beta but whose bound is not. Here this value is
maximised over ``v`` and the multipliers of both relaxations together. At fixed signs of ``v`` the relaxation (module
``relaxation``) is jointly convex in the weighted multipliers and ``v``, so that the local ascent by L-BFGS in
``v_i = sign_i z_i^2`` has one conic program as its aim. Whatever it ends at is checked by the rigorous bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convexbn._types import Float
from convexbn.bounds.bound import Bound
from convexbn.bounds.relaxation import Relaxed, bound_at, minimise, relaxation, smoothed
from convexbn.data.scaling import unit_scale

#: Smoothing of the trust-region problems and of the larger of the two signs, relative, from coarse to fine.
_SMOOTHING = (1e-2, 1e-3, 1e-4)
_SATURATED = 2.0


@dataclass(frozen=True)
class DualPoint(Bound):
    """A dual point and the bound that makes it feasible: ``value`` is at least ``max |dual'(A u)_+|``.

    Attributes
    ----------
    dual : ndarray (n, 1)
        ``dual * min(1, beta / value)`` is feasible.
    """

    dual: Float


def dual_point(
    targets: Float, V: Float, A: Float, weight_decay: float, *, steps: int = 400, deadline: float | None = None
) -> DualPoint:
    """Dual point for ``1/2 ||F - y||^2``, started from the residual, with the better of both scaled values.

    Parameters
    ----------
    targets : ndarray (n, 1)
        ``y`` (weighted data: times ``sqrt(w)``).
    V : ndarray (n, 1)
        The residual, or any dual point to start from.
    A : ndarray (n, q)
        Orthonormal columns.
    weight_decay : float
        beta.
    steps : int
        L-BFGS steps in all.
    deadline : float, optional
        ``time.monotonic()`` at which to stop.

    Returns
    -------
    DualPoint
        Scaled by ``beta / value`` already when its bound exceeds beta, or when its dual value gains by a larger scale.
    """
    scale = unit_scale(targets)
    y, beta = targets[:, 0] / scale, weight_decay / scale
    first = relaxation(V / scale, A, steps=steps // 3, deadline=deadline)
    best = rescaled(V[:, 0] / scale, first, y, beta)
    ascent = _Ascent(y, A, beta, best.dual[:, 0])
    point = ascent.start(first)
    work = first.work
    for eps in _SMOOTHING:
        found = minimise(ascent.objective, ascent.loosened(point), (eps,), max(steps // len(_SMOOTHING), 1), deadline)
        point, work = found.x, work + 2 * int(found.nfev)
        candidate = ascent.check(point)
        if dual_value(candidate.dual[:, 0], y) > dual_value(best.dual[:, 0], y):
            best = candidate
    return DualPoint(best.value * scale, best.rounding * scale, work, best.dual * scale)


def dual_value(v: Float, y: Float) -> float:
    """``D(v) = <v, y> - ||v||^2 / 2``."""
    return float(v @ y - 0.5 * v @ v)


def rescaled(v: Float, bound: Bound, y: Float, beta: float) -> DualPoint:
    """The multiple of ``v`` of largest dual value among those that the bound makes feasible."""
    free = max(float(v @ y), 0.0) / max(float(v @ v), 1e-300)
    t = min(free, beta / bound.value) if bound.value > 0 else free
    return DualPoint(t * bound.value, t * bound.rounding, bound.work, t * v[:, None])


class _Ascent:
    """Scaled dual value as a function of ``(z, multipliers of +v, multipliers of -v)``, ``v = sign z^2``."""

    def __init__(self, y: Float, A: Float, beta: float, v: Float) -> None:
        self.y, self.A, self.beta = y, A, beta
        self.signs = np.where(v >= 0, 1.0, -1.0)
        self.unit = float(np.linalg.norm(v)) or 1.0
        self.size = np.abs(v) / self.unit

    def start(self, relaxed: Relaxed) -> Float:
        """The residual and its own multipliers; zero entries are moved off the stationary point z = 0."""
        z = np.sqrt(self.size + 1e-6)
        return np.concatenate([z, *(x.ravel() for x in relaxed.multipliers)])

    def loosened(self, point: Float) -> Float:
        """Multipliers brought back where their substitution is not flat: saturated ones would never move again."""
        n = len(self.y)
        return np.concatenate([point[:n], np.clip(point[n:], -_SATURATED, _SATURATED)])

    def objective(self, point: Float, eps: float) -> tuple[float, Float]:
        """Minus the scaled dual value by smoothed bounds, in units of ``||y||^2``, and its gradient."""
        z, plus, minus = self._parts(point)
        v = self.signs * z**2
        values, slopes, inner = zip(
            *(smoothed(sign * v, self.A, x, eps) for sign, x in ((1, plus), (-1, minus))), strict=True
        )
        larger, shares = _soft_maximum(np.array(values), eps)
        t = self.beta / larger
        along, square = float(v @ self.y), float(v @ v)
        free = along / square
        by_t = along - t * square
        if t > free:  # the bound does not bind
            t, by_t = free, 0.0
        unit = float(self.y @ self.y)
        by_bound = -by_t * t / larger
        by_size = by_bound * (shares[0] * slopes[0] + shares[1] * slopes[1])
        by_v = t * self.y - t**2 * v
        gradient = np.concatenate(
            [
                2 * z * (by_size + self.signs * by_v),
                *(by_bound * s * g.ravel() for s, g in zip(shares, inner, strict=True)),
            ]
        )
        return -(t * along - 0.5 * t**2 * square) / unit, -gradient / unit

    def check(self, point: Float) -> DualPoint:
        """The dual point with its rigorous bound."""
        z, plus, minus = self._parts(point)
        v = self.unit * self.signs * z**2
        sides = [bound_at(v, self.A, plus), bound_at(-v, self.A, minus)]
        bound = Bound(max(side for side, _ in sides), max(slack for _, slack in sides), 2)
        return rescaled(v, bound, self.y, self.beta)

    def _parts(self, point: Float) -> tuple[Float, Float, Float]:
        n = len(self.y)
        return point[:n], point[n : 3 * n].reshape(n, 2), point[3 * n :].reshape(n, 2)


def _soft_maximum(values: Float, eps: float) -> tuple[float, Float]:
    """``||values_+||_k`` with ``k`` about ``1 / eps``, homogeneous like the bounds, and its gradient."""
    k = min(0.1 / eps, 1e3)
    top = float(values.max())
    ratios = np.maximum(values, 0) / top
    total = float((ratios**k).sum())
    return top * total ** (1 / k), total ** (1 / k - 1) * ratios ** (k - 1)
