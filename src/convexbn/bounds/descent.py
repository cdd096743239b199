"""SciPy's L-BFGS with a deadline that every evaluation keeps, and an end where it hardly descends any more."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.optimize

from convexbn._types import Float, is_over

_PATIENCE = 20  # iterations that together have to be worthwhile


class _LateError(Exception):
    """The deadline passed between two evaluations."""


def minimise(
    objective: Callable[[Float], tuple[float, Float]], start: Float, *, max_iter: int, deadline: float | None = None,
    worthwhile: float = 0.0, ftol: float = 1e-10,
) -> tuple[Float, int]:  # fmt: skip
    """Minimise by L-BFGS; returns the point and the number of evaluations.

    Parameters
    ----------
    objective, start : callable, ndarray
        Value and gradient at a point, and the first point.
    max_iter : int
        Largest number of iterations.
    deadline : float, optional
        ``now()`` after which the best point so far is returned.
    worthwhile, ftol : float
        Relative decrease of the value that 20 iterations and a single one have to reach, else the descent ends.
    """
    best, values, evaluations = (np.inf, start), [], 0

    def watched(x: Float) -> tuple[float, Float]:
        nonlocal best, evaluations
        if is_over(deadline):
            raise _LateError
        value, gradient = objective(x)
        evaluations += 1
        if deadline is not None and value < best[0]:
            best = value, x.copy()
        return value, gradient

    def settle(intermediate_result: scipy.optimize.OptimizeResult) -> None:
        values.append(float(intermediate_result.fun))
        if len(values) > _PATIENCE and values[-1 - _PATIENCE] - values[-1] < worthwhile * abs(values[-1]):
            raise StopIteration

    options = {"maxiter": max_iter, "maxcor": 20, "ftol": ftol, "gtol": 1e-9}
    try:
        found = scipy.optimize.minimize(watched, start, jac=True, method="L-BFGS-B", options=options, callback=settle)
    except _LateError:
        return best[1], evaluations
    return found.x, evaluations
