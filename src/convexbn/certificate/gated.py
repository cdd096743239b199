"""A gated network before the judge: its blocks, outputs and penalty, recomputed from its neurons."""

from __future__ import annotations

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

#: Entries of the patterns that are compared at a time, and the fewest rows of such a block.
_ENTRIES, _LEAST_ROWS = 1 << 22, 64


@dataclass(frozen=True, eq=False)
class GatedCase:
    """A network on the gates of a question, and the bounds of its dual points.

    ``opened`` (N, m') are the patterns of the gates in use, ``place`` (m,) the position of every neuron among them.
    """

    question: Question
    network: BatchNormNetwork
    responses: PreActivations
    bounds: GateDualBounds
    place: Index
    opened: Bool

    @classmethod
    def examine(
        cls, question: Question, program: GatedProgram, network: BatchNormNetwork, responses: PreActivations
    ) -> GatedCase:
        """Check that every neuron follows the gate that it names, else raise a ValueError.

        Parameters
        ----------
        question, program : Question, GatedProgram
            The program is that of the question.
        network, responses : BatchNormNetwork, PreActivations
            The responses are the inputs of the network's batch norms on the rows.
        """
        patterns = program.operator.patterns
        _check_gates(question, patterns, *network.fixed_gates)
        used, place = np.unique(network.fixed_gates[2], return_inverse=True)
        return cls(question, network, responses, GateDualBounds(program), place, patterns[:, used])

    def penalty(self, coordinates: Float) -> float:
        """``sum_i ||S_i||`` of first layers along whitened coordinates (q - 1, m).

        Without a filter it is that of the weights as stored, whatever the whitened rows hold of their directions.
        """
        if self.question.spectral_filter is None:
            coordinates = self.responses.orthonormal()
        first = np.vstack([self.network.gamma * coordinates, self.network.shift])
        return float(self.bounds.program.norm.of(self._blocks(first)).sum())

    def outputs(self, first: Float) -> Float:
        """Outputs (n, K) of first layers (r + 1, m) on the network's own pre-activations."""
        return gated_outputs(self.responses.rows, self.opened, self._blocks(first), self.question.readout)

    def at_mean(self, mean: Float) -> GatedCase:
        """Case with the patterns of the network's gates about another mean."""
        gates, offsets, _ = self.network.fixed_gates
        first = np.unique(self.place, return_index=True)[1]
        return replace(self, opened=gate_patterns(self.question.X, mean, gates[:, first], offsets[first]))

    def _blocks(self, first: Float) -> Float:
        """Blocks ``sum_j s_j c_j'`` over the neurons of every gate: (m', q, K)."""
        count, output = self.opened.shape[1], self.network.output
        order = np.argsort(self.place, kind="stable")
        starts = np.searchsorted(self.place[order], np.arange(count))
        blocks = [first[:, part] @ output[part] for part in np.split(order, starts)[1:]]
        return np.array(blocks).reshape(count, len(first), output.shape[1])


def _check_gates(question: Question, patterns: Bool, gates: Float, offsets: Float, gate_index: Index) -> None:
    """Raise a ValueError if a neuron's own gate is not the gate of the program that it names."""
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
