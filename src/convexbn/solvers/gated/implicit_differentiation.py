"""Derivatives of the optimum of the gated program, by implicit differentiation on its active groups.

At an optimum ``weight_decay s_i = A' D_i V`` on the active groups. A change of the data moves their blocks by
``-H^{-1}`` times the change of these equations, and leaves groups at zero there (implicit function theorem), as long as
all of their ``||A' D_i V||`` are below the weight decay. With ``u = H^{-1}`` of the derivative of a scalar in the
blocks, its derivatives are ``-<u, s>`` in the weight decay, ``J u`` in the targets of the squared loss, and
``sum_i D_i (V u_i' + W S_i')`` in the rows, with ``W`` its derivative in the outputs less ``L'' J u``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convexbn._types import Float, Index
from convexbn.program.gated import GateBlocks, GatedProgram
from convexbn.program.losses import SquaredLoss
from convexbn.solvers.gated.active_groups import ActiveGroups
from convexbn.solvers.gated.group_newton import GroupNewton
from convexbn.solvers.gated.subspace import Subspace

_TOLERANCES = (1e-4, 1e-8, 1e-11)  # of the solver, in turn, until the polished solution is optimal to _ACCURATE
_ACCURATE, _TOO_ROUGH = 1e-9, 1e-6  # relative residual to aim at, and beyond which derivatives are refused
_STEPS, _CONVERGED = 20, 1e-13  # most Newton steps, and the error that ends them
_ROUNDS, _SHORT = 6, 1e-7  # how often a group may enter, and the relative length below which it leaves first


@dataclass(frozen=True)
class Derivatives:
    """Derivatives of a scalar of the optimum in the rows (n, q) at fixed patterns, the targets and the weight decay."""

    rows: Float
    targets: Float
    weight_decay: float


@dataclass(frozen=True)
class Optimum:
    """An optimum of a gated program to the limits of float64, and its derivatives.

    Attributes
    ----------
    groups, residual : ActiveGroups, float
        Active blocks, and the largest violation of optimality relative to the weight decay, groups at zero included.
    margin : float
        Distance to a change of the active groups: the smallest ``1 - ||A' D_i V|| / weight_decay`` of a group at zero,
        or length of an active one relative to the longest. At 0 the derivatives are one-sided.
    """

    groups: ActiveGroups
    residual: float
    margin: float

    @property
    def gate_index(self) -> Index:
        """The active groups: (m,)."""
        return self.groups.gate_index

    @property
    def outputs(self) -> Float:
        """``F``, with the output bias if the loss has one: (n, K)."""
        return self.groups.outputs

    @property
    def bias(self) -> Float:
        """Output bias: (K,)."""
        return self.groups.bias

    @property
    def unique(self) -> bool:
        """Whether the optimal blocks are unique.

        If not, derivatives of the outputs hold while the same groups stay active; those of the blocks are the choice
        of least norm.
        """
        return self.groups.unique

    @property
    def blocks(self) -> Float:
        """Blocks of all gates: (P, q, K)."""
        program = self.groups.program
        blocks = np.zeros((program.n_gates, *program.block_shape))
        blocks[self.gate_index] = self.groups.blocks
        return blocks

    def pullback(self, *, outputs: Float | None = None, blocks: Float | None = None) -> Derivatives:
        """Derivatives of a scalar from those in the outputs (n, K) and in the blocks of all gates (P, q, K)."""
        groups, loss = self.groups, self.groups.program.loss.without_bias
        outputs = np.zeros_like(groups.outputs) if outputs is None else outputs
        by_bias = np.broadcast_to(groups.bias_change(outputs.sum(axis=0)), outputs.shape)
        outputs = outputs - groups.held_curved(by_bias)  # the best bias follows the outputs
        right = groups.correlations(outputs)
        u = groups.solve(right if blocks is None else right + blocks[self.gate_index])
        change = groups.image(u)
        shift = groups.bias_change(groups.held_curved(change).sum(axis=0))
        return Derivatives(
            rows=_in_rows(groups, u, groups.dual) + _in_rows(groups, groups.blocks, outputs - groups.curved(change)),
            targets=(loss.target_slope or 0.0) * loss.weights[:, None] * (change - shift + by_bias),
            weight_decay=-float(np.vdot(u, groups.directions)),
        )


def optimum_of(program: GatedProgram, start: Optimum | None = None) -> Optimum:
    """Solve a program to the limits of float64.

    Newton's method first tries the active groups of ``start``, if given, then those that a solver finds. Raises a
    TypeError for losses that are not twice differentiable, and a FloatingPointError if the optimality conditions are
    violated by more than 1e-6 of the weight decay.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> A, D, Y = rng.standard_normal((30, 4)), rng.random((30, 8)) < 0.5, rng.standard_normal((30, 1))
    >>> from convexbn.program.gated import gated_operator
    >>> optimum = optimum_of(GatedProgram(gated_operator(A, D), SquaredLoss(Y, np.ones(30)), 3.0))
    >>> optimum.gate_index
    array([0, 1, 2, 3, 4, 6])
    >>> optimum.pullback(outputs=np.ones((30, 1))).targets.shape
    (30, 1)
    """
    loss = program.loss.without_bias
    if loss.target_slope is None:
        name = type(loss).__name__
        raise TypeError(f"the optimum of {name} is not differentiated: take squared, logistic or cross-entropy loss.")
    blocks, method = None, GroupNewton if isinstance(loss, SquaredLoss) else Subspace
    if start is not None:
        blocks = GateBlocks(start.gate_index, start.groups.blocks)
        if (optimum := _polish(program, blocks)).residual <= _ACCURATE:
            return optimum
    for tol in _TOLERANCES:
        blocks = method(tol).solve(program, blocks).weights
        if (optimum := _polish(program, blocks)).residual <= _ACCURATE:
            return optimum
    if optimum.residual > _TOO_ROUGH:
        raise FloatingPointError(f"optimality is violated by {optimum.residual:.0e} (relative): raise weight_decay.")
    return optimum


def _polish(program: GatedProgram, blocks: GateBlocks) -> Optimum:
    """Newton's method on the active groups of a solution; groups that cannot stay at zero enter."""
    groups = ActiveGroups(program, blocks.gate_index, blocks.values)
    groups = groups.only(groups.lengths > _SHORT * groups.lengths.max(initial=0.0))
    for _ in range(_ROUNDS):
        groups = _stationary(groups)
        ratios = program.correlation_norms(groups.dual) / program.weight_decay
        ratios[groups.gate_index] = 0.0
        worst = int(ratios.argmax())
        slack = 1 - float(ratios[worst])
        if slack >= -_ACCURATE:
            break
        groups, last = groups.entered(worst), groups
    else:
        groups = last
    shortest = float(groups.lengths.min(initial=np.inf) / groups.lengths.max(initial=np.finfo(float).tiny))
    return Optimum(groups, residual=max(groups.error, -slack), margin=min(slack, shortest))


def _stationary(groups: ActiveGroups) -> ActiveGroups:
    """Newton steps as long as they reduce the error or the groups."""
    for _ in range(_STEPS):
        if groups.error <= _CONVERGED:
            break
        following = groups.newton_step()
        if following.error >= groups.error and len(following.gate_index) == len(groups.gate_index):
            break
        groups = following
    return groups


def _in_rows(groups: ActiveGroups, blocks: Float, dual: Float) -> Float:
    """``sum_i D_i dual S_i'``: the derivative of ``<dual, J S>`` in the rows, (n, q)."""
    m, q, K = blocks.shape
    return np.einsum("nqk,nk->nq", (groups.operator.patterns @ blocks.reshape(m, q * K)).reshape(-1, q, K), dual)
