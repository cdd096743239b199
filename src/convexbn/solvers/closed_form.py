"""Rank n - 1: the ReLU program solved by formula.

When the distinct rows are affinely independent, ``A`` is orthogonal, and neurons are arbitrary unit vectors ``u >= 0``
with ``s = A'u``. If the targets fall into rays whose directions make no acute angle, each ray is one neuron
(mathematics, sections 2d and 2e); the losses hold their formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convexbn.program.losses import Loss
from convexbn.program.neurons import Neurons
from convexbn.program.rays import NoFormulaError, rays
from convexbn.program.relu import ReluProgram
from convexbn.solvers.base import Budget, Solution

__all__ = ["ClosedForm", "NoFormulaError", "max_weight_decay"]


@dataclass(frozen=True)
class ClosedForm:
    """Globally optimal neurons of a program whose whitened rows are square.

    Examples
    --------
    Three one-hot targets on orthogonal data; the class of two rows survives a weight decay of 1.2:

    >>> from convexbn.program.losses import SquaredLoss
    >>> program = ReluProgram(np.eye(3), SquaredLoss(np.eye(2)[[0, 0, 1]], np.ones(3)), 1.2)
    >>> ClosedForm().solve(program).weights.output.round(4)
    array([[0.2142, 0.    ]])
    """

    def solve(
        self,
        program: ReluProgram,
        start: Neurons | None = None,
        budget: Budget | None = None,
        rng: np.random.Generator | None = None,
    ) -> Solution[Neurons]:
        """Solve the program.

        Parameters
        ----------
        program : ReluProgram
            Rows (n, n) whose product with ``diag(sqrt(w))`` is orthogonal.
        start, budget, rng
            Not used.

        Raises
        ------
        NoFormulaError
            When loss and targets have no formula: two rays with an acute angle, or soft labels in cross-entropy.
        """
        loss = program.loss
        hidden, output = loss.full_rank(program.weight_decay)
        if program.weight_decay >= max_weight_decay(loss):
            output = np.zeros_like(output)
        live = np.linalg.norm(output, axis=1) > 0
        root = np.sqrt(loss.weights)[:, None]
        return Solution(Neurons((root * program.rows[:]).T @ hidden[:, live], output[live]), "formula")


def max_weight_decay(loss: Loss) -> float:
    """Smallest weight decay at which the zero network is optimal at rank n - 1: the largest ray norm.

    Raises
    ------
    NoFormulaError
        When two rays make an acute angle.
    """
    dual = loss.negative_gradient(np.zeros_like(loss.targets)) / np.sqrt(loss.weights)[:, None]
    return float(rays(dual)[1].max(initial=0.0))
