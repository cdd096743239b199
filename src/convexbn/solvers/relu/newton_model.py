"""Local model of the balanced ReLU program at a network: a convex quadratic plus the hinges of its kinks.

    Phi(first, output) = L((A first)_+ output) + beta / 2 (||first||^2 + ||output||^2)

With the sides of all rows fixed, ``Phi`` is smooth, and its second derivative is ``J' L'' J`` plus one block a neuron,

    [[beta I, X_j], [X_j', beta I]],    X_j = -A' D_j V,    V = -grad L.

At a local minimum no singular value of ``X_j`` exceeds beta in the directions that the neuron may take. So cutting them
off at beta gives a convex model that is exact in the end. A row that changes sides where ``g = (V c_j)_i < 0`` meets a
convex kink, the hinge ``-g (a_i's_j)_+``; where ``g > 0`` the model only overestimates. Hinges enter when a step would
cross them, and the step solves the box program dual to the model:

    min over 0 <= theta <= w   1/2 ||L^{-1}(grad + E theta)||^2 - t'theta,      L L' the second derivative.

A leaving neuron has a hinge too: its norm, linear in the step, stays nonnegative.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.linalg

from convexbn._types import Bool, Float, Index, is_over
from convexbn.program.neurons import Neurons
from convexbn.program.relu import ReluProgram
from convexbn.solvers.box_qp import minimise_over_box

_RESTING = 1e-6  # response relative to ||a_i|| ||s_j|| below which a row rests on its kink
_NORM_WEIGHT = 100.0  # multiplier of a norm in units of weight_decay times the largest norm: more than any needs


class NewtonStep(NamedTuple):
    """Change of the network, relative change of the norms, and the decrease that the model predicts."""

    first: Float
    output: Float
    growth: Float
    predicted: float


class NewtonModel:
    """The model at one network.

    Parameters
    ----------
    program, neurons : ReluProgram, Neurons
        The program has one case a row; the neurons are balanced.
    damping : float
        Multiple of ``weight_decay`` added to the second derivative.
    """

    def __init__(self, program: ReluProgram, neurons: Neurons, damping: float) -> None:
        rows, loss, weight_decay = program.rows[:], program.loss, program.weight_decay
        self.rows, self.beta, self.neurons = rows, weight_decay, neurons
        self.response = rows @ neurons.first
        self.opened = self.response > 0
        self.hidden = np.maximum(self.response, 0)
        outputs = self.hidden @ neurons.output
        if program.fixed is not None:
            outputs = program.fixed + outputs
        dual = loss.negative_gradient(outputs)
        self.pull = dual @ neurons.output.T  # g, (n, m)
        self.size = np.linalg.norm(rows, axis=1)[:, None] * np.linalg.norm(neurons.first, axis=0)
        self.resting = (np.abs(self.response) <= _RESTING * self.size) & (self.pull < 0)
        #: Derivative of ``log ||s_j|| ||c_j||`` (m, q + K); balanced, so that either norm squared is their product.
        self.radial = np.hstack([neurons.first.T, neurons.output]) / neurons.norms[:, None]
        smooth_first = weight_decay * neurons.first - rows.T @ (self.opened * self.pull)
        smooth_output = weight_decay * neurons.output - self.hidden.T @ dual
        gradient = np.hstack([smooth_first.T, smooth_output])  # (m, q + K)
        hessian = loss.gauss_newton(outputs, self._derivative, gradient.size)
        self._add_blocks(hessian, dual, weight_decay * (1 + damping))
        self.factor = scipy.linalg.cholesky(hessian, lower=True, overwrite_a=True, check_finite=False)
        self.gradient = self._solve(gradient.ravel())

    def minimise(self, deadline: float | None = None) -> NewtonStep | None:
        """Minimiser of the model; None when it crosses more kinks than there are variables, or time is over."""
        m, q = len(self.radial), self.rows.shape[1]
        new, leaving = self.resting, np.zeros(m, dtype=bool)
        hinges = self._norms(leaving)
        for _ in range(15):
            if is_over(deadline) or len(hinges.offset) + np.count_nonzero(new) > self.gradient.size:
                return None
            hinges = hinges.joined(self._kinks(new)).joined(self._norms(leaving))
            hinges, z = hinges.solved(self.gradient, deadline)
            change = scipy.linalg.solve_triangular(self.factor, z, lower=True, trans=1, check_finite=False)
            change = change.reshape(m, -1)
            new, leaving = self._missing(hinges, change)
            if not new.any() and not leaving.any():
                break
        predicted = -float(self.gradient @ z + 0.5 * z @ z) - hinges.increase(z)
        return NewtonStep(change[:, :q].T, change[:, q:], np.sum(self.radial * change, axis=1), predicted)

    def _derivative(self, half: Float, part: slice) -> Float:
        """``R_i'`` times the derivative of the outputs of some rows in all weights: (rows, K, m, q + K)."""
        q = len(self.neurons.first)
        weighted = np.einsum("ilk,jl->ikj", half, self.neurons.output)  # R_i' c_j
        gated = self.opened[part][:, None, :, None] * self.rows[part][:, None, None, :]
        jacobian = np.empty((*weighted.shape, q + half.shape[1]))
        np.multiply(weighted[:, :, :, None], gated, out=jacobian[..., :q])
        jacobian[..., q:] = half.transpose(0, 2, 1)[:, :, None, :] * self.hidden[part][:, None, :, None]
        return jacobian

    def _add_blocks(self, hessian: Float, dual: Float, diagonal: float) -> None:
        """Add the diagonal and the blocks ``X_j``, without resting rows and with their singular values cut."""
        (q, m), K = self.neurons.first.shape, dual.shape[1]
        cross = np.stack([-self.rows.T @ (self.opened * dual[:, [k]]) for k in range(K)], axis=2).transpose(1, 0, 2)
        for j in np.flatnonzero(self.resting.any(axis=0)):
            face = self.rows[self.resting[:, j]]
            _, values, right = np.linalg.svd(face / np.linalg.norm(face, axis=1, keepdims=True), full_matrices=False)
            basis = right[values > 1e-7 * values[0]]
            cross[j] -= basis.T @ (basis @ cross[j])
        left, values, right = np.linalg.svd(cross, full_matrices=False)
        cut = (left * np.minimum(values, self.beta)[:, None, :]) @ right
        blocks = hessian.reshape(m, q + K, m, q + K)
        index = np.arange(m)
        blocks[index, :q, index, q:] += cut
        blocks[index, q:, index, :q] += cut.transpose(0, 2, 1)
        hessian.flat[:: len(hessian) + 1] += diagonal

    def _solve(self, right: Float) -> Float:
        return scipy.linalg.solve_triangular(self.factor, right, lower=True, check_finite=False)

    def _kinks(self, chosen: Bool) -> _Hinges:
        """Hinges ``-g (a_i's_j)_+`` of the chosen rows and neurons (n, m)."""
        i, j = np.nonzero(chosen)
        columns = np.zeros((*self.radial.shape, len(i)))
        columns[j, : self.rows.shape[1], np.arange(len(i))] = self.rows[i]
        columns = self._solve(columns.reshape(self.radial.size, -1))
        weight, opened = -self.pull[i, j], self.opened[i, j]
        label = i * len(self.radial) + j
        return _Hinges(columns, self.response[i, j], weight, opened, np.where(opened, weight, 0.0), label)

    def _norms(self, chosen: Bool) -> _Hinges:
        """Hinges of the chosen neurons' norms, ``-1 - growth <= 0``."""
        j = np.flatnonzero(chosen)
        columns = np.zeros((*self.radial.shape, len(j)))
        columns[j, :, np.arange(len(j))] = -self.radial[j]
        columns, norms = self._solve(columns.reshape(self.radial.size, -1)), self.beta * self.neurons.norms
        cap, closed = np.full(len(j), _NORM_WEIGHT * norms.max()), np.zeros(len(j), dtype=bool)
        return _Hinges(columns, np.full(len(j), -1.0), cap, closed, norms[j], -1 - j)

    def _missing(self, hinges: _Hinges, change: Float) -> tuple[Bool, Bool]:
        """Convex kinks and norms that a step crosses and the hinges lack."""
        ahead = self.response + self.rows @ change[:, : self.rows.shape[1]].T
        crossed = ((ahead > 0) != self.opened) & (self.pull < 0) & (np.abs(ahead) > 1e-9 * self.size)
        leaving = np.sum(self.radial * change, axis=1) < -1 - 1e-9
        crossed.flat[hinges.label[hinges.label >= 0]] = False
        leaving[-1 - hinges.label[hinges.label < 0]] = False
        return crossed, leaving


