"""Gated programs with a known optimum: draw a dual point and complementary blocks, build the targets around them.

For any loss the optimum is the pair ``F = sum_i D_i A S_i``, ``V = -grad L(F)`` with ``||A' D_i V|| <= beta``,
and ``A' D_i V = beta S_i / ||S_i||`` on the active gates. Draw ``V``, set beta to the largest correlation among
chosen gates, put blocks along those correlations, and solve ``V = -grad L(F)`` for the targets.
"""

from dataclasses import dataclass

import numpy as np

from convexbn.data.whitening import whiten
from convexbn.program.gated import GatedProgram, block_norms, gated_operator
from convexbn.program.gates import first_of_each_pattern, gate_patterns, sample_gates
from convexbn.program.losses import LOSSES


@dataclass(frozen=True)
class Planted:
    """A program, the raw rows and gates it came from, and its optimum."""

    program: GatedProgram
    X: np.ndarray
    gates: np.ndarray
    offsets: np.ndarray
    whitening: object
    gate_index: np.ndarray
    blocks: np.ndarray
    objective: float


def planted(n=40, d=5, K=1, n_gates=30, n_active=1, loss="squared", weights=None, scale=1.0, seed=0):
    """Draw a planted program; with ``n_active`` gates the dual point is made to touch all of them."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)) * scale
    weights = np.ones(n) if weights is None else weights
    whitening = whiten(X, weights)
    gates, offsets = sample_gates("whitened", n_gates, whitening, np.random.RandomState(seed))
    patterns = gate_patterns(X, whitening.mean, gates, offsets)
    kept = first_of_each_pattern(patterns)
    gates, offsets, patterns = gates[:, kept], offsets[kept], patterns[:, kept]
    program = GatedProgram(gated_operator(whitening.rows, patterns), LOSSES[loss](np.zeros((n, K)), weights), 1.0)
    dual = weights[:, None] * _direction(rng, (n, K), loss)
    dual, active, beta = _touching(program, dual, n_active)
    correlations = program.correlations(dual, active)
    sizes = rng.uniform(0.5, 2.0, len(active)) * np.sqrt(weights.sum())
    blocks = sizes[:, None, None] * correlations / beta
    outputs = program.outputs(active, blocks)
    if loss == "squared_hinge":  # between the margins: beyond them a label pulls one way only
        shrunk = 0.5 / np.abs(outputs).max()
        blocks, outputs = shrunk * blocks, shrunk * outputs
    targets = _targets(outputs, dual / weights[:, None], loss)
    program = GatedProgram(gated_operator(whitening.rows, patterns), LOSSES[loss](targets, weights), beta)
    objective = program.loss.value(outputs) + beta * block_norms(blocks).sum()
    return Planted(program, X, gates, offsets, whitening, active, blocks, objective)


def _direction(rng, shape, loss):
    if loss == "squared":
        return rng.standard_normal(shape)
    if loss == "huber":
        return np.clip(2 * rng.standard_normal(shape), -1, 1)  # six of ten rows are where it is linear
    if loss in ("squared_hinge", "logistic"):
        return rng.uniform(-0.4, 0.4, shape)
    V = rng.uniform(-0.05, 0.05, shape)
    return V - V.mean(axis=1, keepdims=True)  # rows of the softmax dual sum to 0


def _touching(program, dual, n_active):
    """Move the dual point until ``n_active`` gates share the largest correlation: Newton on their norms."""
    norms = program.correlation_norms(dual)
    active = np.sort(np.argsort(-norms)[:n_active])
    target = norms.max() if n_active == 1 else 2 * norms.max()
    for _ in range(50):
        blocks = program.correlations(dual, active)
        norms = block_norms(blocks)
        gap = target - norms
        if np.abs(gap).max() < 1e-15 * target:
            break
        # gradient of ||A'D_i V|| with respect to V is D_i A (A'D_i V) / ||.||
        rises = np.stack([program.outputs(active[[j]], blocks[[j]] / norms[j]) for j in range(len(active))])
        gram = np.einsum("ink,jnk->ij", rises, rises)
        dual = dual + np.einsum("j,jnk->nk", np.linalg.solve(gram, gap), rises)
    norms = program.correlation_norms(dual)
    assert norms.max() <= norms[active].min() * (1 + 1e-12), "another gate overtook; take another seed"
    return dual, active, float(norms.max())


def _targets(outputs, slope, loss):
    """Targets for which ``-grad l(F)`` is the slope: soft labels for the losses of classes."""
    if loss in ("squared", "squared_hinge"):
        return outputs + slope
    if loss == "huber":
        return outputs + np.where(np.abs(slope) > 1 - 1e-12, 3.0, 1.0) * slope
    if loss == "logistic":
        return 2 * slope + np.tanh(0.5 * outputs)
    exponentials = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    return slope + exponentials / exponentials.sum(axis=1, keepdims=True)
