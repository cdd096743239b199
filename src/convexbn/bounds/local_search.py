"""Lower estimates of ``max over ||u|| <= 1 of ||V'(A u)_+||``: local maxima from many starts, all at once.

At fixed output direction ``c`` and ``v = V c`` the function ``v'(A u)_+`` is a difference of convex functions. Two
ascents are used, both on all starts at a time:

* the sign-pattern fixed point ``u <- A'D(u) v``, fast and not monotone, to find promising regions;
* the convex-concave step, monotone: linearise the terms with ``v_i > 0`` at ``u`` and maximise the concave rest,
  ``max over ||u|| <= 1 of p'u - sum w_i (a_i'u)_+ = min over 0 <= s <= w of ||p - A's||``, ``w = v_-``.

The box least-squares problem has Hessian ``A A'``, a projector, so that projected gradients need step length one.
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import scipy.linalg

from convexbn._types import Float, is_over
from convexbn.data.blocks import BlockSize
from convexbn.data.scaling import unit_scale

_FIXED_POINT_STEPS, _CONCAVE_STEPS = 4, 40
_SAME_DIRECTION = 1 - 1e-4  # cosine
_RESTS = 4  # steps without a rise after which a direction is given up
_SPREADS = 0.1, 0.4  # distances of further starts around the initial directions, as tangents of the angle
_FOLLOWED, _FOLLOWED_ENTRIES = 30, 1 << 18  # directions followed and returned; more are followed if n q is small
_HIDDEN_ENTRIES = 1 << 23  # of the hidden layer in memory at a time


def local_maxima(
    V: Float, A: Float, n_starts: int, rng: np.random.Generator, *, start: Float | None = None, rounds: int = 30,
    deadline: float | None = None,
) -> tuple[Float, Float]:  # fmt: skip
    """Distinct local maxima, best first: values (m,) and unit vectors (m, q), ``m <= 30``.

    ``start`` and the random directions are thinned separately: near an optimum the neurons all have the largest value,
    and would leave no place for a start that leads elsewhere.

    Parameters
    ----------
    V : ndarray (n, K)
    A : ndarray (n, q)
        Orthonormal columns; or groups of rows (n, G, q).
    n_starts, rng : int, numpy.random.Generator
        Number and source of random starts.
    start : ndarray (m, q), optional
        Further directions to ascend from, and from around them: the present neurons.
    rounds : int
        Largest number of convex-concave steps.
    deadline : float, optional
        ``now()`` after which nothing climbs further.
    """
    scale = unit_scale(V)
    V = V / scale
    raw = normalise(rng.standard_normal((n_starts, A.shape[-1])))
    moved, outputs = raw, normalise(rng.standard_normal((n_starts, V.shape[1])))
    for _ in range(_FIXED_POINT_STEPS):
        if is_over(deadline):
            break
        moved = normalise(linear_parts(moved, outputs @ V.T, A))
        outputs = normalise(hidden_units(moved, A) @ V)
    keep = max(_FOLLOWED, _FOLLOWED_ENTRIES // A.size)
    # the fixed point takes many starts to few places: follow some from where they are
    followed = [distinct(moved, hidden_norms(moved, V, A), keep), raw[:keep]]
    if start is not None and len(start):
        known = normalise(start)
        followed.append(distinct(known, hidden_norms(known, V, A), keep))
        followed += [scattered(known[:n_starts], n_starts // 2, spread, rng) for spread in _SPREADS]
    directions = ascend(np.vstack(followed), V, A, rounds, deadline)
    directions = distinct(directions, hidden_norms(directions, V, A), _FOLLOWED)
    return hidden_norms(directions, V, A) * scale, directions


def hidden_norms(directions: Float, V: Float, A: Float) -> Float:
    """Values (m,) of ``||V'(A u)_+||``, one for every row ``u``.

    Parameters
    ----------
    directions, V, A : ndarray (m, q), (n, K), (n, q) or (n, G, q)
    """
    parts = BlockSize(A.size // A.shape[-1], _HIDDEN_ENTRIES).slices(max(len(directions), 1))
    return np.concatenate([np.linalg.norm(hidden_units(directions[part], A) @ V, axis=1) for part in parts])


def hidden_units(directions: Float, A: Float) -> Float:
    """Hidden units ``(A u)_+`` (m, n), one row for every row ``u``; of groups of rows (n, G, q) the largest of each."""
    response = np.tensordot(directions, A, (1, -1))
    return np.maximum(response if A.ndim == 2 else response.max(axis=2), 0)


def linear_parts(directions: Float, weights: Float, A: Float) -> Float:
    """Gradients ``sum_i weights_i D_i(u) a_i`` (m, q) at fixed signs (and maxima), one for every row ``u``.

    Parameters
    ----------
    directions, weights, A : ndarray (m, q), (m, n), (n, q) or (n, G, q)
    """
    response = np.tensordot(directions, A, (1, -1))
    if A.ndim == 2:
        return np.where(response > 0, weights, 0.0) @ A
    places = response.argmax(axis=2)
    weights = np.where(np.take_along_axis(response, places[..., None], axis=2)[..., 0] > 0, weights, 0.0)
    return np.einsum("mn,mnq->mq", weights, A[np.arange(len(A)), places])


def normalise(rows: Float) -> Float:
    """Divide rows by their norms; zero rows become the first unit vector."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.where(norms > 0, rows / np.where(norms > 0, norms, 1.0), np.eye(1, rows.shape[-1])[0])


