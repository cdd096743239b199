"""The nonzero blocks of the gated program, their stationarity, and linear systems with its derivative.

With ``s_i = S_i / ||S_i||`` and ``V = -grad L(F)`` the active blocks of an optimum solve
``weight_decay s_i = A' D_i V``. The derivative of these equations in the blocks is

    H = J' L'' J + weight_decay * diag((I - s_i s_i') / ||S_i||),     J S = sum_i D_i A S_i

With ``L'' = R R'``, ``E = diag(||S_i||)`` and ``p_i = R' D_i A s_i``, a system ``H u = g`` is solved through
``C = weight_decay I + R' J E J' R``, of the size of the data instead of the blocks (Woodbury):

    u_i = ||S_i|| (x_i - A' D_i R b) + t_i s_i,    weight_decay x_i = g_i - A' D_i R a,    C a = R' J E g,
    C b = sum_j t_j p_j,    sum_j <p_i, C^{-1} p_j> t_j = <s_i, x_i>.

The last matrix is singular if and only if the ``p_i`` are linearly dependent; the blocks are then not unique.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np
import scipy.linalg

from convexbn._types import Bool, Float, Index
from convexbn.program.gated import GatedProgram, block_norms
from convexbn.program.losses import SquaredLoss

_DEPENDENT = 1e-11  # eigenvalues of a matrix of unit diagonal below this are 0: the groups are dependent
_ENTERING = 1e-3  # length of a block that becomes active, relative to the longest


class ActiveGroups:
    """Nonzero blocks of a gated program.

    Parameters
    ----------
    program : GatedProgram
        With squared, logistic or cross-entropy loss.
    gate_index : ndarray (m,)
        The active groups, in order.
    blocks : ndarray (m, q, K)

    Notes
    -----
    ``C`` is factorised at first use: ``n^3 / 3`` flops for the squared loss, whatever ``K``, and ``(n K)^3 / 3`` for
    others.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> A, D, Y = rng.standard_normal((30, 4)), rng.random((30, 8)) < 0.5, rng.standard_normal((30, 1))
    >>> from convexbn.program.gated import gated_operator
    >>> program = GatedProgram(gated_operator(A, D), SquaredLoss(Y, np.ones(30)), 1.0)
    >>> groups = ActiveGroups(program, np.arange(8), np.ones((8, 4, 1)))
    >>> for _ in range(12):
    ...     groups = groups.newton_step()
    >>> bool(groups.error < 1e-13)
    True
    """

    def __init__(self, program: GatedProgram, gate_index: Index, blocks: Float) -> None:
        self.program, self.gate_index, self.blocks = program, gate_index, blocks
        self.lengths = block_norms(blocks)  # (m,)
        self.directions = blocks / self.lengths[:, None, None]  # s_i
        self.outputs = self.image(blocks)  # F, (n, K)
        self.dual = program.loss.negative_gradient(self.outputs)  # V
        # derivative of the objective in the blocks, 0 at an optimum, and its largest norm relative to the weight decay
        self.slope = program.weight_decay * self.directions - self.correlations(self.dual)
        self.error = float(block_norms(self.slope).max(initial=0.0) / program.weight_decay)

    def only(self, kept: Bool) -> ActiveGroups:
        """The groups of a mask, with all others zero."""
        return self if kept.all() else ActiveGroups(self.program, self.gate_index[kept], self.blocks[kept])

    def entered(self, gate: int) -> ActiveGroups:
        """One more active group, with a short block along its correlation."""
        block = self.program.correlations(self.dual, np.array([gate]))
        block *= _ENTERING * self.lengths.max(initial=1.0) / np.linalg.norm(block)
        gates = np.r_[self.gate_index, gate]
        order = np.argsort(gates)
        return ActiveGroups(self.program, gates[order], np.concatenate([self.blocks, block])[order])

    def newton_step(self) -> ActiveGroups:
        """Newton's step for stationarity; a group that would change its sign leaves."""
        blocks = self.blocks - self.solve(self.slope)
        lengths = np.einsum("mqk,mqk->m", blocks, self.directions)
        # turn at the old length: a group that becomes short is not turned further for it
        turned = blocks + (self.lengths - lengths)[:, None, None] * self.directions
        scaled = (lengths / block_norms(turned))[:, None, None] * turned
        kept = lengths > 0
        return ActiveGroups(self.program, self.gate_index[kept], scaled[kept])

    def image(self, blocks: Float) -> Float:
        """``J S``: outputs of blocks on the active groups."""
        return self.program.outputs(self.gate_index, blocks)

    def correlations(self, dual: Float) -> Float:
        """``J' V``."""
        return self.program.correlations(dual, self.gate_index)

    def curved(self, change: Float) -> Float:
        """``L''`` of a change of the outputs."""
        return self._root(self._root(change, transposed=True))

    @property
    def unique(self) -> bool:
        """Whether no other blocks of these groups have the same outputs and penalty, to first order."""
        return bool((self._spectrum[1] > _DEPENDENT).all())

    def solve(self, right: Float) -> Float:
        """``H^{-1}`` of blocks (m, q, K), of least norm in the lengths of dependent groups."""
        longs = self.lengths[:, None, None]
        inner = self._solve_C(self._root(self.image(longs * right), transposed=True)[None])[0]
        first = (right - self.correlations(self._root(inner))) / self.program.weight_decay
        t = self._least_squares(np.einsum("mqk,mqk->m", self.directions, first))
        second = np.einsum("m,mnk->nk", t, self._solved_images)
        solved: Float = longs * (first - self.correlations(self._root(second)))
        return solved + t[:, None, None] * self.directions

    @cached_property
    def _half(self) -> Float:
        """``R`` (n, K, K), and (n, 1, 1) for the squared loss, which treats all outputs alike."""
        loss, outputs = self.program.loss, self.outputs
        if isinstance(loss, SquaredLoss):
            loss, outputs = replace(loss, targets=loss.targets[:, :1]), outputs[:, :1]
        return loss.hessian_root(outputs)

    @cached_property
    def _opened(self) -> Float:
        return self.program.operator.patterns[:, self.gate_index].astype(np.float64)

    @cached_property
    def _factor(self) -> tuple[Float, bool]:
        """Cholesky factor of ``C``."""
        rows, (n, K, _) = self.program.operator.rows, self._half.shape
        kernel = (rows @ rows.T) * ((self._opened * self.lengths) @ self._opened.T)
        flat = self._half.transpose(0, 2, 1).reshape(n * K, K)
        C = ((flat @ flat.T).reshape(n, K, n, K) * kernel[:, None, :, None]).reshape(n * K, n * K)
        C[np.diag_indices(n * K)] += self.program.weight_decay
        return scipy.linalg.cho_factor(C, lower=True, check_finite=False, overwrite_a=True)

    @cached_property
    def _images(self) -> Float:
        """``p_i`` (m, n, K)."""
        images = self._opened.T[:, :, None] * (self.program.operator.rows @ self.directions)
        return self._root(images, transposed=True)

    @cached_property
    def _solved_images(self) -> Float:
        return self._solve_C(self._images)

    @cached_property
    def _spectrum(self) -> tuple[Float, Float, Float]:
        """Scales, eigenvalues and eigenvectors of ``<p_i, C^{-1} p_j>``, scaled to a unit diagonal."""
        shape = len(self.gate_index), self.outputs.size
        gram = self._images.reshape(shape) @ self._solved_images.reshape(shape).T
        scales = 1 / np.sqrt(np.diagonal(gram))
        return scales, *np.linalg.eigh(gram * scales * scales[:, None])

    def _least_squares(self, right: Float) -> Float:
        """Solve with ``<p_i, C^{-1} p_j>``."""
        scales, values, vectors = self._spectrum
        inverse = np.divide(1, values, out=np.zeros_like(values), where=values > _DEPENDENT)
        return scales * (vectors @ (inverse * (vectors.T @ (scales * right))))

    def _solve_C(self, stacked: Float) -> Float:
        """``C^{-1}`` of arrays (count, n, K): rows and outputs that ``L''`` couples are one index, others columns."""
        count, (size, _) = len(stacked), self._factor[0].shape
        copies = self.outputs.size // size
        columns = stacked.reshape(count, size, copies).transpose(1, 0, 2).reshape(size, count * copies)
        solved: Float = scipy.linalg.cho_solve(self._factor, columns, check_finite=False)
        return solved.reshape(size, count, copies).transpose(1, 0, 2).reshape(stacked.shape)

    def _root(self, change: Float, *, transposed: bool = False) -> Float:
        """``R``, or ``R'``, times changes of the outputs (..., n, K); those that ``L''`` treats alike are columns."""
        half = self._half.transpose(0, 2, 1) if transposed else self._half
        coupled = half.shape[1]
        columns = change.reshape(*change.shape[:-1], coupled, change.shape[-1] // coupled)
        return (half @ columns).reshape(change.shape)
