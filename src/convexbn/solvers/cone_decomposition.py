"""Vectors as differences of two vectors of a cone, of smallest norms: many at once, by an interior point.

    min ||p|| + ||m||   s.t.   p - m = s,   G p >= 0,   G m >= 0,       G = (2 D - I) A

With the centre ``x`` of ``p = x + s / 2`` and ``m = x - s / 2`` both cones are one polyhedron, and the objective is the
sum of the distances to two points. They lie outside of it unless ``s`` or ``-s`` is in the cone, where nothing is left
to do; so the objective is smooth:

    min ||x + s / 2|| + ||x - s / 2||   s.t.   G x >= |G s| / 2

Mehrotra's predictor and corrector with a common step, Newton's matrix ``Hessian + G' diag(multiplier / slack) G``. An
iteration of one vector is ``n q^2`` flops, and ``q^3 / 3`` for the factor.
"""

from __future__ import annotations

import numpy as np

from convexbn._types import EPS, Bool, Float
from convexbn.data.blocks import BlockSize

_ROUNDING = 1e-13  # responses of unit rows to a unit vector that count as zero
_TOL, _MAX_ITER = 1e-9, 60  # of the interior point: complementarity relative to the objective
_BLOCK_ENTRIES = 1 << 17  # slacks held at once


@np.errstate(all="ignore")
def difference_in_cones(rows: Float, opened: Bool, vectors: Float) -> tuple[Float, Float]:
    """Vectors ``p, m`` (m, q) of the cones with ``p - m = vectors`` that minimise each ``||p|| + ||m||``.

    Parameters
    ----------
    rows, vectors : ndarray (n, q), (m, q)
        Nonzero rows of ``A``, and nonzero vectors ``s``.
    opened : ndarray (m, n) of bool
        Pattern ``D`` of every cone ``{s : (2 D - I) A s >= 0}``, which must have an interior.

    Examples
    --------
    In the quadrant that two orthogonal rows open, the parts of a vector are its positive and negative entries:

    >>> p, m = difference_in_cones(np.eye(2), np.ones((1, 2), dtype=bool), np.array([[3.0, -4.0]]))
    >>> p.round(6) + 0.0, m.round(6) + 0.0
    (array([[3., 0.]]), array([[0., 4.]]))
    """
    unit = rows / np.linalg.norm(rows, axis=1)[:, None]
    lengths = np.linalg.norm(vectors, axis=1)[:, None]
    scaled = vectors / lengths
    centres = np.empty_like(scaled)
    for part in BlockSize(len(rows), _BLOCK_ENTRIES).slices(len(scaled)):
        centres[part] = _centres(unit, opened[part], scaled[part])
    return 0.5 * lengths * (centres + scaled), 0.5 * lengths * (centres - scaled)


def _centres(unit: Float, opened: Bool, vectors: Float) -> Float:
    """Centres ``x`` for unit vectors, in units of half their length."""
    signs = np.where(opened, 1.0, -1.0)
    images = signs * (vectors @ unit.T)
    inside, opposite = images.min(axis=1) >= -_ROUNDING, images.max(axis=1) <= _ROUNDING
    centres = np.where(inside, vectors.T, -vectors.T).T
    mixed: Bool = ~(inside | opposite)
    if mixed.any():
        state = _Iterate(unit, signs[mixed], vectors[mixed])
        for _ in range(_MAX_ITER):
            if not (running := ~state.converged()).any():
                break
            state.advance(running)
        centres[mixed] = state.x
    return centres


