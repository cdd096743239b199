"""Convex quadratic programs over a box, or over the nonnegative orthant, with a matrix of any rank.

    min  1/2 x'Qx - b'x    over 0 <= x <= upper

With a good guess of the active bounds, the primal-dual active set method (Hintermueller, Ito and Kunisch 2003) ends
after a few factorisations of the free part. Where it does not settle, Mehrotra's predictor and corrector (1992) takes
over, with one factorisation of ``Q`` plus a positive diagonal an iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg
from scipy.linalg.lapack import dpotrf, dpotrs

from convexbn._types import Bool, Float, is_over

_SIGNS = np.array([[1.0], [-1.0]])


def minimise_over_box(Q: Float, b: Float, upper: Float, start: Float, deadline: float | None = None) -> Float:
    """Minimiser ``x``.

    Parameters
    ----------
    Q : ndarray (p, p)
        Positive semidefinite.
    b, upper : ndarray (p,)
    start : ndarray (p,)
        A guess.
    deadline : float, optional
        ``time.monotonic()`` after which the current point is returned.
    """
    if (exact := _active_set(Q, b, upper, start)) is not None:
        return exact
    x = np.clip(start, 0.05 * upper, 0.95 * upper)
    gradient = Q @ x - b
    margin = 0.1 * np.abs(gradient).mean() + 1e-300
    inside = _InteriorPoint(x, np.array([x, upper - x]), np.maximum([gradient, -gradient], 0) + margin)
    inner = _interior_point(Q, b, inside, deadline).x
    exact = None if is_over(deadline) else _active_set(Q, b, upper, inner)
    return inner if exact is None else exact


def minimise_nonnegative(Q: Float, b: Float, start: Float) -> Float:
    """Minimiser ``x >= 0``, exactly zero where the multiplier is larger; ``LinAlgError`` if ``Q`` is indefinite.

    Parameters
    ----------
    Q : ndarray (p, p)
        Positive semidefinite: singular as soon as more gates are active than there are rows.
    b : ndarray (p,)
    start : ndarray (p,)
        Nonnegative, and not zero.
    """
    x, slope = np.maximum(start, 0.1 * start.mean()), np.abs(Q @ start - b)
    inside = _InteriorPoint(x, x[None], np.maximum(slope, 0.1 * slope.mean())[None] + np.finfo(float).tiny)
    state = _interior_point(Q, b, inside, None, tol=1e-14)
    if state.broken:
        raise scipy.linalg.LinAlgError("the matrix of the quadratic program is not positive semidefinite.")
    curvature = np.trace(Q) / len(b)
    return np.where(state.x * curvature > state.multipliers[0], state.x, 0.0)


def _active_set(Q: Float, b: Float, upper: Float, x: Float) -> Float | None:
    """Alternate solves for the free variables with updates of the active bounds; None if that does not settle."""
    scale = np.maximum(Q.diagonal(), 1e-300)
    held: tuple[Bool, Bool] | None = None
    for _ in range(12):
        wished = x - (Q @ x - b) / scale
        below, above = wished <= 0, wished >= upper
        if held is not None and np.array_equal(below, held[0]) and np.array_equal(above, held[1]):
            return x
        held = below, above
        free = np.flatnonzero(~below & ~above)
        x = np.where(above, upper, 0.0)
        try:
            factor = scipy.linalg.cho_factor(Q[np.ix_(free, free)], lower=True, overwrite_a=True, check_finite=False)
        except scipy.linalg.LinAlgError:
            return None
        x[free] = scipy.linalg.cho_solve(factor, b[free] - Q[free] @ x, check_finite=False)
    return None


@dataclass(frozen=True)
class _InteriorPoint:
    """A point, its distances to the bounds, and their multipliers: (k, p), with ``k = 1`` without upper bounds."""

    x: Float
    slacks: Float
    multipliers: Float
    broken: bool = False

    @property
    def signs(self) -> Float:
        """Derivative of the distances in the point: (k, 1)."""
        return _SIGNS[: len(self.slacks)]

    @property
    def complementarity(self) -> float:
        return float(np.vdot(self.slacks, self.multipliers))

    def longest(self, dx: Float, change: Float) -> float:
        """Largest step length, at most 1, that keeps everything positive."""
        distances = (-self.signs * dx / self.slacks).max()
        return float(1 / max(1.0, distances, (-change / self.multipliers).max()))

    def moved(self, length: float, dx: Float, change: Float) -> _InteriorPoint:
        slacks = self.slacks + length * self.signs * dx
        return _InteriorPoint(self.x + length * dx, slacks, self.multipliers + length * change)


@np.errstate(over="ignore", divide="ignore", invalid="ignore")
def _interior_point(
    Q: Float, b: Float, state: _InteriorPoint, deadline: float | None, tol: float = 1e-13
) -> _InteriorPoint:
    """Minimiser to a complementarity of ``tol`` relative to the terms of the value; ``broken`` if rounding ends it."""
    for _ in range(60):
        curved = Q @ state.x
        if is_over(deadline) or state.complementarity <= tol * (state.x @ (np.abs(curved) + np.abs(b))):
            break
        if (following := _advance(state, Q, curved - b)) is None:
            return replace(state, broken=True)
        state = following
    return state


def _advance(state: _InteriorPoint, Q: Float, gradient: Float) -> _InteriorPoint | None:
    """One predictor-corrector step; None if rounding prevents it."""
    slacks, multipliers, signs = state.slacks, state.multipliers, state.signs
    barrier = multipliers / slacks
    if (solve := _factorised(Q, barrier.sum(axis=0))) is None:
        return None
    dx = solve(-gradient)  # predictor, without a barrier
    change = -multipliers - barrier * (signs * dx)
    mean = state.complementarity / slacks.size
    ahead = state.moved(state.longest(dx, change), dx, change).complementarity / slacks.size
    centring = (mean * min(max(ahead / mean, 0.0), 1.0) ** 3 - signs * dx * change) / slacks
    dx = solve((signs * centring).sum(axis=0) - gradient)
    change = centring - multipliers - barrier * (signs * dx)
    if not np.isfinite(change).all():
        return None
    following = state.moved(0.995 * state.longest(dx, change), dx, change)
    return following if following.slacks.min() > 0 else None


def _factorised(Q: Float, diagonal: Float) -> Callable[[Float], Float] | None:
    """Solver for ``Q + diag(diagonal)`` by plain LAPACK: scipy's checks take longer than some dozens of variables."""
    system = np.array(Q, order="F")
    system.ravel("K")[:: len(system) + 1] += diagonal
    factor, info = dpotrf(system, lower=1, clean=0, overwrite_a=1)
    return None if info else lambda right: dpotrs(factor, right, lower=1)[0]
