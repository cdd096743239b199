"""A ReLU network before the judge: its outputs and penalty, recomputed from its neurons."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convexbn._types import Float
from convexbn.certificate.dual_bounds import ReluDualBounds
from convexbn.certificate.question import Question
from convexbn.data.preactivations import PreActivations
from convexbn.program.network import BatchNormNetwork
from convexbn.program.relu import ReluProgram, relu_outputs


@dataclass(frozen=True, eq=False)
class ReluCase:
    """A network of any width and patterns.

    Attributes
    ----------
    coordinates : ndarray (q - 1, m)
        Whitened first layers of unit scale.
    deadline : float or None
        ``time.monotonic()`` after which no further bound is tried; None: each bound does its stated work.
    """

    question: Question
    program: ReluProgram
    network: BatchNormNetwork
    responses: PreActivations
    coordinates: Float
    deadline: float | None

    @property
    def bounds(self) -> ReluDualBounds:
        """Bounds of dual points, cheap ones first."""
        directions = np.vstack([self.network.gamma * self.coordinates, self.network.shift]).T
        return ReluDualBounds(self.program, directions, self.question.tol, self.deadline)

    def penalty(self, coordinates: Float) -> float:
        """``sum_j ||s_j|| ||c_j||`` of first layers along whitened coordinates (q - 1, m)."""
        network = self.network
        if self.question.spectral_filter is None:
            lengths = np.ones(network.n_neurons)
        else:
            lengths = np.linalg.norm(coordinates, axis=0)
            lengths[lengths == 0] = 1.0  # a direction on which the rows do not vary still has its scale
        return float(np.hypot(network.gamma * lengths, network.shift) @ np.linalg.norm(network.output, axis=1))

    def outputs(self, first: Float) -> Float:
        """Outputs of first layers on the network's own pre-activations."""
        return relu_outputs(self.responses.rows, self.question.readout, first, self.network.output)

    def at_mean(self, mean: Float) -> ReluCase:
        """The same: a ReLU does not see the mean but through its pre-activation."""
        return self
