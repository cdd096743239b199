"""A two-layer ReLU network on whitened rows: ``F = (A first)_+ output``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from convexbn._types import Bool, Float, FloatMatrix, Index
from convexbn.data.row_matrix import MappedRows
from convexbn.program.losses import Loss
from convexbn.program.relu import relu_outputs, row_blocks

#: Directions closer than this (cosine) with equal outputs are one neuron.
_SAME = 1 - 1e-4

#: Mass relative to the largest below which a neuron is dropped.
_NEGLIGIBLE = 1e-5


@dataclass(frozen=True)
class Neurons:
    """Weights of both layers: ``first`` (q, m), ``output`` (m, K)."""

    first: Float
    output: Float

    @property
    def masses(self) -> Float:
        """``||s_j|| ||c_j||``."""
        masses: Float = np.linalg.norm(self.first, axis=0) * np.linalg.norm(self.output, axis=1)
        return masses

    def joined(self, other: Neurons) -> Neurons:
        """Both networks side by side."""
        return Neurons(np.hstack([self.first, other.first]), np.vstack([self.output, other.output]))

    def chosen(self, index: Index | Bool | list[int] | slice) -> Neurons:
        """Some of the neurons."""
        return Neurons(self.first[:, index], self.output[index])

    def with_masses(self, masses: Float) -> Neurons:
        """Balanced neurons of the same directions, ``||s_j|| = ||c_j||``, and other masses; none of mass 0."""
        live = (masses > 0) & (self.masses > 0)
        kept, root = self.chosen(live), np.sqrt(masses[live])
        first = kept.first * (root / np.linalg.norm(kept.first, axis=0))
        return Neurons(first, kept.output * (root / np.linalg.norm(kept.output, axis=1))[:, None])

    def balanced(self) -> Neurons:
        """The same function with ``||s_j|| = ||c_j||``, which costs least, without neurons of mass 0."""
        return self.with_masses(self.masses)


def network_outputs(rows: FloatMatrix, neurons: Neurons) -> Float:
    """``F = (A first)_+ output``, in blocks of rows."""
    parts = row_blocks(len(rows), neurons.first.shape[1])
    return np.concatenate([np.maximum(rows[part] @ neurons.first, 0) @ neurons.output for part in parts])


def case_outputs(rows: FloatMatrix | MappedRows, loss: Loss, neurons: Neurons) -> Float:
    """What the terms of the loss see of the network on the rows, in float64."""
    return relu_outputs(rows, loss, neurons.first, neurons.output)


def mean(networks: Sequence[Neurons]) -> Neurons:
    """One network whose outputs are the mean of theirs: its objective is convex, so at most the mean of theirs."""
    together, root = functools.reduce(Neurons.joined, networks), np.sqrt(len(networks))
    return Neurons(together.first / root, together.output / root)


def merge(neurons: Neurons) -> Neurons:
    """Drop negligible neurons, and join those of nearly equal direction and output into their sum."""
    masses = neurons.masses
    order = np.argsort(-masses)
    order = order[masses[order] > _NEGLIGIBLE * masses.max(initial=0.0)]
    unit = neurons.chosen(order).with_masses(np.ones(len(order)))
    alike = (unit.first.T @ unit.first > _SAME) & (unit.output @ unit.output.T > _SAME)
    leader = alike.argmax(axis=1) if len(order) else order  # the heaviest that is alike
    kept = np.flatnonzero(leader == np.arange(len(order)))
    total: Float = np.bincount(leader, masses[order], len(order)).astype(np.float64)
    return unit.chosen(kept).with_masses(total[kept])
