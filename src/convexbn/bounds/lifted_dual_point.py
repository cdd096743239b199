"""Choose the dual point within the doubly nonnegative relaxation: squared loss, one output.

The relaxation of the whole training program, with one homogenised lifted matrix (module ``lifted_set``) for each output
sign and ``f = 2 Z+_0x - 2 Z-_0x``,

    min 1/2 ||y - f||^2 + beta (tr Z+ + tr Z-),

has the residual ``v = y - f`` as its dual point: the one of largest dual value among those that the relaxed bound
makes feasible. Alternating directions split the semidefinite from the entrywise constraints, as in ``lifted``; the
entries ``Z_0x`` of both signs meet in the loss and are found row by row. At any iteration ``v`` and the multipliers
give a valid bound, to which ``v`` is scaled.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from convexbn._types import Float, is_over
from convexbn.bounds.bound import Bound
from convexbn.bounds.dual_point import DualPoint, dual_value, rescaled
from convexbn.bounds.lifted import CHECK_EVERY, PENALTY, RELAXATION, settled
from convexbn.bounds.lifted_set import Blocks, LiftedSet, completed
from convexbn.data.scaling import unit_scale


def lifted_dual_point(
    targets: Float, V: Float, A: Float, weight_decay: float, *, iterations: int = 300, deadline: float | None = None
) -> DualPoint:
    """Dual point for ``1/2 ||F - y||^2`` by the doubly nonnegative relaxation of the program.

    Parameters
    ----------
    targets, V : ndarray (n, 1)
        ``y`` (weighted data: times ``sqrt(w)``), and the residual of a good network, which scales the penalty.
    A : ndarray (n, q)
        Orthonormal columns, or orthogonal ones of at most unit norm.
    weight_decay : float
    iterations : int
        Alternating steps, of two eigendecompositions each.
    deadline : float, optional
    """
    scale = unit_scale(targets)
    search = _AlternatingDirections(targets[:, 0] / scale, V[:, 0] / scale, A, weight_decay / scale)
    best, checked = search.candidate(), list[float]()
    for k in range(1, iterations + 1):
        search.step()
        late = is_over(deadline)
        if k % CHECK_EVERY == 0 or k == iterations or late:
            best = max(best, search.candidate(), key=lambda point: dual_value(point.dual[:, 0], search.y))
            if late or settled(checked, -dual_value(best.dual[:, 0], search.y), -search.objective):
                break
    return DualPoint(best.value * scale, best.rounding * scale, search.work, best.dual * scale)


class _AlternatingDirections:
    """Iterates of the alternating directions: one lifted matrix and one scaled multiplier for each sign."""

    def __init__(self, y: Float, v: Float, A: Float, beta: float) -> None:
        self.y, self.beta, self.v, self.work = y, beta, v, 0
        A = completed(A)
        self.without_loss = len(A) - len(y)
        self.relaxed = LiftedSet(A, homogenised=True)
        size = float(np.linalg.norm(v)) or 1.0
        trace = float(v @ (y - v)) / beta  # the penalty of the network of residual v, over beta
        self.objective = float(0.5 * v @ v + v @ (y - v))  # of that network
        self.penalty = PENALTY * size / (trace if trace > 0 else size / beta)
        zero = Blocks.zeros(self.relaxed.size)
        self.lifted, self.multipliers = [zero, zero], [zero, zero]

    def step(self) -> None:
        """Take one alternating step of both signs."""
        shifted, level = [], self.beta / self.penalty
        for Z, multiplier in zip(self.lifted, self.multipliers, strict=True):
            matrix = self.relaxed.adjoint(Z.plus(multiplier, -1.0))
            values, basis = scipy.linalg.eigh(matrix, subset_by_value=[level, np.inf], check_finite=False)
            factor = basis * np.sqrt(np.maximum(values - level, 0))  # of the positive part of matrix - level I
            shifted.append(self.relaxed.lift(factor).times(RELAXATION).plus(Z, 1 - RELAXATION).plus(multiplier))
        self.lifted = [self.relaxed.nearest(Y) for Y in shifted]
        part = slice(1, 1 + len(self.y))
        outputs = _meet_in_the_loss(self.y, shifted[0].xx[0, part], shifted[1].xx[0, part], self.penalty)
        for Z, entries in zip(self.lifted, outputs, strict=True):
            Z.xx[0, part] = Z.xx[part, 0] = entries
        self.v = self.y - 2 * outputs[0] + 2 * outputs[1]
        self.multipliers = [Y.plus(Z, -1.0) for Y, Z in zip(shifted, self.lifted, strict=True)]
        self.work += 2

    def candidate(self) -> DualPoint:
        """Current dual point, scaled to the bounds that its multipliers prove."""
        padded = np.append(self.v, np.zeros(self.without_loss))
        pairs = zip((self.relaxed.weights(padded), self.relaxed.weights(-padded)), self.multipliers, strict=True)
        sides = [self.relaxed.bound(C, multiplier.times(-self.penalty).plus(C, -1.0)) for C, multiplier in pairs]
        self.work += 2
        return rescaled(self.v, Bound(*max(sides), 2), self.y, self.beta)


def _meet_in_the_loss(y: Float, plus: Float, minus: Float, penalty: float) -> tuple[Float, Float]:
    """Minimise ``1/2 (y - 2a + 2b)^2 + penalty ((a - plus)^2 + (b - minus)^2)`` over ``a, b >= 0``, row by row.

    The cases in turn: ``a = 0`` if its slope there is not negative at the best b, ``b = 0`` likewise, both positive.
    """
    v = (y - 2 * plus + 2 * minus) / (1 + 4 / penalty)
    a, b = plus + v / penalty, minus - v / penalty
    b_alone = np.maximum((minus - y / penalty) / (1 + 2 / penalty), 0)
    a_alone = np.maximum((plus + y / penalty) / (1 + 2 / penalty), 0)
    only_b = penalty * plus + y + 2 * b_alone <= 0
    only_a = ~only_b & (penalty * minus - y + 2 * a_alone <= 0)
    return (
        np.where(only_b, 0.0, np.where(only_a, a_alone, np.maximum(a, 0))),
        np.where(only_b, b_alone, np.where(only_a, 0.0, np.maximum(b, 0))),
    )
