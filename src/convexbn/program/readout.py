"""Readouts: how the output layer, and with it the loss, sees the hidden units of a case.

A case is a term of the loss. A dense network has one row per case. A convolutional network has a row for each of the
``Kp`` patches of an image, which pooling reduces to ``R`` regions: ``F_i = sum_j sum_r pooled_irj c_jr`` with an output
layer (m, R K). Global pooling is ``R = 1``; a flattened layer has a region for every location (mathematics, section 3).
"""

# ruff: noqa: D102  (base classes document the methods)

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from array_api_compat import device

from convexbn._types import Float, FloatMatrix, Index
from convexbn.data.convolution import Convolution
from convexbn.data.kernels import like, namespace
from convexbn.data.pooling import Regions
from convexbn.program.gauss_newton import Derivative, sum_of_squares
from convexbn.program.losses import Loss
from convexbn.program.output_bias import eliminated

#: Relative difference up to which entries of a dual point are one number spread over a region.
_SPREAD = 1e-12

_NOT_LINEAR = "max pooling is not linear in the rows of an image: this solver takes average pooling."


@dataclass(frozen=True)
class Readout:
    """Readout of dense networks, where each row is a case: the output layer sees the hidden units as they are."""

    #: Whether pooling is a matrix on the rows of a case.
    linear: ClassVar[bool] = True

    @property
    def rows_per_case(self) -> int:
        """Number of consecutive rows of a case; blocks of rows hold whole cases."""
        return 1

    @property
    def n_regions(self) -> int:
        """Numbers ``R`` that the output layer sees of every neuron."""
        return 1

    @property
    def norm(self) -> float:
        """Upper bound of ``||pooled units|| / ||hidden units||``."""
        return 1.0

    def pool(self, hidden: FloatMatrix) -> FloatMatrix:
        """Hidden units (N, m) as the output layer sees them, region by region: (n, R m)."""
        return hidden

    def unpool(self, gradient: FloatMatrix, hidden: FloatMatrix) -> FloatMatrix:
        """Gradient by the hidden units (N, m) from the gradient by the pooled ones (n, R m)."""
        return gradient

    def by_region(self, output: FloatMatrix) -> FloatMatrix:
        """Output layer (m, R K), one row per neuron, as a matrix (R m, K) on the pooled units."""
        if (R := self.n_regions) == 1:
            return output
        m, K = len(output), output.shape[1] // R
        return output.reshape(m, R, K).swapaxes(0, 1).reshape(R * m, K)

    def by_neuron(self, regional: FloatMatrix) -> FloatMatrix:
        """Inverse of ``by_region``: (R m, K) as (m, R K)."""
        if (R := self.n_regions) == 1:
            return regional
        m, K = len(regional) // R, regional.shape[1]
        return regional.reshape(R, m, K).swapaxes(0, 1).reshape(m, R * K)

    def outputs(self, hidden: FloatMatrix, output: FloatMatrix) -> FloatMatrix:
        """Outputs (n, K) of hidden units (N, m) and an output layer (m, R K)."""
        return self.pool(hidden) @ self.by_region(output)

    def gather(self, outputs: FloatMatrix) -> FloatMatrix:
        """Outputs (n, K) of the cases from the outputs (N, R K) of their rows, for a linear readout."""
        return outputs

    def spread(self, dual: FloatMatrix) -> FloatMatrix:
        """Adjoint of ``gather``: a dual point (n, K) on the rows, (N, R K), or on groups of them, (n R, R K)."""
        return dual

    def arranged(self, rows: Float) -> Float:
        """Rows (N, q) as they are, or in the groups (n R, G, q) over which hidden units are maxima."""
        return rows

    def row_weights(self, weights: Float) -> Float:
        """Weights (N,) of the rows from the weights (n,) of the cases."""
        return np.repeat(weights, self.rows_per_case)

    def composed(self, loss: Loss) -> Loss:
        """Loss as a function of the outputs of the rows, for a linear readout."""
        return loss


