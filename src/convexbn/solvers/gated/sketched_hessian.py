"""The Hessian of a gated program estimated from some of its rows, and its inverse.

With weights ``p_i = weight_decay / ||S_i||`` of the penalty and curvatures ``h_n`` of the loss, one an output, the
blocks have the Hessian ``sum_n h_n (m_n m_n') x (a_n a_n') + diag(p) x I``, where ``m_n`` and ``a_n`` are the rows of
the patterns and of ``A``. Rows drawn by leverage estimate the sum, whose rank is far beyond their number. So the
estimate is shrunk towards ``G x I`` with ``G = sum_n h_n |a_n|^2 / q m_n m_n'``, the sum for independent patterns and
rows, and towards its mean diagonal:

    B x I + T'T,   B = diag(p + mean(diag G)) + COMMON G,   T = rows sqrt(SKETCH h_n) m_n x a_n of the sample.

By the Woodbury identity the inverse takes one matrix of the size of ``B``, one of the size of the sample, and a product
with the sample's rows both ways.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg

from convexbn._types import Float, FloatMatrix, Index
from convexbn.data.blocks import BlockSize
from convexbn.program.gated import GatedProgram, MaskedRows
from convexbn.program.gauss_newton import sum_of_squares
from convexbn.program.losses import Loss
from convexbn.program.output_bias import eliminated

#: Shares of the sample and of the independent estimate: those of smallest gap after 15 and 30 iterations among a dozen.
_SKETCH, _COMMON = 0.5, 0.1
_PER_COLUMN = 10  # fewest rows per column of the Hessian in factors
_SMALLEST = 500  # programs with up to so many rows are not sampled
_BLOCK_ENTRIES = 1 << 20  # entries of the second derivatives that are formed at a time


@dataclass(frozen=True)
class SketchedHessian:
    """Approximate Hessian of the blocks at a point, and its inverse; made by ``at``."""

    scaled: MaskedRows  # on the rows of T
    base_inverse: FloatMatrix  # of B, (P, P)
    factor: tuple[FloatMatrix, bool]  # Cholesky factor of I + T (B x I)^{-1} T'

    @classmethod
    def at(cls, program: GatedProgram, penalty: Float, outputs: Float, rng: np.random.Generator) -> SketchedHessian:
        """Estimate the Hessian at a point, in the precision of the program's rows.

        Parameters
        ----------
        program, rng : GatedProgram, numpy.random.Generator
            The generator draws the rows.
        penalty, outputs : ndarray (P,), (n, K)
            Weights ``p`` of the penalty, and the outputs at the point.
        """
        part, there = _sample(program, outputs, sample_size(program), rng)
        A, dtype = part.operator.rows, part.operator.rows.dtype
        gates, curvature = part.operator.patterns.astype(dtype), row_curvature(part.loss, there)
        base = np.diag(penalty)
        if len(A) < len(program.operator.rows):
            leverage = curvature * np.einsum("nq,nq->n", A, A) / A.shape[1]
            independent = (gates.T * leverage.astype(dtype)) @ gates
            base += np.trace(independent) / len(base) * np.eye(len(base)) + _COMMON * independent
            curvature *= _SKETCH
        inverse = np.linalg.inv(base).astype(dtype)
        rows = np.sqrt(curvature).astype(dtype)[:, None] * A
        capacity = gates @ inverse @ gates.T
        capacity *= rows @ rows.T
        # the identity, and what rounding may take from a singular product
        capacity[np.diag_indices(len(capacity))] += 1 + len(capacity) * np.finfo(dtype).eps * capacity.diagonal().max()
        factor = scipy.linalg.cho_factor(capacity, lower=True, overwrite_a=True, check_finite=False)
        return cls(replace(part.operator, rows=rows), inverse, factor)

    def solve(self, blocks: FloatMatrix) -> FloatMatrix:
        """The inverse applied to blocks (P, q, K)."""
        first = self._apply_base(blocks)
        seen = self.scaled.apply(None, first)
        seen = scipy.linalg.cho_solve(self.factor, seen, check_finite=False)
        return first - self._apply_base(self.scaled.adjoint(seen))

    def _apply_base(self, blocks: FloatMatrix) -> FloatMatrix:
        flat = blocks.astype(self.base_inverse.dtype, copy=False).reshape(len(blocks), -1)
        return (self.base_inverse @ flat).reshape(blocks.shape)


def factor_hessian(
    program: GatedProgram, gate_index: Index, blocks: Float, outputs: Float, rng: np.random.Generator
) -> Float:
    """Hessian of the loss in factors of blocks, ``S_i -> z_i S_i``, estimated from rows: (m, m).

    It takes more rows than columns, and as many as cost no more than a product with the blocks.

    Parameters
    ----------
    program, rng : GatedProgram, numpy.random.Generator
        The generator draws the rows.
    gate_index, blocks, outputs : ndarray (m,), (m, q, K), (n, K)
    """
    (q, K), n, m = program.block_shape, len(program.operator.rows), len(blocks)
    part, there = _sample(program, outputs, min(n, max(_SMALLEST, n * q // m, _PER_COLUMN * m // K)), rng)
    A, D, dtype = part.operator.rows, part.operator.patterns, part.operator.rows.dtype
    exponent = np.frexp(np.abs(blocks).max())[1]  # into the range of float32
    stacked = np.ldexp(blocks, -exponent).transpose(1, 2, 0).reshape(q, -1).astype(dtype)

    def derivative(half: Float, rows: slice) -> FloatMatrix:
        change = (A[rows] @ stacked).reshape(-1, K, m)
        change *= D[rows][:, None, gate_index]
        return half.astype(dtype).transpose(0, 2, 1) @ change

    root = part.loss.hessian_root(there)
    if program.loss is program.loss.without_bias:
        return np.ldexp(sum_of_squares(root, derivative, m), 2 * exponent)
    return np.ldexp(eliminated(root, derivative, m, program.loss.bias_decay), 2 * exponent)


def sample_size(program: GatedProgram) -> int:
    """Number of rows of the preconditioner: a factorisation costs no more than an iteration or two."""
    (q, K), n = program.block_shape, len(program.operator.rows)
    return min(n, max(_SMALLEST, int((2.0 * n * q * program.n_gates * K) ** (1 / 3))))


def _sample(program: GatedProgram, outputs: Float, count: int, rng: np.random.Generator) -> tuple[GatedProgram, Float]:
    """The program on rows drawn in part by leverage, each weighted by the rows it stands for, and its outputs."""
    operator, n, loss = program.operator, len(outputs), program.loss.without_bias
    if count >= n:
        return replace(program, loss=loss), outputs
    leverage = row_curvature(loss, outputs) * np.einsum("nq,nq->n", operator.rows, operator.rows)
    total = leverage.sum()
    if not total > 0:  # a loss that is linear or zero on all rows
        leverage, total = np.ones(n), float(n)
    chances = 0.5 * leverage / total + 0.5 / n
    index, times = np.unique(rng.choice(n, count, p=chances), return_counts=True)
    weights = program.loss.weights[index] * times / (count * chances[index])
    part = replace(operator, rows=operator.rows[index], patterns=operator.patterns[index])
    return replace(program, operator=part, loss=loss.reweighted(index, weights)), outputs[index]


def row_curvature(loss: Loss, outputs: Float) -> Float:
    """Mean second derivative of every row's loss over the outputs: (n,)."""
    n, K = outputs.shape
    curvature = np.empty(n)
    for part in BlockSize(K * K, _BLOCK_ENTRIES).slices(n):
        half = loss.of_rows(part).hessian_root(outputs[part])
        curvature[part] = np.einsum("nkl,nkl->n", half, half) / K
    return curvature
