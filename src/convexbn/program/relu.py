"""ReLU program over all activation patterns and widths, in terms of the neurons of a network.

    min over m, s_j, c_j   L(sum_j (A s_j)_+ c_j') + weight_decay * sum_j ||s_j|| ||c_j||

is convex in the measure that the neurons form. Its dual is ``max_V D(V)`` subject to
``||V'(A u)_+|| <= weight_decay`` for all ``||u|| <= 1`` (mathematics, section 2a).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import numpy as np

from convexbn._types import Float
from convexbn.data.blocks import BlockSize
from convexbn.data.row_matrix import Rows, row_matrix
from convexbn.program import kernels
from convexbn.program.losses import Loss
from convexbn.program.neurons import Neurons
from convexbn.program.readout import Readout

#: Entries of the hidden layer that are formed at a time, 4 MB in float64, and the fewest rows of such a block.
BLOCK_ENTRIES, LEAST_ROWS = 1 << 19, 256


@dataclass(frozen=True, eq=False)
class ReluProgram:
    """Data of the program.

    Parameters
    ----------
    rows : ndarray (N, q), or RowMatrix
        Whitened rows ``A``; their columns times ``sqrt(row_weights)`` are orthonormal, or orthogonal and shorter.
    loss, weight_decay : Loss, float
        Loss bound to targets (n, K) and weights of the cases, and beta of the mathematics.
    readout : Readout, default=Readout()
        How the loss sees the hidden units of the rows of a case.
    fixed : ndarray (n, K), optional
        Outputs of neurons that stay as they are, added to those of others.

    Examples
    --------
    >>> from convexbn.program.losses import SquaredLoss
    >>> program = ReluProgram(np.eye(2), SquaredLoss(np.ones((2, 1)), np.ones(2)), weight_decay=0.5)
    >>> program.objective(Neurons(np.eye(2), np.ones((2, 1))))
    1.0
    """

    rows: Rows
    loss: Loss
    weight_decay: float
    readout: Readout = field(default_factory=Readout)
    fixed: Float | None = None

    @functools.cached_property
    def row_weights(self) -> Float:
        """Weights of the rows: (N,)."""
        return self.readout.row_weights(self.loss.weights)

    @property
    def n_inputs(self) -> int:
        """Inputs ``q`` of a neuron."""
        return int(self.rows.shape[1])

    @property
    def n_outputs(self) -> int:
        """Entries ``R K`` of a neuron's row of the output layer."""
        return self.readout.n_regions * int(self.loss.targets.shape[1])

    @property
    def no_neurons(self) -> Neurons:
        """Network of width 0."""
        return Neurons(np.zeros((self.n_inputs, 0)), np.zeros((0, self.n_outputs)))

    def outputs(self, neurons: Neurons) -> Float:
        """``F`` (n, K) in float64, computed in the precision of the rows: ``2 N m (q + R K)`` flops."""
        found = relu_outputs(self.rows, self.readout, neurons.first, neurons.output)
        return found if self.fixed is None else self.fixed + found

    def objective(self, neurons: Neurons) -> float:
        """Loss plus penalty."""
        return self.objective_at(self.loss.value(self.outputs(neurons)), neurons)

    def objective_at(self, value: float, neurons: Neurons) -> float:
        """Objective of a network whose loss is ``value``."""
        return value + self.weight_decay * float(neurons.norms.sum())

    def dual(self, neurons: Neurons) -> Float:
        """``V = -grad L(F)``: (n, K)."""
        return self.loss.negative_gradient(self.outputs(neurons))

    def dual_bound(self, dual: Float, norm: float) -> float:
        """Dual value of ``V`` scaled to feasibility, given its ``norm``, ``max over ||u|| <= 1 of ||V'(A u)_+||``."""
        root = np.sqrt(self.loss.weights)[:, None]  # the norm is that of the rounded ``V / sqrt(w)``
        return self.loss.dual_value(min(1.0, self.weight_decay / max(norm, 1e-300)) * root * (dual / root))

    @functools.cached_property
    def unit_rows(self) -> Float:
        """``sqrt(w) A``, of orthonormal columns; in groups (n R, G, q) if hidden units are maxima."""
        return self.readout.arranged(np.sqrt(self.row_weights)[:, None] * self.rows[:])

    def unit_dual(self, dual: Float) -> Float:
        """``V / sqrt(w)`` on ``unit_rows``: ``||V'(A u)_+||`` is the same as on ``rows``."""
        return self.readout.spread(dual / np.sqrt(self.loss.weights)[:, None])

    @property
    def on_rows(self) -> ReluProgram:
        """Program with one case per row: a linear readout becomes part of the loss. Max pooling is a TypeError."""
        return ReluProgram(self.rows, self.readout.composed(self.loss), self.weight_decay, fixed=self.fixed)

    @property
    def in_single_precision(self) -> ReluProgram:
        """Program on rows in float32."""
        return replace(self, rows=row_matrix(self.rows).in_single_precision())


def relu_outputs(rows: Rows, readout: Readout, first: Float, output: Float) -> Float:
    """Outputs of ``(A first)_+`` and an output layer, (n, K) in float64, computed in the precision of the rows.

    Threads share blocks of rows, and no hidden layer is ever whole. ``2 N m (q + R K)`` flops; rows that are computed
    on access are read once.

    Parameters
    ----------
    rows, readout : ndarray (N, q) or RowMatrix, Readout
    first, output : ndarray (q, m), (m, R K)
    """
    matrix = row_matrix(rows)
    shared = [first.astype(matrix.dtype, copy=False), output.astype(matrix.dtype, copy=False), readout]
    found = matrix.map(kernels.relu_outputs, hidden_block(len(output), readout), shared=shared, parallel=True)
    return found.astype(np.float64, copy=False)


def hidden_block(width: int, readout: Readout) -> BlockSize:
    """Size of the blocks of rows whose hidden units are formed at a time."""
    return BlockSize(width, BLOCK_ENTRIES, LEAST_ROWS, readout.rows_per_case)
