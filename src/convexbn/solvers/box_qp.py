"""Convex quadratic programs over a box, whatever the rank of the matrix.

    min  1/2 x'Qx - b'x    over 0 <= x <= upper

With a good guess of the bounds that hold, the primal-dual active set method (Hintermueller, Ito and Kunisch 2003) is
there after a few factorisations of the free part. Where it does not settle, Mehrotra's predictor and corrector
(1992) does the work, with one factorisation of ``Q`` plus a positive diagonal an iteration.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from convexbn._types import Bool, Float


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
        ``time.monotonic()`` after which the point of the moment will do.
    """
    exact = _active_set(Q, b, upper, start)
    if exact is not None:
        return exact
    inner = _interior_point(Q, b, upper, start, deadline)
    if deadline is not None and time.monotonic() >= deadline:
        return inner
    exact = _active_set(Q, b, upper, inner)
    return inner if exact is None else exact


def _active_set(Q: Float, b: Float, upper: Float, x: Float, max_iter: int = 12) -> Float | None:
    """Solve for the free variables, move those that leave the box to its faces, free those that are pulled inside."""
    scale = np.maximum(Q.diagonal(), 1e-300)
    held: tuple[Bool, Bool] | None = None
    for _ in range(max_iter):
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


@np.errstate(over="ignore", divide="ignore", invalid="ignore")
def _interior_point(
    Q: Float, b: Float, upper: Float, start: Float, deadline: float | None, tol: float = 1e-12, max_iter: int = 60
) -> Float:
    """Minimiser to a complementarity of ``tol`` relative to the value."""
    state = _Point.interior(Q, b, upper, start)
    for _ in range(max_iter):
        value = 0.5 * state.x @ (state.gradient(Q, b) - b)
        late = deadline is not None and time.monotonic() >= deadline
        if late or state.complementarity <= tol * abs(value):
            break
        following = _advance(state, Q, b, upper)
        if following is None:
            break
        state = following
    return state.x


@dataclass(frozen=True)
class _Point:
    """A point of the box, its distance ``y`` to the upper bounds, and the multipliers of both bounds."""

    x: Float
    y: Float
    lower: Float
    upper: Float

    @classmethod
    def interior(cls, Q: Float, b: Float, upper: Float, start: Float) -> _Point:
        x = np.clip(start, 0.05 * upper, 0.95 * upper)
        gradient = Q @ x - b
        margin = 0.1 * np.abs(gradient).mean() + 1e-300
        return cls(x, upper - x, np.maximum(gradient, 0) + margin, np.maximum(-gradient, 0) + margin)

    @property
    def complementarity(self) -> float:
        return float(self.x @ self.lower + self.y @ self.upper)

    def gradient(self, Q: Float, b: Float) -> Float:
        gradient: Float = Q @ self.x - b
        return gradient

    def longest(self, step: tuple[Float, Float, Float]) -> float:
        """Largest step length, at most 1, that keeps everything positive."""
        pairs = ((self.x, step[0]), (self.y, -step[0]), (self.lower, step[1]), (self.upper, step[2]))
        ratios = [np.where(change < 0, -value / change, np.inf).min(initial=1.0) for value, change in pairs]
        return float(min(ratios))

    def moved(self, length: float, step: tuple[Float, Float, Float]) -> _Point:
        dx, dlower, dupper = step
        return _Point(
            self.x + length * dx, self.y - length * dx, self.lower + length * dlower, self.upper + length * dupper
        )


def _advance(state: _Point, Q: Float, b: Float, upper: Float) -> _Point | None:
    """One predictor-corrector step; None when rounding ends it."""
    p = len(b)
    residual = state.gradient(Q, b) - state.lower + state.upper
    matrix = Q.copy()
    matrix[np.arange(p), np.arange(p)] += state.lower / state.x + state.upper / state.y
    try:
        factor = scipy.linalg.cho_factor(matrix, lower=True, overwrite_a=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        return None

    def direction(low: Float | float, high: Float | float) -> tuple[Float, Float, Float]:
        right = (low / state.x - state.lower) - (high / state.y - state.upper) - residual
        dx = scipy.linalg.cho_solve(factor, right, check_finite=False)
        dlower = (low - state.lower * dx) / state.x - state.lower
        return dx, dlower, (high + state.upper * dx) / state.y - state.upper

    mean = state.complementarity / (2 * p)
    affine = direction(0.0, 0.0)
    ahead = state.moved(state.longest(affine), affine).complementarity / (2 * p)
    target = mean * min(max(ahead / mean, 0.0), 1.0) ** 3
    step = direction(target - affine[0] * affine[1], target + affine[0] * affine[2])
    if not all(np.isfinite(part).all() for part in step):
        return None
    following = state.moved(0.995 * state.longest(step), step)
    return following if following.x.min() > 0 and following.y.min() > 0 else None
