"""A gated network before the judge: its blocks, outputs and penalty, recomputed from its neurons."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from convexbn._types import Bool, Float, Index
from convexbn.certificate.dual_bounds import GateDualBounds
from convexbn.certificate.question import Question
from convexbn.data.blocks import BlockSize
from convexbn.data.preactivations import PreActivations
from convexbn.program.gated import GatedProgram, gated_outputs
from convexbn.program.gates import distinct_gates, gate_patterns
from convexbn.program.network import BatchNormNetwork

#: Gates of rows held at once, and the fewest rows.
_ENTRIES, _LEAST_ROWS = 1 << 22, 64


@dataclass(frozen=True, eq=False)
class GatedCase:
    """A network on the gates of a question.

    Attributes
    ----------
    place : ndarray (m,)
        Place of every neuron among the gates that are used.
    opened : ndarray (N, m') of bool
        Patterns of those gates.
    """

    question: Question
    program: GatedProgram
    network: BatchNormNetwork
    responses: PreActivations
    place: Index
    opened: Bool

    @classmethod
    def examine(
        cls, question: Question, program: GatedProgram, network: BatchNormNetwork, responses: PreActivations
    ) -> GatedCase:
        """Check that every neuron follows the gate that it names.

        Parameters
        ----------
        question : Question
        program : GatedProgram
            The program of ``question``, with the gates of the network.
        network : BatchNormNetwork
        responses : PreActivations
            Inputs of its batch norms on the training rows.

        Raises
        ------
        ValueError
            When one does not.
        """
        patterns = program.operator.patterns
        _check_gates(question, patterns, *network.fixed_gates)
        used, place = np.unique(network.fixed_gates[2], return_inverse=True)
        return cls(question, program, network, responses, place, patterns[:, used])

    @property
    def bounds(self) -> GateDualBounds:
        """Bounds of dual points."""
        return GateDualBounds(self.program)

    def penalty(self, coordinates: Float) -> float:
        """``sum_i ||S_i||`` of first layers along whitened coordinates (q - 1, m)."""
        first = np.vstack([self.network.gamma * coordinates, self.network.shift])
        return float(self.program.norm.of(self._blocks(first)).sum())

    def outputs(self, first: Float) -> Float:
        """Outputs of first layers on the network's own pre-activations."""
        blocks = self._blocks(first)
        return gated_outputs(self.responses.rows, self.opened, blocks, self.question.readout)

    def at_mean(self, mean: Float) -> GatedCase:
        """The same network with the patterns of its gates about another mean."""
        gates, offsets, _ = self.network.fixed_gates
        first = np.unique(self.place, return_index=True)[1]
        opened = gate_patterns(self.question.X, mean, gates[:, first], offsets[first])
        return replace(self, opened=opened)

    def _blocks(self, first: Float) -> Float:
        """Blocks ``sum_j s_j c_j'`` over the neurons of every gate: (m', q, K)."""
        count, output = self.opened.shape[1], self.network.output
        order = np.argsort(self.place, kind="stable")
        ends = np.searchsorted(self.place[order], np.arange(count + 1))
        parts = [order[start:stop] for start, stop in itertools.pairwise(ends)]
        blocks = [first[:, part] @ output[part] for part in parts]
        return np.array(blocks).reshape(count, len(first), output.shape[1])


def _check_gates(question: Question, patterns: Bool, gates: Float, offsets: Float, gate_index: Index) -> None:
    """Look whether every neuron's own gate is the one of the program that it names."""
    first, distinct = distinct_gates(gates, offsets)
    pairs, pair = np.unique(np.stack([distinct, gate_index]), axis=1, return_inverse=True)
    differ = np.zeros(pairs.shape[1], dtype=bool)
    for part in BlockSize(pairs.shape[1], _ENTRIES, _LEAST_ROWS).slices(len(question.X)):
        opened = gate_patterns(question.X[part], question.mean, gates[:, first], offsets[first])
        differ |= (opened[:, pairs[0]] != patterns[part][:, pairs[1]]).any(axis=0)
    wrong = differ[pair.ravel()]
    if wrong.any():
        raise ValueError(
            f"neuron {np.flatnonzero(wrong)[0]} does not follow the gate that it names: the network and the gates do "
            "not belong together, so there is nothing to certify."
        )
