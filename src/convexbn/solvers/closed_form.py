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
from convexbn.solvers.base import Budget, Solution, Solver

__all__ = ["ClosedForm", "NoFormulaError", "max_weight_decay"]


@dataclass(frozen=True)
class ClosedForm(Solver[ReluProgram, Neurons]):
    """Globally optimal neurons of a program with rows (n, n) whose product with ``diag(sqrt(w))`` is orthogonal.

    ``solve`` raises a ``NoFormulaError`` for rows that are not square or pooled, and for a loss and targets without a
    formula: two rays with an acute angle, or soft labels in cross-entropy.

    Examples
    --------
    Three one-hot targets on orthogonal data; the class of two rows survives a weight decay of 1.2:

    >>> from convexbn.program.losses import SquaredLoss
    >>> program = ReluProgram(np.eye(3), SquaredLoss(np.eye(2)[[0, 0, 1]], np.ones(3)), 1.2)
    >>> ClosedForm().solve(program).weights.output.round(4)
    array([[0.2142, 0.    ]])
    """

    def _solve(
        self, program: ReluProgram, start: Neurons | None, budget: Budget, rng: np.random.Generator
    ) -> Solution[Neurons]:
        if program.rows.shape[0] != program.rows.shape[1] or program.readout.rows_per_case > 1:
            raise NoFormulaError("no formula: the whitened rows of single cases are not square.")
        loss = program.loss
        hidden, output = loss.full_rank(program.weight_decay)
        if program.weight_decay >= max_weight_decay(loss):
            output = np.zeros_like(output)
        live = np.linalg.norm(output, axis=1) > 0
        root = np.sqrt(loss.weights)[:, None]
        return Solution(Neurons((root * program.rows[:]).T @ hidden[:, live], output[live]), "formula")


def max_weight_decay(loss: Loss) -> float:
    """Smallest weight decay at which the zero network is optimal at rank n - 1: the largest ray norm.

    Raises a ``NoFormulaError`` if two rays make an acute angle.
    """
    dual = loss.negative_gradient(np.zeros_like(loss.targets)) / np.sqrt(loss.weights)[:, None]
    return float(rays(dual)[1].max(initial=0.0))