@dataclass(frozen=True)
class Pooling(Readout):
    """Base of readouts that reduce the patches of an image to regions."""

    regions: Regions

    @property
    def rows_per_case(self) -> int:
        return self.regions.n_locations

    @property
    def n_regions(self) -> int:
        return self.regions.n_regions

    def _flat(self, pooled: FloatMatrix) -> FloatMatrix:
        return pooled.reshape(len(pooled), self.n_regions * pooled.shape[-1])

    def _in_regions(self, gradient: FloatMatrix) -> FloatMatrix:
        return gradient.reshape(len(gradient), self.n_regions, gradient.shape[1] // self.n_regions)


@dataclass(frozen=True)
class AveragePooling(Pooling):
    """Averages over regions: a matrix ``T`` (R, Kp) on the rows of an image.

    Examples
    --------
    >>> AveragePooling(Regions((1, 4), (1, 2))).pool(np.array([[1.0], [3], [5], [9]]))
    array([[2., 7.]])
    """

    @functools.cached_property
    def norm(self) -> float:
        """Norm of ``T``, rounded upwards."""
        return float(np.linalg.norm(self.regions.averages, 2)) * (1 + 1e-12)

    def pool(self, hidden: FloatMatrix) -> FloatMatrix:
        images = self.regions.by_image(hidden)
        if self.regions.flattened:
            return self._flat(images)
        if self.regions.equal:
            cells = self.regions.in_cells(images)
            return self._flat(namespace(hidden).sum(cells, axis=(2, 4)) / (cells.shape[2] * cells.shape[4]))
        return self._flat(like(hidden, self.regions.averages) @ images)

    def unpool(self, gradient: FloatMatrix, hidden: FloatMatrix) -> FloatMatrix:
        if self.regions.flattened:
            return gradient.reshape(hidden.shape)
        if self.regions.equal:
            cells = self.regions.in_cells(self.regions.by_image(hidden))
            by_cell = gradient.reshape(len(cells), cells.shape[1], 1, cells.shape[3], 1, cells.shape[5])
            xp = namespace(gradient)
            return xp.broadcast_to(by_cell / (cells.shape[2] * cells.shape[4]), cells.shape).reshape(hidden.shape)
        by_image: FloatMatrix = like(gradient, self.regions.averages).T @ self._in_regions(gradient)
        return by_image.reshape(hidden.shape)

    def gather(self, outputs: FloatMatrix) -> FloatMatrix:
        """``F_i = sum_r sum_k T_rk G_(ik),r`` of outputs ``G`` (n Kp, R K) of the rows: (n, K)."""
        images = outputs.reshape(-1, self.rows_per_case, self.n_regions, outputs.shape[1] // self.n_regions)
        return np.einsum("rk,nkrc->nc", self.regions.averages, images, optimize=True)

    def spread(self, dual: FloatMatrix) -> FloatMatrix:
        """``T'V`` (n Kp, R K) of a dual point (n, K)."""
        spread: FloatMatrix = np.einsum("rk,nc->nkrc", self.regions.averages, dual)
        return spread.reshape(len(dual) * self.rows_per_case, -1)

    def composed(self, loss: Loss) -> Loss:
        """``L(T G)`` as a loss of the outputs ``G`` of patches."""
        n, K = loss.targets.shape
        targets = np.broadcast_to(0.0, (n * self.rows_per_case, self.n_regions * K))
        return ComposedLoss(targets, self.row_weights(loss.weights), cases=loss, readout=self)


@dataclass(frozen=True)
class MaxPooling(Pooling):
    """Maxima over regions, which are not linear in the rows of an image.

    Examples
    --------
    >>> MaxPooling(Regions((1, 4), (1, 2))).pool(np.array([[1.0], [3], [5], [9]]))
    array([[3., 9.]])
    """

    linear: ClassVar[bool] = False

    @functools.cached_property
    def norm(self) -> float:
        """Root of the largest number of regions that a location belongs to, rounded upwards."""
        return float(np.sqrt(self.regions.members.sum(axis=0).max())) * (1 + 1e-12)

    def pool(self, hidden: FloatMatrix) -> FloatMatrix:
        images, xp = self.regions.by_image(hidden), namespace(hidden)
        if self.regions.equal:
            return self._flat(xp.max(self.regions.in_cells(images), axis=(2, 4)))
        return self._flat(xp.max(images[:, self.regions.groups], axis=2))

    def unpool(self, gradient: FloatMatrix, hidden: FloatMatrix) -> FloatMatrix:
        """Gradient by the hidden units (n Kp, m); a maximum that several locations attain gives it to the first."""
        images = self.regions.by_image(hidden)
        if self.regions.equal:
            cells = self.regions.in_cells(images)
            by_cell = gradient.reshape(len(cells), cells.shape[1], 1, cells.shape[3], 1, cells.shape[5])
            return _to_the_first(by_cell, cells).reshape(hidden.shape)
        xp, pooled = namespace(hidden), self._in_regions(gradient)
        by_image, places = xp.zeros_like(images), xp.arange(images.shape[1], device=device(images))
        for r, inside in enumerate(self.regions.members):
            first = places[inside][xp.argmax(images[:, inside], axis=1)]
            by_image += (places[None, :, None] == first[:, None, :]) * pooled[:, r, None, :]
        return by_image.reshape(hidden.shape)

    def gather(self, outputs: FloatMatrix) -> FloatMatrix:
        raise TypeError(_NOT_LINEAR)

    def spread(self, dual: FloatMatrix) -> FloatMatrix:
        """Dual point (n, K) on the groups, (n R, R K): each region has outputs of its own."""
        R, (n, K) = self.n_regions, dual.shape
        grouped: FloatMatrix = np.einsum("rs,nc->nrsc", np.eye(R), dual)
        return grouped.reshape(n * R, R * K)

    def arranged(self, rows: Float) -> Float:
        images, groups = self.regions.by_image(rows), self.regions.groups
        return images[:, groups].reshape(-1, groups.shape[1], rows.shape[1])

    def composed(self, loss: Loss) -> Loss:
        raise TypeError(_NOT_LINEAR)


@dataclass(frozen=True)
class ComposedLoss(Loss):
    """``L(T G)`` for outputs ``G`` of patches, by a linear readout ``T``; convex in ``G``.

    Its negative gradient is ``T'V`` with that of ``L``, and its dual value is that of ``V``, so that program, solvers
    and bounds are those of dense data. Targets are zeros (N, R K), weights those of the rows; ``cases`` is ``L``.

    Examples
    --------
    >>> from convexbn.program.losses import SquaredLoss
    >>> loss = AveragePooling(Regions((1, 2), (1, 1))).composed(SquaredLoss(np.array([[1.0]]), np.ones(1)))
    >>> loss.value(np.array([[3.0], [1.0]])), loss.negative_gradient(np.array([[3.0], [1.0]])).tolist()
    (0.5, [[-0.5], [-0.5]])
    """

    cases: Loss = field(kw_only=True)
    readout: AveragePooling = field(kw_only=True)

    def value(self, outputs: Float) -> float:
        return self.cases.value(self.readout.gather(outputs))

    def negative_gradient(self, outputs: Float) -> Float:
        return self.readout.spread(self.cases.negative_gradient(self.readout.gather(outputs)))

    def dual_value(self, dual: Float) -> float:
        """``D(V)`` of the ``V`` with ``T'V = dual``; ``-inf`` if there is none."""
        V = self.readout.gather(dual) / float(np.sum(self.readout.regions.averages**2))
        apart = np.abs(self.readout.spread(V) - dual).max(initial=0.0)
        return self.cases.dual_value(V) if apart <= _SPREAD * np.abs(dual).max(initial=0.0) else -np.inf

    def hessian_root(self, outputs: Float) -> Float:
        """Rows ``T'R`` (N, R K, K); those of a case are summed before they are squared."""
        root = self.cases.hessian_root(self.readout.gather(outputs))
        return np.stack([self.readout.spread(column) for column in root.transpose(2, 0, 1)], axis=2)

    def gauss_newton(self, outputs: Float, derivative: Derivative, size: int) -> Float:
        root, together = self.hessian_root(outputs), self.readout.rows_per_case
        if self.cases is self.cases.without_bias:
            return sum_of_squares(root, derivative, size, together)
        by_bias = np.repeat(self.cases.hessian_root(self.readout.gather(outputs)) / together, together, axis=0)
        return eliminated(root, derivative, size, self.cases.bias_decay, by_bias, together)

    def of_rows(self, part: Index | slice) -> Loss:
        """Loss of the cases of a slice of rows, which holds all rows of each."""
        assert isinstance(part, slice)
        count = self.readout.rows_per_case
        start, stop, _ = part.indices(len(self.targets))
        return self.readout.composed(self.cases.of_rows(slice(start // count, stop // count)))


def readout_of(layer: Convolution | None) -> Readout:
    """Readout of a convolutional layer, or of dense rows without one."""
    if layer is None:
        return Readout()
    linear = layer.pooling == "average" or layer.pool.flattened
    return AveragePooling(layer.pool) if linear else MaxPooling(layer.pool)


def _to_the_first(pooled: FloatMatrix, cells: FloatMatrix) -> FloatMatrix:
    """Gradients of maxima at the first place in each cell that attains them, zero elsewhere."""
    xp = namespace(cells)
    gradient, top = xp.empty_like(cells), xp.max(cells, axis=(2, 4))
    still = top == top
    for i, j in np.ndindex(cells.shape[2], cells.shape[4]):
        first = (cells[:, :, i, :, j] == top) & still
        still &= ~first
        gradient[:, :, i, :, j] = pooled[:, :, 0, :, 0] * first
    return gradient
