"""Accelerated proximal gradient for the gated program: any smooth loss, any number of rows.

FISTA (Beck and Teboulle 2009) with a step that adapts both ways and restarts of the momentum when it points
uphill (O'Donoghue and Candes 2015). One iteration costs one pair of matrix products, ``4 n q P K`` flops;
the dual bound comes free with the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from convexbn._types import Float
from convexbn.program.gated import GateBlocks, GatedProgram
from convexbn.solvers.base import Budget, Progress, Solution, Solves, zero_solution


@dataclass(frozen=True)
class Proximal:
    """Accelerated proximal gradient with adaptive step and restart.

    Parameters
    ----------
    tol : float, default=1e-6
        Relative duality gap to reach.
    max_iter : int, default=5000
        Largest number of iterations.
    """

    tol: float = 1e-6
    max_iter: int = 5000

    solves: ClassVar[Solves] = Solves()

    def solve(
        self,
        program: GatedProgram,
        start: GateBlocks | None = None,
        budget: Budget | None = None,
        rng: np.random.Generator | None = None,
    ) -> Solution[GateBlocks]:
        """Solve the program.

        Parameters
        ----------
        program : GatedProgram
        start : GateBlocks, optional
            A warm start.
        budget : Budget, optional
        rng : numpy.random.Generator, optional
            Not used: nothing is random.
        """
        budget = budget or Budget()
        zero = zero_solution(program, budget)
        if zero is not None:
            return zero
        loss, beta = program.loss, program.weight_decay
        x = np.zeros((program.n_gates, *program.block_shape))
        if start is not None:
            x[start.gate_index] = start.values
        at_x = _outputs(program, x)
        y, at_y, momentum = x, at_x, 1.0
        lipschitz = loss.curvature * _squared_norm(program)
        history: list[Progress] = []
        bound = -np.inf
        while True:
            dual = loss.negative_gradient(at_y)
            gradient = program.correlations(dual)
            feasible = min(1.0, beta / max(program.norm.dual(gradient).max(), np.finfo(float).tiny))
            bound = max(bound, loss.dual_value(feasible * dual))
            new, at_new, lipschitz = _step(program, y, at_y, dual, gradient, lipschitz)
            objective = loss.value(at_new) + beta * float(program.norm.of(new).sum())
            active = int(np.count_nonzero(new.any(axis=(1, 2))))
            history.append(Progress(len(history) + 1, objective, bound, active))
            # the certificate takes its dual point at the new outputs: leave it room
            reason = budget.stop_reason(history[-1], tol=0.5 * self.tol, max_iter=self.max_iter)
            if reason is not None:
                index = np.flatnonzero(new.any(axis=(1, 2)))
                return Solution(GateBlocks(index, new[index]), reason, history)
            if np.vdot(y - new, new - x) > 0:
                momentum = 1.0
            following = 0.5 * (1 + np.sqrt(1 + 4 * momentum**2))
            weight = (momentum - 1) / following
            y, at_y = new + weight * (new - x), at_new + weight * (at_new - at_x)
            x, at_x, momentum = new, at_new, following


def _step(
    program: GatedProgram, y: Float, at_y: Float, dual: Float, gradient: Float, lipschitz: float
) -> tuple[Float, Float, float]:
    """One proximal step from ``y`` with the smallest tried constant that majorises the loss there."""
    lipschitz *= 0.95
    value = program.loss.value(at_y)
    while True:
        new = program.norm.prox(y + gradient / lipschitz, program.weight_decay / lipschitz)
        at_new = _outputs(program, new)
        model = value - np.vdot(dual, at_new - at_y) + 0.5 * lipschitz * np.sum((new - y) ** 2)
        if not program.loss.value(at_new) > model + 1e-14 * abs(value):
            return new, at_new, lipschitz
        lipschitz *= 1.5


def _outputs(program: GatedProgram, blocks: Float) -> Float:
    active = np.flatnonzero(blocks.any(axis=(1, 2)))
    return program.outputs(active, blocks[active])


def _squared_norm(program: GatedProgram) -> float:
    """Estimate of the squared norm of ``sqrt(w) o outputs`` by a few power iterations from the constant."""
    q, K = program.block_shape
    x = np.ones((program.n_gates, q, K)) / np.sqrt(program.n_gates * q * K)
    norm = 1.0
    for _ in range(6):
        image = program.correlations(program.loss.weights[:, None] * _outputs(program, x))
        norm = float(np.linalg.norm(image)) or 1.0
        x = image / norm
    return norm
