"""Upper bounds of ``||V'(A u)_+||`` on many simplicial cones at a time.

A cone is ``{u = sum_j l_j g_j, l >= 0}`` with q unit generators ``g_j``. With ``T_ij = a_i'g_j``, on the cone

* ``(a_i'u)_+ <= sum_j l_j (T_ij)_+`` by convexity, equal when the hyperplane of row i does not cut the cone;
* ``(a_i'u)_+ >= theta_i a_i'u`` for every ``0 <= theta_i <= 1``.

One output with weights v: interpolate the terms with ``v_i > 0`` and bound the others by ``theta``. Then ``max c'l``
over ``l >= 0, ||sum l_j g_j|| <= 1`` is at most ``||r||`` for every r with ``g_j'r >= c_j``. Together, with the dual
generators ``h_j`` (``h_j'g_k = 1[j = k]``),

    bound = min over 0 <= s_i <= |v_i|, m >= 0 of || sum_j c_j h_j - sum_i s_i a_i + sum_j m_j h_j ||,

the exact maximum of the concave relaxation, and valid wherever the minimisation stops.

Several outputs: on the cone ``V'(A u)_+ = sum_j l_j f_j - sum_i e_i V_i`` with ``0 <= e_i <= sum_j l_j E_ij``. For a
unit vector ``c``, ``||F||^2 = (c'F)^2 + ||F - c c'F||^2``: the first by the bound of one output, the second, small on
a small cone, by ``max_j phi_j / (d'g_j)`` for a convex function with values at most ``phi_j`` at the generators and
any unit vector d, since the cone meets the unit ball inside the simplex ``d'u <= 1``.

Hidden units that are maxima over groups of rows (max pooling) are convex and homogeneous as well: their values at the
generators take the place of ``(T_ij)_+``. The ``a_i`` of the lower bound is the row of the group that is largest in the
middle of the cone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convexbn._types import EPS, Bool, Float, Index
from convexbn.bounds.local_search import normalise

_SNAP = 1e-14  # values a_i'g_j below this are zero: a generator placed on a hyperplane lies on it
_SWEEPS = 50
_SHORT = 0.5  # edges shorter than this part of the longest (in 1 - cos) are not split
_SHARES = 0.4, 0.6  # range of the shares at which edges are split
_EVERYWHERE = 0.05  # part of the mean coordinate added to the maximiser's, so that the whole cone counts
_LARGEST_REACH = 1e7  # of a cone that is bounded and split


@dataclass(frozen=True)
class Cones:
    """A batch of simplicial cones and the rows on them.

    Attributes
    ----------
    generators, dual : ndarray (B, q, q)
        Unit generators in rows, and dual generators ``h_j`` in rows: the inverse, transposed.
    rows, index : ndarray (B, m, q), (B, m)
        Rows that cut the cone, padded by zeros, and their places in ``A``; ``n`` is padding.
    at_generators, above : ndarray (B, q, m)
        ``T`` of those rows, transposed, and their hidden units: ``(T)_+`` transposed, or the largest of the group.
    whole : ndarray (B, q, n)
        Hidden units of all rows.
    """

    generators: Float
    dual: Float
    rows: Float
    index: Index
    at_generators: Float
    above: Float
    whole: Float

    @property
    def reach(self) -> Float:
        """``sum_j ||h_j||``, at least ``sum_j l_j`` on the unit ball."""
        return np.linalg.norm(self.dual, axis=2).sum(axis=1)

    @property
    def thin(self) -> Bool:
        """Mask of cones whose dual generators are inaccurate."""
        return ~(self.reach < _LARGEST_REACH)


def prepare(generators: Float, A: Float) -> Cones:
    """Evaluate the rows (n, q), or groups (n, G, q), at the generators and single out those that cut each cone."""
    T = np.tensordot(generators, A, (2, -1))
    T[np.abs(T) < _SNAP] = 0.0
    chosen = None if A.ndim == 2 else T.sum(axis=1).argmax(axis=2)  # members (B, n) that are largest in the middle
    whole = np.maximum(T if chosen is None else T.max(axis=-1), 0)
    T = T if chosen is None else np.take_along_axis(T, chosen[:, None, :, None], axis=3)[..., 0]
    cut = (whole.max(axis=1) > 0) & ((whole - T).max(axis=1) > _SNAP)
    width = max(int(cut.sum(axis=1).max(initial=0)), 1)
    order = np.argsort(~cut, axis=1, kind="stable")[:, :width]
    inside = np.take_along_axis(cut, order, axis=1)
    members = (order,) if chosen is None else (order, np.take_along_axis(chosen, order, axis=1))
    rows = A[members] * inside[..., None]
    dual = np.linalg.inv(generators).transpose(0, 2, 1).astype(np.float64)
    index = np.where(inside, order, len(A))
    above = np.take_along_axis(whole, order[:, None], axis=2) * inside[:, None]
    return Cones(generators, dual, rows, index, generators @ rows.transpose(0, 2, 1), above, whole)


def one_output(cones: Cones, weights: Float) -> tuple[Float, Float]:
    """Bound ``sum_i v_i (a_i'u)_+`` on every cone, each with its own weights ``v`` (B, n).

    Returns the bounds (B,), and the unit vectors (B, q) that maximise the relaxation up to the accuracy of the
    minimisation.
    """
    negative = np.maximum(-_crossing_weights(cones, weights), 0)
    # interpolate all rows, then take the negative crossing ones out again
    chords = _apply(cones.whole, weights) + _apply(cones.above, negative)
    residual, taken = _minimise(cones, chords, negative)
    norms = np.linalg.norm(residual, axis=1)
    # on thin cones the minimisation is slow, but the simplex around the cone's middle is small
    ends = (_simplex_bound(cones, chords - _apply(cones.at_generators, s)) for s in (taken, _at_first(cones, negative)))
    bound = np.minimum(norms, np.minimum(*ends)) + rounding(cones, np.abs(weights).sum(axis=1))
    return bound, normalise(residual)


def several_outputs(cones: Cones, V: Float) -> tuple[Float, Float, Float]:
    """Bound ``||V'(A u)_+||`` on every cone.

    Returns the bounds (B,), the maximisers (B, q) and the weights (B, n), ``V c`` of the output direction ``c`` at the
    middle of the cone.
    """
    chords, spread, padded = _chords(cones, V)
    outputs = normalise(chords.sum(axis=1))
    weights = outputs @ V.T
    along, maximiser = one_output(cones, weights)
    # the other sign of c'F, and the part of F across c, crudely
    errors, values = _apply(padded, outputs), _apply(chords, outputs)
    against = _simplex_bound(cones, _apply(spread, np.abs(errors)) - values)
    across = np.linalg.norm(padded - errors[..., None] * outputs[:, None], axis=2)
    beside = np.linalg.norm(chords - values[..., None] * outputs[:, None], axis=2)
    beside = _simplex_bound(cones, beside + _apply(spread, across))
    whole = _simplex_bound(cones, np.linalg.norm(chords, axis=2) + _apply(spread, np.linalg.norm(padded, axis=2)))
    bound = np.minimum(np.hypot(np.maximum(along, against), beside), whole)
    return bound + rounding(cones, np.full(len(bound), np.linalg.norm(V, axis=1).sum())), maximiser, weights


def worst_edge(cones: Cones, weights: Float, maximiser: Float) -> tuple[Index, Float]:
    """Edge (B, 2) on which interpolation costs most at the maximiser, and the share (B,) at which to split it.

    At ``u = sum_j l_j g_j`` row i loses ``v_i min(P, N)``, ``P`` and ``N`` the sums of the positive and negative
    ``l_j T_ij``; the edge (j, k) bears the part ``v_i (l_j T_ij)_+ (l_k T_ik)_- / max(P, N)``. Costs are weighted by
    the length of the edge and short edges left alone, so that cones do not become thin. The new generator, along
    ``(1 - share) g_first + share g_second``, is near the crossing of the row that costs most there, or in the middle
    if none crosses.

    Parameters
    ----------
    cones : Cones
    weights, maximiser : ndarray (B, n), (B, q)
    """
    above, below = _loss_factors(cones, weights, maximiser)
    cost = above @ below.transpose(0, 2, 1)
    lengths = 1 - cones.generators @ cones.generators.transpose(0, 2, 1)
    eligible = lengths >= _SHORT * lengths.max(axis=(1, 2), keepdims=True)
    cost = np.where(eligible, (cost + cost.transpose(0, 2, 1)) * lengths, 0.0).reshape(len(cost), -1)
    uncut = cost.max(axis=1) <= 0
    cost = np.where(uncut[:, None], lengths.reshape(cost.shape), cost)
    first, second = np.divmod(cost.argmax(axis=1), above.shape[1])
    places = np.arange(len(cost))
    row = (above[places, first] * below[places, second] + above[places, second] * below[places, first]).argmax(axis=1)
    start, end = cones.at_generators[places, first, row], cones.at_generators[places, second, row]
    uncut |= start * end >= 0  # a maximum passes from one member to another
    shares = np.where(uncut, 0.5, start / np.where(uncut, 1.0, start - end))
    return np.stack([first, second], axis=1), np.clip(shares, *_SHARES)


def _loss_factors(cones: Cones, weights: Float, maximiser: Float) -> tuple[Float, Float]:
    """Factors (B, q, m) whose product over the ends of an edge is the loss of each row on it."""
    coordinates = np.maximum(_apply(cones.dual, maximiser), 0)
    coordinates += _EVERYWHERE * coordinates.mean(axis=1, keepdims=True) + EPS
    above = cones.above * coordinates[..., None]
    below = above - cones.at_generators * coordinates[..., None]
    larger = np.maximum(above.sum(axis=1), below.sum(axis=1))
    above *= (np.abs(_crossing_weights(cones, weights)) / np.where(larger > 0, larger, 1.0))[:, None]
    return above, below


def rounding(cones: Cones, weight: Float) -> Float:
    """Largest effect of rounding on a bound: errors of ``c_j`` times the largest ``l_j``."""
    q, n = cones.whole.shape[1:]
    return (4 * _SNAP + EPS * (n + 8 * q)) * weight * cones.reach


def _apply(matrices: Float, vectors: Float) -> Float:
    """Matrix times vector for every cone."""
    return (matrices @ vectors[..., None])[..., 0]


def _crossing_weights(cones: Cones, weights: Float) -> Float:
    return np.take_along_axis(np.pad(weights, ((0, 0), (0, 1))), cones.index, axis=1)


def _minimise(cones: Cones, chords: Float, upper: Float) -> tuple[Float, Float]:
    """Minimise the bound by projected gradients in s and coordinate descent in m, in turns: its residual r, and s."""
    dual, transposed = cones.dual, cones.rows.transpose(0, 2, 1)
    squares = (dual**2).sum(axis=2)
    taken, m = _at_first(cones, upper), np.zeros_like(chords)
    residual = _apply(dual.transpose(0, 2, 1), chords) - _apply(transposed, taken)
    for _ in range(_SWEEPS):
        for j in range(dual.shape[1]):
            slope = (dual[:, j] * residual).sum(axis=1) / squares[:, j]
            move = np.maximum(-slope, -m[:, j])
            m[:, j] += move
            residual = residual + move[:, None] * dual[:, j]
        following = np.clip(taken + _apply(cones.rows, residual), 0, upper)
        residual = residual - _apply(transposed, following - taken)
        taken = following
    return residual, taken


def _at_first(cones: Cones, upper: Float) -> Float:
    """Start of s: its upper bound if the member of a group is positive on the whole cone, so nearly the unit itself."""
    return np.where(cones.at_generators.min(axis=1) >= 0, upper, 0.0)


def _chords(cones: Cones, V: Float) -> tuple[Float, Float, Float]:
    """``V'(A g_j)_+`` less half the largest errors (B, q, K); those halves (B, q, m); rows ``V_i`` of the errors.

    A row that cuts the cone is below its chord by at most ``min(P, N)``, which is at most any weighted mean of both.
    Half of it is taken off the chord, so that the error is of either sign and half as large.
    """
    padded = np.pad(V, ((0, 1), (0, 0)))[cones.index]
    above, below = cones.above, cones.above - cones.at_generators
    P, N = above.sum(axis=1, keepdims=True), below.sum(axis=1, keepdims=True)
    share = N / np.where(P + N > 0, P + N, 1.0)
    half = 0.5 * (share * above + (1 - share) * below)
    return cones.whole @ V - half @ padded, half, padded


def _simplex_bound(cones: Cones, values: Float) -> Float:
    """``max_j phi_j / (d'g_j)``, d the middle; infinite if it makes an obtuse angle with a generator."""
    cosines = _apply(cones.generators, normalise(cones.generators.sum(axis=1)))
    ratios = np.where(cosines > 0, np.maximum(values, 0) / np.where(cosines > 0, cosines, 1.0), np.inf)
    return ratios.max(axis=1)
