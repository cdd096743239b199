"""Derivatives of the optimum of the gated program, by implicit differentiation on its active groups.

At an optimum ``weight_decay s_i = A' D_i V`` on the active groups. Another question moves their blocks by ``-H^{-1}``
times the change of these equations, and leaves the groups at zero where they are (implicit function theorem), as long
as every ``||A' D_i V||`` of those is below the weight decay. With ``u = H^{-1}`` of the derivative of a scalar in the
blocks, its derivatives are ``-<u, s>`` in the weight decay, ``J u`` in the targets of the squared loss, and
``sum_i D_i (V u_i' + W S_i')`` in the rows, ``W`` being its derivative in the outputs less ``L'' J u``.
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

#: Relative gaps to which a solver is asked, in turn, until the polished solution is optimal to `_ACCURATE`.
_TOLERANCES = (1e-4, 1e-8, 1e-11)

#: Relative residual that derivatives may rest on, and that beyond which there are none.
_ACCURATE, _TOO_ROUGH = 1e-9, 1e-6

#: Newton steps that bring a solution to the limits of float64, and the error that needs no more.
_STEPS, _CONVERGED = 20, 1e-13

#: How often a group may enter, and the length relative to the longest below which it leaves first.
_ROUNDS, _SHORT = 6, 1e-7


@dataclass(frozen=True)
class Derivatives:
    """Derivatives of a scalar of the optimum.

    Attributes
    ----------
    rows : ndarray (n, q)
        In the whitened rows, patterns held.
    targets : ndarray (n, K)
        In the targets.
    weight_decay : float
        In the weight decay.
    """

    rows: Float
    targets: Float
    weight_decay: float


@dataclass(frozen=True)
class Optimum:
    """An optimum of a gated program to the limits of float64, and its derivatives.

    Attributes
    ----------
    groups : ActiveGroups
        Its blocks, and the factor that serves all derivatives.
    residual : float
        Largest violation of the optimality conditions, relative to the weight decay, groups at zero included.
    margin : float
        How far the active groups are from changing: the smallest ``1 - ||A' D_i V|| / weight_decay`` of a group at
        zero, or length of an active one relative to the longest. At 0 the derivatives are those of one side.
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
        """``F``: (n, K)."""
        return self.groups.outputs

    @property
    def unique(self) -> bool:
        """Whether the blocks are the only ones.

        Otherwise derivatives of the outputs are right as long as the same groups stay active, and those of the blocks
        are one choice of many, of least norm.
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
        """Derivatives of a scalar, given those in the outputs (n, K) and in the blocks of all gates (P, q, K)."""
        groups, loss = self.groups, self.groups.program.loss
        outputs = np.zeros_like(groups.outputs) if outputs is None else outputs
        right = groups.correlations(outputs)
        u = groups.solve(right if blocks is None else right + blocks[self.gate_index])
        change = groups.image(u)
        return Derivatives(
            rows=_in_rows(groups, u, groups.dual) + _in_rows(groups, groups.blocks, outputs - groups.curved(change)),
            targets=(loss.target_slope or 0.0) * loss.weights[:, None] * change,
            weight_decay=-float(np.vdot(u, groups.directions)),
        )


def optimum_of(program: GatedProgram, start: Optimum | None = None) -> Optimum:
    """Solve a program to the limits of float64, from another optimum where there is one.

    Newton's method on the groups of the start is tried first, then on those that a solver finds.

    Raises
    ------
    TypeError
        For losses without a second derivative everywhere.
    FloatingPointError
        When the optimality conditions are violated by more than 1e-6 of the weight decay.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> A, D, Y = rng.standard_normal((30, 4)), rng.random((30, 8)) < 0.5, rng.standard_normal((30, 1))
    >>> optimum = optimum_of(GatedProgram(gated_operator(A, D), SquaredLoss(Y, np.ones(30)), 3.0))
    >>> optimum.gate_index
    array([0, 1, 2, 3, 4, 6])
    >>> optimum.pullback(outputs=np.ones((30, 1))).targets.shape
    (30, 1)
    """
    if program.loss.target_slope is None:
        name = type(program.loss).__name__
        raise TypeError(f"the optimum of {name} is not differentiated: take squared, logistic or cross-entropy loss.")
    blocks = None
    if start is not None:
        blocks = GateBlocks(start.gate_index, start.groups.blocks)
        optimum = _polished(program, blocks)
        if optimum.residual <= _ACCURATE:
            return optimum
    for tol in _TOLERANCES:
        solver = GroupNewton(tol) if isinstance(program.loss, SquaredLoss) else Subspace(tol)
        blocks = solver.solve(program, blocks).weights
        optimum = _polished(program, blocks)
        if optimum.residual <= _ACCURATE:
            return optimum
    if optimum.residual > _TOO_ROUGH:
        raise FloatingPointError(
            f"the optimality conditions are violated by {optimum.residual:.1e} of the weight decay, too much to "
            "differentiate: raise weight_decay."
        )
    return optimum


def _polished(program: GatedProgram, blocks: GateBlocks) -> Optimum:
    """Newton on the groups of a solution; one that cannot stay at zero enters."""
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
    """Newton steps as long as they help."""
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
    opened = groups.program.operator.patterns[:, groups.gate_index].astype(np.float64)
    return np.einsum("nqk,nk->nq", (opened @ blocks.reshape(m, q * K)).reshape(-1, q, K), dual)
