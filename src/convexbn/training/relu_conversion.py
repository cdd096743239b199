"""Conversion of a gated network to a plain ReLU network with the same outputs on the training rows.

A neuron ``u`` of the gate ``D`` adds ``D A u c'``. If some direction opens on exactly the rows of ``D`` (the gate is
realised), the cone ``{s : (2 D - I) A s >= 0}`` has an interior, and ``u`` is the difference ``p - m`` of two of its
vectors. On them the gate is the ReLU's own, so ``D A u = (A p)_+ - (A m)_+``: two ReLU neurons, with outputs ``c`` and
``-c``. Blocks of several outputs are split atom by atom of their SVD. The norms are the smallest for the block. They
are larger than the gated ones, the more so the thinner the cone: the price of dropping the gates.

With ``rank`` below that of the data, gates on the raw features cut the rows in ways that no direction of the whitened
data does. Such gates are refused, with their number, or moved to the nearest direction and the program solved again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from convexbn._types import EPS, Float, Index
from convexbn.certificate.certificate import Certificate
from convexbn.data.preactivations import PreActivations
from convexbn.program.gated import GateBlocks, GatedProgram
from convexbn.program.gates import first_of_each_pattern, gate_patterns
from convexbn.program.network import BatchNormNetwork
from convexbn.program.neurons import Neurons
from convexbn.program.realizability import are_realizable, nearest_directions
from convexbn.solvers.cone_decomposition import difference_in_cones
from convexbn.training.fit import fit_gated, judge_on
from convexbn.training.training_set import TrainingSet


@dataclass(frozen=True, eq=False)
class Conversion:
    """A ReLU network made of a gated one, with the objectives before and after.

    Attributes
    ----------
    network : BatchNormNetwork
        The ReLU network; its outputs on the training rows are those of the gated network.
    certificate : Certificate
        Its objective over all patterns, with the orthant's lower bound.
    objective_before, objective_realised : float
        Objective of the given network, and after the gates that were not realised were moved.
    n_unrealisable : int
        Gates of the given network that no direction of the whitened data realises.
    output_error : float
        Largest difference of the outputs on the training rows, relative to the largest output.
    """

    network: BatchNormNetwork
    certificate: Certificate
    objective_before: float
    objective_realised: float
    n_unrealisable: int
    output_error: float

    @property
    def objective_after(self) -> float:
        """Objective of the ReLU network: loss plus ``weight_decay * sum_j ||s_j|| ||c_j||``."""
        return self.certificate.objective


def to_relu(
    data: TrainingSet, network: BatchNormNetwork, gates: Float, gate_offsets: Float, weight_decay: float, *,
    tol: float = 1e-6, unrealisable: str = "refuse",
) -> Conversion:  # fmt: skip
    """Convert a gated network into a ReLU network.

    Parameters
    ----------
    data, network : TrainingSet, BatchNormNetwork
        The gated network, and the rows that it was trained on.
    gates, gate_offsets, weight_decay : ndarray (d, P), (P,), float
        All gates of its program, and its weight decay.
    tol : float
        Relative gap of the certificate, and of the program that ``"nearest"`` solves.
    unrealisable : {"refuse", "nearest"}
        Whether gates that no direction of the whitened data realises are an error, or are moved to the nearest
        directions and the program solved again.

    Raises
    ------
    ValueError
        For a ReLU network, and for gates that are not realised.
    """
    if network.gate_index is None:
        raise ValueError("the network has no gates: it is a ReLU network already.")
    if unrealisable not in ("refuse", "nearest"):
        raise ValueError(f"unrealisable must be 'refuse' or 'nearest', got {unrealisable!r}.")
    before = split = _SplitProgram.from_network(data, network, weight_decay)
    n_unrealisable = before.n_unrealisable
    if n_unrealisable and unrealisable == "nearest":
        gates, gate_offsets = _with_nearest(data, gates, gate_offsets)
        program = data.gated_program(gates, gate_offsets, weight_decay)
        network = fit_gated(data, program, (gates, gate_offsets), tol=tol).network
        split = _SplitProgram.from_network(data, network, weight_decay)
    if missing := split.n_unrealisable:
        raise ValueError(
            f"{missing} of the {len(split.blocks)} gates that the network uses are not realised on the whitened data "
            f"(rank {data.whitening.rank} of {data.whitening.numerical_rank}): no ReLU neuron opens on exactly their "
            "rows. Train with gates='whitened' or with rank=None, or convert with unrealisable='nearest'."
        )
    converted = BatchNormNetwork.from_neurons(data.whitening, split.split())
    converted = replace(converted, output_bias=network.output_bias)
    # a cheap proof, of the orthant alone: the conversion is not for its sake
    proof = judge_on(data, converted, data.relu_program(weight_decay), tol=tol, own_rows=True, deadline=0.0)
    outputs = network.predict(data.X)
    error = np.abs(converted.predict(data.X) - outputs).max() / max(np.abs(outputs).max(), np.finfo(np.float64).tiny)
    return Conversion(converted, proof, before.objective, split.objective, n_unrealisable, float(error))


def neurons_of(data: TrainingSet, network: BatchNormNetwork) -> Neurons:
    """Neurons of a network on the whitened rows of ``data``: a warm start of pricing."""
    weights = data.row_weights
    responses = PreActivations.compute(data.inputs, network.weight, weights, rank=data.whitening.rank)
    coordinates = responses.products(data.whitening.rows, weights)
    coordinates /= (data.whitening.filter**2)[:, None]
    lengths = np.linalg.norm(data.whitening.filter[:, None] * coordinates, axis=0)
    coordinates /= np.where(lengths > 0, lengths, 1)
    return Neurons(np.vstack([network.gamma * coordinates, network.shift]), network.output)


def blocks_of(neurons: Neurons, gate_index: Index) -> tuple[Index, Float]:
    """Index (m,) of the first neuron of every gate in use, and the blocks ``S_i`` of these gates (m, q, K)."""
    _, first, place = np.unique(gate_index, return_index=True, return_inverse=True)
    blocks = np.zeros((len(first), len(neurons.first), neurons.output.shape[1]))
    np.add.at(blocks, place, neurons.first.T[:, :, None] * neurons.output[:, None, :])
    return first, blocks


@dataclass(frozen=True)
class _SplitProgram:
    """Program of the gates that a network uses, their nearest directions on the whitened rows (q, m), and its blocks.

    The blocks (m, q, K) are sums over the neurons of every gate.
    """

    program: GatedProgram
    directions: Float
    blocks: Float

    @classmethod
    def from_network(cls, data: TrainingSet, network: BatchNormNetwork, weight_decay: float) -> _SplitProgram:
        gates, offsets, index = network.fixed_gates
        first, blocks = blocks_of(neurons_of(data, network), index)
        gates, offsets = gates[:, first], offsets[first]
        program = data.gated_program(gates, offsets, weight_decay)
        return cls(program, nearest_directions(data.X, data.whitening, data.loss.weights, gates, offsets), blocks)

    @property
    def objective(self) -> float:
        """Loss plus ``weight_decay * sum_i ||S_i||_F``."""
        return self.program.objective(GateBlocks(np.arange(len(self.blocks)), self.blocks))

    @property
    def n_unrealisable(self) -> int:
        """Number of gates that no direction of the whitened rows realises."""
        operator = self.program.operator
        return int((~are_realizable(operator.rows, operator.patterns, self.directions)).sum())

    def split(self) -> Neurons:
        """Two ReLU neurons for each atom of every block."""
        left, values, right = np.linalg.svd(self.blocks, full_matrices=False)
        cut = EPS * max(self.blocks.shape[1:]) * values.max(axis=1, initial=0.0, keepdims=True)
        block, atom = np.nonzero((values > cut) & (values > 0))
        vectors, output = values[block, atom][:, None] * left[block, :, atom], right[block, atom]
        operator = self.program.operator
        positive, negative = difference_in_cones(operator.rows, operator.patterns.T[block], vectors)
        return Neurons(np.vstack([positive, negative]).T, np.vstack([output, -output]))


def _with_nearest(data: TrainingSet, gates: Float, offsets: Float) -> tuple[Float, Float]:
    """Gates with those not realised moved to the nearest direction; of equal patterns the first is kept."""
    whitening = data.whitening
    directions = nearest_directions(data.X, whitening, data.loss.weights, gates, offsets)
    opened = gate_patterns(data.X, whitening.mean, gates, offsets)
    kept = are_realizable(whitening.rows[:], opened, directions)
    moved = whitening.projection @ directions[:-1], directions[-1] / np.sqrt(whitening.total_weight)
    gates, offsets = np.where(kept, gates, moved[0]), np.where(kept, offsets, moved[1])
    first = first_of_each_pattern(gate_patterns(data.X, whitening.mean, gates, offsets))
    return gates[:, first], offsets[first]
