"""Targets as rays: at rank n - 1 each ray of the targets is one neuron, where no two of them make an acute angle.

``A`` is then orthogonal, and ``(A s)_+`` ranges over all ``u >= 0``: neurons are arbitrary unit vectors ``u >= 0``
with ``s = A'u`` (mathematics, sections 2d and 2e). A formula is a pair of hidden units (n, m) on rows times
``sqrt(w)``, one column a neuron, and an output layer (m, K).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from convexbn._types import Float, Index

#: Hidden units and output layer.
Formula: TypeAlias = tuple[Float, Float]


class NoFormulaError(ValueError):
    """The targets have no formula: the program is for an iterative solver."""


def group_directions(rows: Float) -> tuple[Index, Float]:
    """Group rows of equal direction: group of each row (-1 for zero rows), and unit directions (G, K).

    Directions are equal when all their entries agree to nine decimals, or lie on a chain of such steps.
    """
    norms = np.linalg.norm(rows, axis=1)
    live = norms > 0
    group = np.full(len(rows), -1)
    if not live.any():
        return group, np.zeros((0, rows.shape[1]))
    directions = rows[live] / norms[live][:, None]
    chains = np.column_stack([_chains(column) for column in directions.T])
    _, first, inverse = np.unique(chains, axis=0, return_index=True, return_inverse=True)
    group[live] = inverse.ravel()
    return group, directions[first]


def rays(targets: Float) -> tuple[Float, Float, Float]:
    """Split rows by direction: hidden ``u_g`` (n, G), norms ``||Y_g||`` (G,) and directions ``d_g`` (G, K).

    Raises
    ------
    NoFormulaError
        When two directions make an acute angle.
    """
    group, directions = group_directions(targets)
    live = group >= 0
    acute = directions @ directions.T - np.eye(len(directions)) > 1e-9
    if acute.any():
        raise NoFormulaError(
            "no formula: the targets have directions with an acute angle between them; one output, one-hot, "
            "+-1 and balanced centred targets have one."
        )
    lengths = np.linalg.norm(targets, axis=1)
    norms = np.sqrt(np.bincount(group[live], lengths[live] ** 2, len(directions)))
    hidden = np.zeros((len(targets), len(directions)))
    hidden[live, group[live]] = lengths[live] / norms[group[live]]
    return hidden, norms, directions


def shrunk_rays(targets: Float, weight_decay: float) -> Formula:
    """``F_g = (1 - beta / ||Y_g||)_+ Y_g`` on every ray ``g`` of targets times ``sqrt(w)``."""
    hidden, norms, directions = rays(targets)
    return hidden, np.maximum(norms - weight_decay, 0)[:, None] * directions


def two_sides(weights: Float, targets: Float, amplitudes: Callable[[Float, Float], Float]) -> Formula:
    """One neuron for the positive targets and one for the negative ones, of one output.

    Parameters
    ----------
    weights : ndarray (n,)
    targets : ndarray (n,)
    amplitudes : callable
        Outputs of rows of one side, from their weights and their targets made positive.
    """
    hidden, output = np.zeros((len(targets), 2)), np.zeros((2, 1))
    for j, sign in enumerate((1.0, -1.0)):
        side = sign * targets > 0
        of_side = weights[side]
        amplitude = amplitudes(of_side, sign * targets[side])
        norm = np.linalg.norm(np.sqrt(of_side) * amplitude)
        if norm > 0:
            hidden[side, j] = np.sqrt(of_side) * amplitude / norm
            output[j] = sign * norm
    return hidden, output


def with_norm(weights: Float, stationary: Callable[[float], Float], weight_decay: float) -> Float:
    """The outputs ``f(lambda)`` for which ``lambda ||sqrt(w) f||``, which grows with lambda, is the weight decay."""
    low, high = -700.0, 700.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        f = stationary(np.exp(middle))
        too_small = np.exp(middle) * np.linalg.norm(np.sqrt(weights) * f) < weight_decay
        low, high = (middle, high) if too_small else (low, middle)
    return f


def _chains(values: Float) -> Index:
    """Number of the run that each value lies in: sorted values less than 1e-9 apart are one run."""
    order = np.argsort(values)
    chains = np.zeros(len(values), dtype=np.intp)
    chains[order[1:]] = np.cumsum(np.diff(values[order]) > 1e-9)
    return chains
