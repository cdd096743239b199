"""Networks of the same function and penalty with fewer neurons.

Two reductions never raise the penalty (mathematics, sections 1a and 1b). Neurons of one output direction in one closed
cone are linear together there, so their sum replaces them. Norms of fixed neurons move along a linear dependence of
the functions ``(A u_j)_+ c_j'`` until one of them is zero (Caratheodory), at most ``n K`` remain.
"""

from __future__ import annotations

import numpy as np

from convexbn._types import Float
from convexbn.program.neurons import Neurons

_RESTING = 1e-7  # responses relative to ||a_i|| ||s_j|| up to which a row counts as resting on its kink
_EQUAL = 1 - 1e-9  # cosine above which output directions are equal
_DEPENDENT = 1e-13  # eigenvalues of the Gram matrix of unit functions below this are a linear dependence


def merged_in_cones(rows: Float, neurons: Neurons) -> Neurons:
    """Replace neurons that share a closed cone and an output direction by their sum, heaviest first."""
    neurons = neurons.select(np.argsort(-neurons.norms)).balanced()
    unit = neurons.with_norms(np.ones(len(neurons.output)))
    response = (rows @ unit.first) / np.linalg.norm(rows, axis=1)[:, None]
    opened, closed = response > _RESTING, response < -_RESTING
    leaders: list[int] = []
    sums = unit.first * neurons.norms
    for j in range(len(unit.output)):
        equal = (k for k in leaders if unit.output[k] @ unit.output[j] > _EQUAL)
        fitting = (k for k in equal if not np.any((opened[:, k] & closed[:, j]) | (closed[:, k] & opened[:, j])))
        if (home := next(fitting, None)) is None:
            leaders.append(j)
        else:
            sums[:, home] += sums[:, j]
            opened[:, home] |= opened[:, j]
            closed[:, home] |= closed[:, j]
    return Neurons(sums[:, leaders], unit.output[leaders]).balanced()


def vertex(rows: Float, neurons: Neurons) -> Neurons:
    """Norms without a linear dependence among the functions of their neurons, on rows scaled by ``sqrt(w)``."""
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
