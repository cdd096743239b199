"""Targets as rays: at rank n - 1 each ray of the targets is one neuron, if no two of them make an acute angle.

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
    """The targets have no formula: only an iterative solver solves the program."""


def group_directions(rows: Float) -> tuple[Index, Float]:
    """Group rows of equal direction: group of each row (-1 for zero rows), and unit directions (G, K).

    Directions are equal if all their entries agree to nine decimals, or lie on a chain of such steps.
    """
    norms = np.linalg.norm(rows, axis=1)
    live, group = norms > 0, np.full(len(rows), -1)
    if not live.any():
        return group, np.zeros((0, rows.shape[1]))
    directions = rows[live] / norms[live][:, None]
    chains = np.column_stack([_chains(column) for column in directions.T])
    _, first, inverse = np.unique(chains, axis=0, return_index=True, return_inverse=True)
    group[live] = inverse.ravel()
    return group, directions[first]


def rays(targets: Float) -> tuple[Float, Float, Float]:
    """Split rows by direction: hidden ``u_g`` (n, G), norms ``||Y_g||`` (G,) and directions ``d_g`` (G, K).

    Two directions with an acute angle between them are a NoFormulaError.
    """
    group, directions = group_directions(targets)
    live = group >= 0
    if (directions @ directions.T - np.eye(len(directions)) > 1e-9).any():
        raise NoFormulaError(
            "no formula: two directions of the targets make an acute angle; single outputs, one-hot, +-1 and balanced "
            "centred targets have a formula."
        )
    lengths = np.linalg.norm(targets, axis=1)
    norms = np.sqrt(np.bincount(group[live], lengths[live] ** 2, len(directions)))
    hidden = np.zeros((len(targets), len(directions)))
    hidden[live, group[live]] = lengths[live] / norms[group[live]]
    return hidden, norms, directions


def shrunk_rays(targets: Float, weight_decay: float) -> Formula:
    """Formula ``F_g = (1 - beta / ||Y_g||)_+ Y_g`` on every ray ``g`` of targets times ``sqrt(w)``."""
    hidden, norms, directions = rays(targets)
    return hidden, np.maximum(norms - weight_decay, 0)[:, None] * directions


def two_sides(weights: Float, targets: Float, amplitudes: Callable[[Float, Float], Float]) -> Formula:
    """Formula of a single output: one neuron for the positive targets, one for the negative ones.

    Parameters
    ----------
    weights, targets : ndarray (n,)
    amplitudes : callable
        Outputs of rows of one sign, from their weights and the absolute values of their targets.
    """
    hidden, output = np.zeros((len(targets), 2)), np.zeros((2, 1))
    for j, sign in enumerate((1.0, -1.0)):
        side = sign * targets > 0
        column = np.sqrt(weights[side]) * amplitudes(weights[side], sign * targets[side])
        if (norm := np.linalg.norm(column)) > 0:
            hidden[side, j], output[j] = column / norm, sign * norm
    return hidden, output


def with_norm(weights: Float, stationary: Callable[[float], Float], weight_decay: float) -> Float:
    """Outputs ``f(lambda)`` at which ``lambda ||sqrt(w) f||``, which grows with lambda, is the weight decay.

    Parameters
    ----------
    weights, stationary, weight_decay : ndarray (n,), callable ``f``, float
    """
    low, high = -700.0, 700.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        f = stationary(np.exp(middle))
        too_small = np.exp(middle) * np.linalg.norm(np.sqrt(weights) * f) < weight_decay
        low, high = (middle, high) if too_small else (low, middle)
    return f


def _chains(values: Float) -> Index:
    """Index of the run that each value lies in, where sorted values at most 1e-9 apart are one run."""
    order = np.argsort(values)
    chains = np.zeros(len(values), dtype=np.intp)
    chains[order[1:]] = np.cumsum(np.diff(values[order]) > 1e-9)
    return chains
