"""Convex quadratic programs over a box, or over the nonnegative orthant, with a matrix of any rank.

    min  1/2 x'Qx - b'x    over 0 <= x <= upper

From a good guess of the active bounds, the primal-dual active set method (Hintermueller, Ito and Kunisch 2003) ends
after a few factorisations of the free part. If it does not settle, or if the free part is singular, Mehrotra's
predictor and corrector (1992) takes over, with one factorisation of ``Q`` plus a positive diagonal per iteration.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.linalg.lapack import dpotrf, dpotrs

from convexbn._types import EPS, Bool, Float, is_over


def minimise_over_box(Q: Float, b: Float, upper: Float, start: Float, deadline: float | None = None) -> Float:
    """Minimiser over ``0 <= x <= upper``.

    Parameters
    ----------
    Q, b, upper, start : ndarray (p, p), (p,), (p,), (p,)
        A positive semidefinite matrix, the linear term, the bounds, and a guess.
    deadline : float, optional
        ``now()`` after which the current point is returned.
    """
    if (exact := _active_set(Q, b, upper, start)) is not None:
        return exact
    x = np.clip(start, 0.05 * upper, 0.95 * upper)
    gradient = Q @ x - b
    margin = 0.1 * np.abs(gradient).mean() + 1e-300
    inside = np.array([[x, upper - x], np.maximum([gradient, -gradient], 0) + margin])
    inner = _interior_point(Q, b, inside, deadline=deadline)[0][0, 0]
    exact = None if is_over(deadline) else _active_set(Q, b, upper, inner)
    return inner if exact is None else exact


def minimise_nonnegative(Q: Float, b: Float, start: Float) -> Float:
    """Minimiser ``x >= 0``, exactly zero where the multiplier is larger; ``LinAlgError`` if ``Q`` is indefinite.

    Parameters
    ----------
    Q : ndarray (p, p)
        Positive semidefinite: singular as soon as more gates are active than there are rows.
    b, start : ndarray (p,)
        The guess is nonnegative, and not zero.
    """
    if (exact := _active_set(Q, b, np.inf, start)) is not None:
        return exact
    x, slope = np.maximum(start, 0.1 * start.mean()), np.abs(Q @ start - b)
    inside = np.array([x, np.maximum(slope, 0.1 * slope.mean()) + np.finfo(float).tiny])
    (x, multipliers), broken = _interior_point(Q, b, inside, tol=1e-14)
    if broken:
        raise np.linalg.LinAlgError("the matrix of the quadratic program is not positive semidefinite.")
    curvature = np.trace(Q) / len(b)
    return np.where(x * curvature > multipliers, x, 0.0)


def _active_set(Q: Float, b: Float, upper: Float | float, x: Float) -> Float | None:
    """Alternate solves for the free variables with updates of the active bounds; None if that does not settle."""
    diagonal = Q.diagonal()
    scale, rounding = np.maximum(diagonal, 1e-300), len(b) * EPS * diagonal.max()
    held: Bool | None = None
    for _ in range(12):
        wished = x - (Q @ x - b) / scale
        bounds = np.array([wished <= 0, wished >= upper])
        if held is not None and (bounds == held).all():
            return np.clip(x, 0.0, upper) if np.isfinite(x).all() else None
        held, x = bounds, np.where(bounds[1], upper, 0.0)
        free = np.flatnonzero(~bounds.any(axis=0))
        if not free.size:
            continue
        factor, info = dpotrf(Q[free][:, free].T, lower=1, clean=0, overwrite_a=1)
        if info or (factor.diagonal() ** 2 <= rounding).any():  # dependent columns
            return None
        x[free] = dpotrs(factor, b[free] - Q[free] @ x, lower=1)[0]
    return None


@np.errstate(over="ignore", divide="ignore", invalid="ignore")
def _interior_point(
    Q: Float, b: Float, inside: Float, tol: float = 1e-13, deadline: float | None = None
) -> tuple[Float, bool]:
    """Distances to the bounds and their multipliers at the minimiser, and whether rounding has ended the search.

    Both are one array, which has the shape (2, p) for ``x >= 0`` and (2, 2, p) with upper bounds. It is positive, and
    ``x`` is its first row. The complementarity ends at ``tol``, relative to the terms of the value.
    """
    boxed, size, terms = inside.ndim == 3, inside.size // 2, np.abs(b)
    complementarity = float(np.vdot(*inside))
    for _ in range(60):
        (slacks, multipliers), x = inside, inside[0, 0] if boxed else inside[0]
        curved = Q @ x
        if is_over(deadline) or complementarity <= tol * (x @ (np.abs(curved) + terms)):
            break
        barrier, mean = multipliers / slacks, complementarity / size
        if (solve := _factorise(Q, barrier.sum(axis=0) if boxed else barrier)) is None:
            return inside, True
        descent = b - curved
        dx = solve(descent)  # predictor, without a barrier
        change = np.stack([dx, -dx]) if boxed else dx
        step = np.array([change, -multipliers - barrier * change])
        ahead = np.vdot(*(inside + _longest(inside, step) * step)) / size
        centring = (mean * min(max(ahead / mean, 0.0), 1.0) ** 3 - change * step[1]) / slacks
        dx = solve(descent + (centring[0] - centring[1] if boxed else centring))
        change = np.stack([dx, -dx]) if boxed else dx
        step = np.array([change, centring - multipliers - barrier * change])
        following = inside + 0.995 * _longest(inside, step) * step
        complementarity = float(np.vdot(*following))
        if not (following[0].min() > 0 and math.isfinite(complementarity)):
            return inside, True
        inside = following
    return inside, False


def _longest(inside: Float, step: Float) -> float:
    """Largest step length, at most 1, that keeps every number nonnegative."""
    return 1 / max(1.0, -float((step / inside).min()))


def _factorise(Q: Float, diagonal: Float) -> Callable[[Float], Float] | None:
    """Solver for ``Q + diag(diagonal)`` by plain LAPACK: scipy's checks take longer than some dozens of variables.

    A ridge of the size of rounding helps a singular ``Q``; None for one that is indefinite beyond it.
    """
    for ridge in (0.0, 4 * len(Q) * EPS * Q.diagonal().max()):
        system = np.array(Q, order="F")
        system.ravel("K")[:: len(system) + 1] += diagonal + ridge
        factor, info = dpotrf(system, lower=1, clean=0, overwrite_a=1)
        if not info:
            return lambda right: dpotrs(factor, right, lower=1)[0]
    return None
