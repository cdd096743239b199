"""Lower estimates of ``max over ||u|| <= 1 of ||V'(A u)_+||``: local maxima from many starts, all at once.

At fixed output direction ``c`` and ``v = V c`` the function ``v'(A u)_+`` is a difference of convex functions. Two
ascents are used, both on all starts at a time:

* the sign-pattern fixed point ``u <- A'D(u) v``, fast and not monotone, to find promising regions;
* the convex-concave step, monotone: linearise the terms with ``v_i > 0`` at ``u`` and maximise the concave rest,
  ``max over ||u|| <= 1 of p'u - sum w_i (a_i'u)_+ = min over 0 <= s <= w of ||p - A's||``, ``w = v_-``.

The box least-squares problem has Hessian ``A A'``, a projector, so that projected gradients need step length one.
"""

from __future__ import annotations

import numpy as np

from convexbn._types import Float
from convexbn.data.scaling import unit_scale

_FIXED_POINT_STEPS = 4
_SAME_DIRECTION = 1 - 1e-4

#: Steps without a rise after which a direction is left.
_RESTS = 4

#: How far around initial directions there are starts, as tangents of the angle.
_SPREADS = (0.1, 0.4)

#: Directions that are followed to the end and returned; on small data, of ``n q`` entries, more are followed.
_FOLLOWED = 30
_FOLLOWED_ENTRIES = 1 << 18

#: Entries of the hidden layer that are formed at a time.
_HIDDEN_ENTRIES = 1 << 23


