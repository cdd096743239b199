"""Bound of ``max over ||u|| <= 1 of ||V'(A u)_+||`` by the doubly nonnegative relaxation (module ``lifted_set``).

The multipliers come from alternating directions between the spectraplex and the entrywise constraints: with the
scaled multiplier L and penalty rho,

    W = spectraplex(B'(Z - L + C / rho) B),   Z = entrywise(B W B' + L),   L = L + B W B' - Z,

and ``N = -rho L`` gives a valid bound at any iteration. W has low rank in practice, so that an iteration is
a partial eigendecomposition of order n + q and products of order ``n^2 q``.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from convexbn._types import EPS, Float, is_over, share_of
from convexbn.bounds.bound import Bound
from convexbn.bounds.lifted_set import Blocks, LiftedSet, completed
from convexbn.data.scaling import unit_scale

CHECK_EVERY = 25  # iterations between two bounds
WORTHWHILE = 1e-3  # share of the distance to the target that two checks have to gain
PENALTY, RELAXATION = 10.0, 1.8  # for an objective of unit norm and unit trace; over-relaxation


def lifted(V: Float, A: Float, *, iterations: int = 300, deadline: float | None = None, target: float = 0.0) -> Bound:
    """Bound ``max over ||u|| <= 1 of ||V'(A u)_+||`` by the doubly nonnegative relaxation.

    ``work`` counts eigendecompositions. Memory: about ten matrices of order ``2 n``.

    Parameters
    ----------
    V : ndarray (n, K)
    A : ndarray (n, q)
        Orthonormal columns, or orthogonal ones of at most unit norm.
    iterations : int
        Alternating steps (for each sign when ``K = 1``).
    deadline : float, optional
    target : float
        Stop as soon as the bound is at most this.
    """
    A = completed(A)
    V = np.vstack([V, np.zeros((len(A) - len(V), V.shape[1]))])
    scale = unit_scale(V)
    unit = scale * (float(np.linalg.norm(V / scale)) or 1.0)
    relaxed = LiftedSet(A, homogenised=V.shape[1] == 1)
    if V.shape[1] == 1:
        sides = []
        for sign, share in ((1.0, 0.5), (-1.0, 1.0)):
            side = relaxed.weights(sign * V[:, 0] / unit)
            sides.append(_alternate(relaxed, side, iterations, share_of(deadline, share), target / unit))
        best = max(sides, key=lambda side: side.value)
        return Bound(best.value * unit, best.rounding * unit, sum(side.work for side in sides))
    gram = Blocks((V / unit) @ (V / unit).T, *np.zeros((2, len(A), len(A))))
    square = _alternate(relaxed, gram, iterations, deadline, (target / unit) ** 2)
    value = float(np.sqrt(square.value)) * (1 + 4 * EPS)
    return Bound(value * unit, square.rounding / max(value, EPS) * unit, square.work)


def _alternate(relaxed: LiftedSet, objective: Blocks, iterations: int, deadline: float | None, target: float) -> Bound:
    """Best bound of ``<C, Z>`` over the multipliers of alternating directions."""
    multiplier = Z = Blocks.zeros(relaxed.size)
    drift = relaxed.adjoint(objective) / PENALTY
    best, work = relaxed.bound(objective, multiplier), 1
    checked = [best[0]]
    for k in range(1, iterations + 1):
        factor = _spectraplex(relaxed.adjoint(Z.plus(multiplier, -1.0)) + drift)
        shifted = relaxed.lift(factor).times(RELAXATION).plus(Z, 1 - RELAXATION).plus(multiplier)
        Z = relaxed.nearest(shifted)
        multiplier, work = shifted.plus(Z, -1.0), work + 1
        late = is_over(deadline)
        if k % CHECK_EVERY == 0 or k == iterations or late:
            best, work = min(best, relaxed.bound(objective, multiplier.times(-PENALTY))), work + 1
            if late or best[0] <= target or settled(checked, best[0], target):
                break
    return Bound(*best, work)


def settled(checked: list[float], value: float, target: float) -> bool:
    """Note a value; whether the last two checks together brought it hardly nearer to the target.

    Parameters
    ----------
    checked : list of float
        The values noted so far.
    value, target : float
    """
    checked.append(value)
    return len(checked) > 3 and checked[-3] - value < WORTHWHILE * (value - target)


def _spectraplex(matrix: Float) -> Float:
    """Factor F of the nearest positive semidefinite matrix ``F F'`` of unit trace: few eigenvectors are needed."""
    size = len(matrix)
    for few in (min(32, size), size):
        try:
            values, basis = scipy.linalg.eigh(matrix, subset_by_index=[size - few, size - 1], check_finite=False)
        except scipy.linalg.LinAlgError:  # LAPACK's subset driver gave up
            values, basis = np.linalg.eigh(matrix)
        descending = values[::-1]
        excess = (np.cumsum(descending) - 1) / np.arange(1, len(values) + 1)
        level = excess[np.flatnonzero(descending > excess)[-1]]
        if level >= values[0]:
            break
    kept = values > level
    return basis[:, kept] * np.sqrt(values[kept] - level)
