"""Accelerated proximal gradient for the gated program: any smooth loss, any number of rows.

FISTA (Beck and Teboulle 2009) with a step that adapts both ways and restarts of the momentum when it points uphill
(O'Donoghue and Candes 2015). One iteration costs one pair of matrix products, ``4 n q P K`` flops; the dual bound comes
free with the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convexbn._types import Float
from convexbn.program.gated import GateBlocks, GatedProgram
from convexbn.solvers.base import Budget, Progress, Solution, Solver, nonzero, zero_solution


@dataclass(frozen=True)
class Proximal(Solver[GatedProgram, GateBlocks]):
    """Accelerated proximal gradient with adaptive step and restart.

    Parameters
    ----------
    tol, max_iter : float, int
        Relative duality gap to reach, and largest number of iterations.
    """

    tol: float = 1e-6
    max_iter: int = 5000

    def _solve(
        self, program: GatedProgram, start: GateBlocks | None, budget: Budget, rng: np.random.Generator
    ) -> Solution[GateBlocks]:
        if (zero := zero_solution(program, budget)) is not None:
            return zero
        loss, beta = program.loss, program.weight_decay
        x = np.zeros((program.n_gates, *program.block_shape))
        if start is not None:
            x[start.gate_index] = start.values
        at_x = program.outputs(*nonzero(x))
        y, at_y, momentum = x, at_x, 1.0
        lipschitz, bound = loss.without_bias.curvature * _squared_norm(program), -np.inf
        history: list[Progress] = []
        while True:
            dual = loss.negative_gradient(at_y)
            gradient = program.correlations(dual)
            feasible = min(1.0, beta / max(program.norm.dual(gradient).max(), np.finfo(float).tiny))
            bound = max(bound, loss.dual_value(feasible * dual))
            new, at_new, lipschitz = _step(program, y, at_y, dual, gradient, lipschitz)
            objective = loss.value(at_new) + beta * float(program.norm.of(new).sum())
            active = nonzero(new)
            history.append(Progress(len(history) + 1, objective, bound, len(active.gate_index)))
            # the certificate takes its dual point at the new outputs: leave it room
            if reason := budget.stop_reason(history[-1], tol=0.2 * self.tol, max_iter=self.max_iter):
                return Solution(active, reason, history)
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
        at_new = program.outputs(*nonzero(new))
        model = value - np.vdot(dual, at_new - at_y) + 0.5 * lipschitz * np.sum((new - y) ** 2)
        if not program.loss.value(at_new) > model + 1e-14 * abs(value):
            return new, at_new, lipschitz
        lipschitz *= 1.5


def _squared_norm(program: GatedProgram) -> float:
    """Estimate of the squared norm of ``sqrt(w) o outputs`` by a few power iterations from the constant."""
    q, K = program.block_shape
    x = np.ones((program.n_gates, q, K)) / np.sqrt(program.n_gates * q * K)
    norm = 1.0
    for _ in range(6):
        image = program.correlations(program.loss.weights[:, None] * program.outputs(*nonzero(x)))
        norm = float(np.linalg.norm(image)) or 1.0
        x = image / norm
    return norm
