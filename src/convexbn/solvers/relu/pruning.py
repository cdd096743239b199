"""A network of the same function and penalty with fewer neurons.

Two reductions that never raise the penalty (mathematics, sections 1a and 1b): neurons of one output direction in one
closed cone are linear together there, so that their sum replaces them; and norms of fixed neurons move along a
linear dependence of the functions ``(A u_j)_+ c_j'`` until one of them is zero (Caratheodory), at most ``n K`` remain.
"""

from __future__ import annotations

import numpy as np

from convexbn._types import Bool, Float
from convexbn.program.neurons import Neurons

#: Responses relative to ``||a_i|| ||s_j||`` up to which a row counts as resting on its kink.
_RESTING = 1e-7

#: Output directions with a cosine above this are equal.
_EQUAL = 1 - 1e-9

#: Eigenvalues of the Gram matrix of unit functions below this are a linear dependence.
_DEPENDENT = 1e-13


def merged_in_cones(rows: Float, neurons: Neurons) -> Neurons:
    """Sum up the neurons that share a closed cone and an output direction, heaviest first."""
    neurons = neurons.select(np.argsort(-neurons.norms)).balanced()
    unit = neurons.with_norms(np.ones(len(neurons.output)))
    response = (rows @ unit.first) / np.linalg.norm(rows, axis=1)[:, None]
    opened, closed = response > _RESTING, response < -_RESTING
    leaders: list[int] = []
    sums = unit.first * neurons.norms
    for j in range(len(unit.output)):
        equal = (leader for leader in leaders if unit.output[leader] @ unit.output[j] > _EQUAL)
        home = next((leader for leader in equal if _share_a_cone(opened, closed, leader, j)), None)
        if home is None:
            leaders.append(j)
        else:
            sums[:, home] += sums[:, j]
            opened[:, home] |= opened[:, j]
            closed[:, home] |= closed[:, j]
    return Neurons(sums[:, leaders], unit.output[leaders]).balanced()


def vertex(rows: Float, neurons: Neurons) -> Neurons:
    """Masses without a linear dependence among the functions of their neurons; rows scaled by ``sqrt(w)``."""
    unit = neurons.with_norms(np.ones(len(neurons.output)))
    norms = neurons.norms[neurons.norms > 0]
    hidden = np.maximum(rows @ unit.first, 0)
    gram = (hidden.T @ hidden) * (unit.output @ unit.output.T)
    live = np.flatnonzero(gram.diagonal() > 0)
    while len(live) > 1:
        lengths = np.sqrt(gram.diagonal()[live])
        values, vectors = np.linalg.eigh(gram[np.ix_(live, live)] / np.outer(lengths, lengths))
        if values[0] > _DEPENDENT * len(live):
            break
        dependence = vectors[:, 0] / lengths
        dependence *= 1.0 if dependence.sum() >= 0 else -1.0
        ratios = np.full(len(live), np.inf)
        np.divide(norms[live], dependence, out=ratios, where=dependence > 0)
        first = int(ratios.argmin())
        norms[live] = np.maximum(norms[live] - ratios[first] * dependence, 0)
        live = np.delete(live, first)
    return unit.select(live).with_norms(norms[live])


def _share_a_cone(opened: Bool, closed: Bool, j: int, k: int) -> bool:
    return not np.any((opened[:, j] & closed[:, k]) | (closed[:, j] & opened[:, k]))