class _Hinges(NamedTuple):
    """Terms ``weight (offset + column'z)_+`` of the model, in the variable ``z = L'd``."""

    columns: Float  # (D, p)
    offset: Float
    weight: Float
    opened: Bool  # whose slope is in the gradient already
    theta: Float  # multipliers, 0 <= theta <= weight
    label: Index  # of a kink: its flat index; of a norm: -1 - j

    def joined(self, other: _Hinges) -> _Hinges:
        return _Hinges(*(np.concatenate(pair, axis=-1) for pair in zip(self, other, strict=True)))

    def solved(self, gradient: Float, deadline: float | None) -> tuple[_Hinges, Float]:
        """The multipliers of the minimiser, and the minimiser ``z``."""
        base = gradient - self.columns @ (self.weight * self.opened)
        if not len(self.offset):
            return self, -base
        gram = self.columns.T @ self.columns
        theta = minimise_over_box(gram, self.offset - self.columns.T @ base, self.weight, self.theta, deadline)
        return self._replace(theta=theta), -(base + self.columns @ theta)

    def increase(self, z: Float) -> float:
        """Value that the hinges add to the linear part of the model."""
        moved = self.columns.T @ z
        added = np.maximum(self.offset + moved, 0) - np.maximum(self.offset, 0) - self.opened * moved
        return float(self.weight @ added)