def local_maxima(
    V: Float,
    A: Float,
    n_starts: int,
    rng: np.random.Generator,
    *,
    start: Float | None = None,
    rounds: int = 30,
) -> tuple[Float, Float]:
    """Distinct local maxima, best first: values (m,) and unit vectors (m, q), ``m <= 30``.

    The directions of ``start`` and the random ones are thinned apart from each other: near an optimum the neurons all
    have the largest value, and would leave no place for a start that leads elsewhere.

    Parameters
    ----------
    V : ndarray (n, K)
    A : ndarray (n, q)
        Orthonormal columns; or groups of rows (n, G, q).
    n_starts : int
        Number of random starts.
    rng : numpy.random.Generator
    start : ndarray (m, q), optional
        Directions to ascend from, and from around them, besides the random ones: the neurons of the moment.
    rounds : int
        Largest number of convex-concave steps.
    """
    scale = unit_scale(V)
    V = V / scale
    raw = normalise(rng.standard_normal((n_starts, A.shape[-1])))
    outputs = normalise(rng.standard_normal((n_starts, V.shape[1])))
    moved = _fixed_point(raw, outputs, V, A)
    keep = max(_FOLLOWED, _FOLLOWED_ENTRIES // A.size)
    # the fixed point takes many starts to few places: some are followed from where they are
    followed = [distinct(moved, hidden_norms(moved, V, A), keep), raw[:keep]]
    if start is not None and len(start):
        known = normalise(start)
        followed.append(distinct(known, hidden_norms(known, V, A), keep))
        followed += [scattered(known[:n_starts], n_starts // 2, spread, rng) for spread in _SPREADS]
    directions = ascend(np.vstack(followed), V, A, rounds)
    directions = distinct(directions, hidden_norms(directions, V, A), _FOLLOWED)
    return hidden_norms(directions, V, A) * scale, directions


def hidden_norms(directions: Float, V: Float, A: Float) -> Float:
    """``||V'(A u)_+||`` of every row ``u``."""
    size = max(1, _HIDDEN_ENTRIES * A.shape[-1] // A.size)
    parts = (directions[start : start + size] for start in range(0, max(len(directions), 1), size))
    return np.concatenate([np.linalg.norm(hidden_units(part, A) @ V, axis=1) for part in parts])


def hidden_units(directions: Float, A: Float) -> Float:
    """``(A u)_+`` of every row ``u`` (m, q): (m, n); for groups of rows (n, G, q) the largest of each."""
    response = np.tensordot(directions, A, (1, -1))
    return np.maximum(response if A.ndim == 2 else response.max(axis=2), 0)


def linear_parts(directions: Float, weights: Float, A: Float) -> Float:
    """``sum_i weights_i D_i(u) a_i`` of every row ``u``, the gradient at fixed signs (and maxima): (m, q)."""
    response = np.tensordot(directions, A, (1, -1))
    if A.ndim == 2:
        return np.where(response > 0, weights, 0.0) @ A
    places = response.argmax(axis=2)
    weights = np.where(np.take_along_axis(response, places[..., None], axis=2)[..., 0] > 0, weights, 0.0)
    chosen = A[np.arange(len(A)), places]  # (m, n, q)
    return np.einsum("mn,mnq->mq", weights, chosen)


def normalise(rows: Float) -> Float:
    """Rows divided by their norms; zero rows become the first unit vector."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    first = np.zeros(rows.shape[-1])
    first[0] = 1.0
    return np.where(norms > 0, rows / np.where(norms > 0, norms, 1.0), first)


def scattered(directions: Float, count: int, spread: float, rng: np.random.Generator) -> Float:
    """At least ``count`` unit vectors, as many around each direction, at angles of tangent about ``spread``."""
    m, q = directions.shape
    if m == 0:
        return directions
    copies = np.repeat(normalise(directions), -(-count // m), axis=0)
    return normalise(copies + spread / np.sqrt(q) * rng.standard_normal(copies.shape))


def distinct(directions: Float, values: Float, keep: int) -> Float:
    """At most ``keep`` directions with pairwise angles above about 0.8 degrees, best first."""
    ordered = directions[np.argsort(-values, kind="stable")]
    chosen: list[int] = []
    for i, row in enumerate(ordered):
        if len(chosen) == keep:
            break
        if not chosen or (ordered[chosen] @ row).max() < _SAME_DIRECTION:
            chosen.append(i)
    return ordered[chosen]


def ascend(directions: Float, V: Float, A: Float, rounds: int) -> Float:
    """Convex-concave ascent from every row, with a step onto the face of kinks that each iterate lies on.

    On groups of rows only the steps of the fixed point are taken, as far as they rise.
    """
    if A.ndim == 3:
        return _risen(directions, V, A, rounds)
    directions, values = directions.copy(), hidden_norms(directions, V, A)
    subgradients = np.zeros((len(directions), len(A)))
    rising, rests = np.arange(len(directions)), np.zeros(len(directions), dtype=int)
    for _ in range(rounds):
        at = directions[rising]
        hidden = np.maximum(at @ A.T, 0)
        weights = normalise(hidden @ V) @ V.T
        linear = np.where((hidden > 0) & (weights > 0), weights, 0.0) @ A
        moved, subgradients = concave_maximiser(linear, np.maximum(-weights, 0), subgradients, A)
        candidates = np.stack([moved, _onto_kinks(moved, weights, subgradients, A), at])
        heights = np.stack([*(hidden_norms(steps, V, A) for steps in candidates[:2]), values[rising]])
        best, places = heights.argmax(axis=0), np.arange(len(rising))
        directions[rising] = candidates[best, places]
        rose = heights[best, places] > values[rising] * (1 + 1e-13)
        values[rising] = heights[best, places]
        rests = np.where(rose, 0, rests + 1)  # the dual variables of a step that failed begin the next one
        kept = rests < _RESTS
        rising, subgradients, rests = rising[kept], subgradients[kept], rests[kept]
        if len(rising) == 0:
            break
    return directions


def _fixed_point(directions: Float, outputs: Float, V: Float, A: Float) -> Float:
    """Some steps of ``u <- A'D(u) V c, c <- V'(A u)_+``, rows normalised; the first with the given outputs."""
    for _ in range(_FIXED_POINT_STEPS):
        directions = normalise(linear_parts(directions, outputs @ V.T, A))
        outputs = normalise(hidden_units(directions, A) @ V)
    return directions


def _risen(directions: Float, V: Float, A: Float, rounds: int) -> Float:
    """Steps of the fixed point from every row, half as long each time that one would fall."""
    values, length = hidden_norms(directions, V, A), np.ones((len(directions), 1))
    for _ in range(rounds):
        outputs = normalise(hidden_units(directions, A) @ V)
        ahead = normalise(linear_parts(directions, outputs @ V.T, A))
        moved = normalise(directions + length * (ahead - directions))
        heights = hidden_norms(moved, V, A)
        rose = heights > values
        directions, values = np.where(rose[:, None], moved, directions), np.where(rose, heights, values)
        length = np.where(rose[:, None], length, 0.5 * length)
    return directions


def concave_maximiser(linear: Float, upper: Float, start: Float, A: Float, steps: int = 40) -> tuple[Float, Float]:
    """Maximise ``p'u - sum w_i (a_i'u)_+`` over the sphere by accelerated projected gradients on its dual.

    Parameters
    ----------
    linear : ndarray (m, q)
        ``p``, one row a problem.
    upper : ndarray (m, n) or (n,)
        ``w >= 0``.
    start : ndarray (m, n)
        Dual variables to start from.
    A : ndarray (n, q)
        ``||A|| <= 1``.
    steps : int

    Returns
    -------
    u : ndarray (m, q)
        Unit vectors along ``p - A's``.
    s : ndarray (m, n)
        Dual variables, ``0 <= s <= w``: ``||p - A's||`` is at least the maximum.
    """
    point = previous = np.minimum(start, upper)
    for k in range(steps):
        following = np.clip(point + (linear - point @ A) @ A.T, 0, upper)
        point = following + (k / (k + 3)) * (following - previous)
        previous = following
    return normalise(linear - previous @ A), previous


def _onto_kinks(directions: Float, weights: Float, subgradients: Float, A: Float) -> Float:
    """Maximise on the face ``a_i'u = 0`` of the rows whose subgradient lies strictly inside its interval.

    With the rows at rest on their kinks known, the maximiser is the projection of the gradient of all others.
    """
    upper = np.maximum(-weights, 0)
    inside = (subgradients > 1e-6 * upper) & (subgradients < (1 - 1e-6) * upper)
    inside &= np.abs(directions @ A.T) < 1e-3 * np.linalg.norm(A, axis=1)
    gradients = np.where((directions @ A.T > 0) & ~inside, weights, 0.0) @ A
    for k in np.flatnonzero(inside.any(axis=1)):
        gradients[k] -= _along(A[inside[k]], gradients[k])
    return normalise(gradients)


def _along(face: Float, vector: Float) -> Float:
    """Component of ``vector`` in the span of the rows of ``face``."""
    _, values, right = np.linalg.svd(face, full_matrices=False)
    basis = right[values > 1e-10 * values[0]]
    return basis.T @ (basis @ vector)