class _Iterate:
    """Points of the interior-point method, one a vector: centres, slacks and multipliers.

    ``G x`` is ``signs * (x @ unit.T)``, and ``G' y`` is ``(signs * y) @ unit``.
    """

    def __init__(self, unit: Float, signs: Float, vectors: Float) -> None:
        self.unit, self.signs, self.vectors = unit, signs, vectors
        self.needed = np.abs(vectors @ unit.T)
        self.x = np.zeros_like(vectors)
        self.slack = np.ones_like(signs) * self.needed.mean(axis=1)[:, None]
        self.multiplier = 20 / (len(unit) * self.slack)
        self._measure()

    def _measure(self) -> None:
        """Norms, gradients and residuals at the current point."""
        self.sides = np.stack([self.x + self.vectors, self.x - self.vectors])
        self.norms = np.linalg.norm(self.sides, axis=2)
        self.sides /= self.norms[:, :, None]
        self.infeasible = self.signs * (self.x @ self.unit.T) - self.needed - self.slack
        self.stationary = (self.signs * self.multiplier) @ self.unit - self.sides.sum(axis=0)

    def converged(self) -> Bool:
        """Where complementarity is small against the objective, and the inequalities hold to rounding."""
        objective = self.norms.sum(axis=0)
        complementary = np.einsum("mn,mn->m", self.slack, self.multiplier) <= _TOL * objective
        feasible = np.abs(self.infeasible).max(axis=1) <= _ROUNDING * objective
        return complementary & feasible

    def advance(self, running: Bool) -> None:
        """One predictor-corrector step of the running vectors."""
        newton = self._newton_matrices(running)
        product = self.slack * self.multiplier
        mean = product.mean(axis=1)
        _, dslack, dmultiplier = self._direction(newton, -product)  # affine
        length = self._longest(dslack, dmultiplier)[:, None]
        ahead = ((self.slack + length * dslack) * (self.multiplier + length * dmultiplier)).mean(axis=1)
        target = mean * np.clip(ahead / mean, 0, 1) ** 3
        step = self._direction(newton, target[:, None] - product - dslack * dmultiplier)
        length = np.minimum(1, 0.99 * self._longest(*step[1:]))
        moving = (running & np.isfinite(length) & np.isfinite(step[0]).all(axis=1))[:, None]
        dx, dslack, dmultiplier = (np.where(moving, length[:, None] * part, 0) for part in step)
        self.x, self.slack, self.multiplier = self.x + dx, self.slack + dslack, self.multiplier + dmultiplier
        self._measure()

    def _newton_matrices(self, running: Bool) -> Float:
        """Hessian ``sum (I - v v') / ||v||`` over both sides ``v``, and ``G' diag(multiplier / slack) G``."""
        q = self.x.shape[1]
        outer = np.einsum("smi,smj->smij", self.sides, self.sides)
        matrices: Float = ((np.eye(q) - outer) / self.norms[:, :, None, None]).sum(axis=0)
        for j in np.flatnonzero(running):
            scaled = np.sqrt(self.multiplier[j] / self.slack[j])[:, None] * self.unit
            matrices[j] += scaled.T @ scaled
        # where few rows hold the point, their ratios drown the rest of the matrix
        matrices += EPS * np.trace(matrices, axis1=1, axis2=2)[:, None, None] * np.eye(q)
        return matrices

    def _direction(self, newton: Float, products: Float) -> tuple[Float, Float, Float]:
        """Newton direction ``(dx, dslack, dmultiplier)`` for given changes of ``slack * multiplier``."""
        pulled = (self.signs * ((products - self.multiplier * self.infeasible) / self.slack)) @ self.unit
        dx = np.linalg.solve(newton, (self.stationary + pulled)[:, :, None])[:, :, 0]
        dslack = self.signs * (dx @ self.unit.T) + self.infeasible
        return dx, dslack, (products - self.multiplier * dslack) / self.slack

    def _longest(self, dslack: Float, dmultiplier: Float) -> Float:
        """Largest steps in [0, 1] that keep slacks and multipliers nonnegative."""
        lengths = np.ones(len(dslack))
        for values, steps in ((self.slack, dslack), (self.multiplier, dmultiplier)):
            lengths = np.minimum(lengths, np.where(steps < 0, -values / steps, np.inf).min(axis=1))
        return lengths
