"""Weights of a two-layer ReLU network on whitened rows: ``F = (A first)_+ output``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from convexbn._types import Bool, Float, Index

#: Cosine above which directions with equal outputs are one neuron.
_SAME = 1 - 1e-4
#: Norm, relative to the largest, below which a neuron is dropped.
_NEGLIGIBLE = 1e-5


@dataclass(frozen=True)
class Neurons:
    """Weights of both layers: ``first`` (q, m) has a column ``s_j`` per neuron, ``output`` (m, R K) a row ``c_j``."""

    first: Float
    output: Float

    @property
    def norms(self) -> Float:
        """``||s_j|| ||c_j||``: (m,)."""
        return np.linalg.norm(self.first, axis=0) * np.linalg.norm(self.output, axis=1)

    def joined(self, other: Neurons) -> Neurons:
        """Network of the neurons of both."""
        return Neurons(np.hstack([self.first, other.first]), np.vstack([self.output, other.output]))

    def select(self, index: Index | Bool | list[int] | slice) -> Neurons:
        """Network of some of the neurons."""
        return Neurons(self.first[:, index], self.output[index])

    def with_norms(self, norms: Float) -> Neurons:
        """Balanced neurons, ``||s_j|| = ||c_j||``, of these directions and other norms, without neurons of norm 0."""
        live = (norms > 0) & (self.norms > 0)
        kept, root = self.select(live), np.sqrt(norms[live])
        first = kept.first * (root / np.linalg.norm(kept.first, axis=0))
        return Neurons(first, kept.output * (root / np.linalg.norm(kept.output, axis=1))[:, None])

    def balanced(self) -> Neurons:
        """Balanced network of equal outputs and least cost, without neurons of norm 0."""
        return self.with_norms(self.norms)


def mean(networks: Sequence[Neurons]) -> Neurons:
    """Network whose outputs are the mean of theirs; by convexity, its objective is at most the mean of theirs."""
    together, root = functools.reduce(Neurons.joined, networks), np.sqrt(len(networks))
    return Neurons(together.first / root, together.output / root)


def merge(neurons: Neurons) -> Neurons:
    """Drop negligible neurons, and add up those of nearly equal direction and output."""
    norms = neurons.norms
    order = np.argsort(-norms)
    order = order[norms[order] > _NEGLIGIBLE * norms.max(initial=0.0)]
    unit = neurons.select(order).with_norms(np.ones(len(order)))
    alike = (unit.first.T @ unit.first > _SAME) & (unit.output @ unit.output.T > _SAME)
    leader = alike.argmax(axis=1) if len(order) else order  # the heaviest that is alike
    kept = np.flatnonzero(leader == np.arange(len(order)))
    total: Float = np.bincount(leader, norms[order], len(order)).astype(np.float64)
    return unit.select(kept).with_norms(total[kept])
