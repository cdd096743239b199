"""The nonzero blocks of the gated program, their stationarity, and linear systems with its derivative.

With ``s_i = S_i / ||S_i||`` and ``V = -grad L(F)`` the active blocks of an optimum solve
``weight_decay s_i = A' D_i V``. The derivative of these equations in the blocks is

    H = J' L'' J + weight_decay * diag((I - s_i s_i') / ||S_i||),     J S = sum_i D_i A S_i

With ``L'' = R R'``, ``E = diag(||S_i||)`` and ``p_i = R' D_i A s_i``, a system ``H u = g`` is solved through
``C = weight_decay I + R' J E J' R``, of the size of the data instead of the blocks (Woodbury):

    u_i = ||S_i|| (x_i - A' D_i R b) + t_i s_i,    weight_decay x_i = g_i - A' D_i R a,    C a = R' J E g,
    C b = sum_j t_j p_j,    sum_j <p_i, C^{-1} p_j> t_j = <s_i, x_i>.

The last matrix is singular if and only if the ``p_i`` are linearly dependent; the blocks are then not unique. With an
output bias without penalty ``R`` is followed by the projection that leaves out ``R'1``, and ``C^{-1}`` is the inverse
on its range.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np
from scipy.linalg.lapack import dpotrf, dpotrs

from convexbn._types import Bool, Float, Index
from convexbn.program.gated import GatedProgram, MaskedRows, block_norms
from convexbn.program.losses import SquaredLoss

_DEPENDENT = 1e-11  # eigenvalues of a matrix of unit diagonal below this are 0: the groups are dependent
_ENTERING = 1e-3  # length of a block that becomes active, relative to the longest


class ActiveGroups:
    """Nonzero blocks of a gated program.

    ``C`` is factorised at first use: ``n^3 / 3`` flops for the squared loss, whatever ``K``, else ``(n K)^3 / 3``.

    Parameters
    ----------
    program : GatedProgram
        With squared, logistic or cross-entropy loss.
    gate_index, blocks : ndarray (m,), (m, q, K)
        The active groups, in order.
    """

    def __init__(self, program: GatedProgram, gate_index: Index, blocks: Float) -> None:
        self.program, self.gate_index, self.blocks = program, gate_index, blocks
        self.operator = MaskedRows(program.operator.rows, program.operator.patterns[:, gate_index].astype(np.float64))
        self.lengths = block_norms(blocks)  # (m,)
        self.directions = blocks / self.lengths[:, None, None]  # s_i
        outputs = self.image(blocks)
        self.bias = program.loss.best_bias(outputs)
        self.outputs = outputs + self.bias  # F, (n, K)
        self.dual = program.loss.negative_gradient(outputs)  # V
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
        return self.operator.apply(None, blocks)

    def correlations(self, dual: Float) -> Float:
        """``J' V``."""
        return self.operator.adjoint(dual)

    def curved(self, change: Float) -> Float:
        """``L''`` of a change of the outputs, whose bias follows."""
        return self._root(self._root(change, transposed=True))

    def held_curved(self, change: Float) -> Float:
        """``L''`` of a change of the outputs with the bias held."""
        half = self._half
        columns = change.reshape(len(change), half.shape[1], -1)
        return (half @ (half.transpose(0, 2, 1) @ columns)).reshape(change.shape)

    def bias_change(self, total: Float) -> Float:
        """Change (K,) of the best bias if the sum ``1'V`` over the rows changes by ``total``; 0 without a bias."""
        if not self._constant.size:
            return np.zeros_like(total)
        curvature = (self._half @ self._half.transpose(0, 2, 1)).sum(axis=0)
        return (np.linalg.pinv(curvature, hermitian=True) @ total.reshape(len(curvature), -1)).ravel()

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
        loss, outputs = self.program.loss.without_bias, self.outputs
        if isinstance(loss, SquaredLoss):
            loss, outputs = replace(loss, targets=loss.targets[:, :1]), outputs[:, :1]
        return loss.hessian_root(outputs)

    @cached_property
    def _constant(self) -> Float:
        """Orthonormal basis of the range of ``R'1``, which an output bias takes: (n K, K), of no columns without."""
        n, K, _ = self._half.shape
        if self.program.loss is self.program.loss.without_bias:
            return np.zeros((n * K, 0))
        left, values, _ = np.linalg.svd(self._half.transpose(0, 2, 1).reshape(n * K, K), full_matrices=False)
        return left[:, values > _DEPENDENT * values[0]]

    @cached_property
    def _solved_constant(self) -> Float:
        return dpotrs(self._factor, self._constant, lower=1)[0]

    @cached_property
    def _factor(self) -> Float:
        """Cholesky factor of ``C``."""
        rows, opened, (n, K, _) = self.operator.rows, self.operator.patterns, self._half.shape
        kernel = (rows @ rows.T) * ((opened * self.lengths) @ opened.T)
        flat = self._half.transpose(0, 2, 1).reshape(n * K, K)
        C = ((flat @ flat.T).reshape(n, K, n, K) * kernel[:, None, :, None]).reshape(n * K, n * K)
        C[np.diag_indices(n * K)] += self.program.weight_decay
        factor, info = dpotrf(C.T, lower=1, clean=0, overwrite_a=1)
        if info:
            raise np.linalg.LinAlgError("the matrix of the active groups is not positive definite: raise weight_decay.")
        return factor

    @cached_property
    def _images(self) -> Float:
        """``p_i`` (m, n, K)."""
        images = self.operator.patterns.T[:, :, None] * (self.operator.rows @ self.directions)
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
        count, size = len(stacked), len(self._factor)
        copies = self.outputs.size // size
        columns = stacked.reshape(count, size, copies).transpose(1, 0, 2).reshape(size, count * copies)
        solved = dpotrs(self._factor, columns, lower=1)[0]
        inner = self._constant.T @ self._solved_constant
        solved -= self._solved_constant @ np.linalg.solve(inner, self._constant.T @ solved)
        return solved.reshape(size, count, copies).transpose(1, 0, 2).reshape(stacked.shape)

    def _root(self, change: Float, *, transposed: bool = False) -> Float:
        """``R``, or ``R'``, times changes of the outputs (..., n, K); those that ``L''`` treats alike are columns."""
        half = self._half.transpose(0, 2, 1) if transposed else self._half
        coupled = half.shape[1]
        columns = change.reshape(*change.shape[:-1], coupled, change.shape[-1] // coupled)
        found = self._without_constant(half @ columns) if transposed else half @ self._without_constant(columns)
        return found.reshape(change.shape)

    def _without_constant(self, columns: Float) -> Float:
        """Arrays (..., n, coupled, copies) without their part along ``R'1``."""
        flat = columns.reshape(*columns.shape[:-3], len(self._constant), columns.shape[-1])
        return (flat - self._constant @ (self._constant.T @ flat)).reshape(columns.shape)
