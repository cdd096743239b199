"""A ReLU network before the judge: its outputs and penalty, recomputed from its neurons."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convexbn._types import Float
from convexbn.certificate.dual_bounds import ReluDualBounds
from convexbn.certificate.question import Question
from convexbn.data.preactivations import PreActivations
from convexbn.program.network import BatchNormNetwork
from convexbn.program.relu import relu_outputs


@dataclass(frozen=True, eq=False)
class ReluCase:
    """A network of any width and patterns, and the bounds of its dual points."""

    question: Question
    network: BatchNormNetwork
    responses: PreActivations
    bounds: ReluDualBounds

    def penalty(self, coordinates: Float) -> float:
        """``sum_j ||s_j|| ||c_j||`` of first layers along whitened coordinates (q - 1, m)."""
        network, lengths = self.network, np.ones(self.network.n_neurons)
        if self.question.spectral_filter is not None:
            lengths = np.linalg.norm(coordinates, axis=0)
            lengths[lengths == 0] = 1.0  # a direction on which the rows do not vary still has its scale
        return float(np.hypot(network.gamma * lengths, network.shift) @ np.linalg.norm(network.output, axis=1))

    def outputs(self, first: Float) -> Float:
        """Outputs (n, K) of first layers (r + 1, m) on the network's own pre-activations."""
        return relu_outputs(self.responses.rows, self.question.readout, first, self.network.output)