def scattered(directions: Float, count: int, spread: float, rng: np.random.Generator) -> Float:
    """Scatter at least ``count`` unit vectors, equally many around each direction.

    Parameters
    ----------
    directions, count : ndarray (m, q), int
    spread : float
        Tangent of their angle to the direction, about.
    rng : numpy.random.Generator
    """
    m, q = directions.shape
    if m == 0:
        return directions
    copies = np.repeat(normalise(directions), -(-count // m), axis=0)
    return normalise(copies + spread / np.sqrt(q) * rng.standard_normal(copies.shape))


def distinct(directions: Float, values: Float, keep: int) -> Float:
    """Select at most ``keep`` directions with pairwise angles above about 0.8 degrees, best first.

    Parameters
    ----------
    directions, values, keep : ndarray (m, q), ndarray (m,), int
    """
    ordered = directions[np.argsort(-values, kind="stable")]
    chosen: list[int] = []
    for i, row in enumerate(ordered):
        if len(chosen) == keep:
            break
        if not chosen or (ordered[chosen] @ row).max() < _SAME_DIRECTION:
            chosen.append(i)
    return ordered[chosen]


def ascend(directions: Float, V: Float, A: Float, rounds: int, deadline: float | None = None) -> Float:
    """Ascend by convex-concave steps from every row, with a step onto the face of kinks that each iterate lies on.

    On groups of rows the steps are those of the fixed point, as far as they rise.

    Parameters
    ----------
    directions, V, A : ndarray (m, q), (n, K), (n, q) or (n, G, q)
    rounds : int
    deadline : float, optional
    """
    if A.ndim == 3:
        return _risen(directions, V, A, rounds, deadline)
    directions, values = directions.copy(), hidden_norms(directions, V, A)
    subgradients = np.zeros((len(directions), len(A)))
    rising, rests = np.arange(len(directions)), np.zeros(len(directions), dtype=int)
    for _ in range(rounds):
        if not len(rising) or is_over(deadline):
            break
        at = directions[rising]
        hidden = np.maximum(at @ A.T, 0)
        weights = normalise(hidden @ V) @ V.T
        linear = np.where((hidden > 0) & (weights > 0), weights, 0.0) @ A
        moved, subgradients = concave_maximiser(linear, np.maximum(-weights, 0), subgradients, A, deadline)
        candidates = np.stack([moved, _onto_kinks(moved, weights, subgradients, A), at])
        heights = np.stack([*(hidden_norms(steps, V, A) for steps in candidates[:2]), values[rising]])
        best, places = heights.argmax(axis=0), np.arange(len(rising))
        directions[rising] = candidates[best, places]
        rose = heights[best, places] > values[rising] * (1 + 1e-13)
        values[rising] = heights[best, places]
        rests = np.where(rose, 0, rests + 1)  # the dual variables of a step that failed begin the next one
        kept = rests < _RESTS
        rising, subgradients, rests = rising[kept], subgradients[kept], rests[kept]
    return directions


def _risen(directions: Float, V: Float, A: Float, rounds: int, deadline: float | None) -> Float:
    """Steps of the fixed point from every row, halved each time that the value would fall."""
    values, length = hidden_norms(directions, V, A), np.ones((len(directions), 1))
    for _ in range(rounds):
        if is_over(deadline):
            break
        outputs = normalise(hidden_units(directions, A) @ V)
        ahead = normalise(linear_parts(directions, outputs @ V.T, A))
        moved = normalise(directions + length * (ahead - directions))
        heights = hidden_norms(moved, V, A)
        rose = heights > values
        directions, values = np.where(rose[:, None], moved, directions), np.where(rose, heights, values)
        length = np.where(rose[:, None], length, 0.5 * length)
    return directions


def concave_maximiser(
    linear: Float, upper: Float, start: Float, A: Float, deadline: float | None = None
) -> tuple[Float, Float]:
    """Maximise ``p'u - sum w_i (a_i'u)_+`` over the sphere by accelerated projected gradients on its dual.

    Parameters
    ----------
    linear, upper, start : ndarray (m, q), (m, n) or (n,), (m, n)
        ``p``, ``w >= 0`` and a first ``s``, one row a problem.
    A : ndarray (n, q)
        ``||A|| <= 1``.
    deadline : float, optional

    Returns
    -------
    u, s : ndarray (m, q), (m, n)
        Unit vectors along ``p - A's``, and dual variables ``0 <= s <= w``: ``||p - A's||`` is at least the maximum.
    """
    point = previous = np.minimum(start, upper)
    for k in range(_CONCAVE_STEPS):
        if is_over(deadline):
            break
        following = np.clip(point + (linear - point @ A) @ A.T, 0, upper)
        point = following + (k / (k + 3)) * (following - previous)
        previous = following
    return normalise(linear - previous @ A), previous


def _onto_kinks(directions: Float, weights: Float, subgradients: Float, A: Float) -> Float:
    """Maximise on the face ``a_i'u = 0`` of the rows whose subgradient lies strictly inside its interval.

    With these rows known, the maximiser is the projection of the gradient of all others.
    """
    upper = np.maximum(-weights, 0)
    inside = (subgradients > 1e-6 * upper) & (subgradients < (1 - 1e-6) * upper)
    inside &= np.abs(directions @ A.T) < 1e-3 * np.linalg.norm(A, axis=1)
    gradients = np.where((directions @ A.T > 0) & ~inside, weights, 0.0) @ A
    for k in np.flatnonzero(inside.any(axis=1)):
        gradients[k] -= _projected(A[inside[k]], gradients[k])
    return normalise(gradients)


def _projected(rows: Float, vector: Float) -> Float:
    """Projection onto the span of rows; by a Cholesky factor of their Gram matrix, in a tenth of the time of an SVD."""
    with suppress(scipy.linalg.LinAlgError):
        factor = scipy.linalg.cho_factor(rows @ rows.T, check_finite=False)
        return rows.T @ scipy.linalg.cho_solve(factor, rows @ vector, check_finite=False)
    _, values, right = np.linalg.svd(rows, full_matrices=False)
    basis = right[values > 1e-10 * values[0]]
    return basis.T @ (basis @ vector)
