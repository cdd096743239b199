"""Readouts: what the output layer, and with it the loss, sees of the hidden units of a case.

A case is a term of the loss. A dense network has one row a case. A convolutional one has a row for each of the ``Kp``
patches of an image, of which pooling makes ``R`` regions: ``F_i = sum_j sum_r pooled_irj c_jr`` with an output layer
(m, R K). Global pooling is ``R = 1``, a flattened layer has a region for every location (mathematics, section 3).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
from array_api_compat import array_namespace, device

from convexbn._types import Float, FloatMatrix, Index
from convexbn.data.convolution import Convolution
from convexbn.data.kernels import like
from convexbn.data.pooling import Regions
from convexbn.program.gauss_newton import Derivative, sum_of_squares
from convexbn.program.losses import Loss

#: Relative difference of the entries of a dual point that are one number spread over a region.
_SPREAD = 1e-12

_NOT_LINEAR = "max pooling is not linear in the rows of an image: this solver takes average pooling."


@dataclass(frozen=True)
class Readout:
    """The readout of dense networks: each row is a case, and the output layer sees its hidden units as they are.

    Examples
    --------
    >>> Readout().outputs(np.array([[1.0, 2.0]]), np.array([[3.0], [4.0]]))
    array([[11.]])
    """

    @property
    def rows_per_case(self) -> int:
        """Consecutive rows that share a term of the loss: blocks of rows hold whole cases."""
        return 1

    @property
    def n_regions(self) -> int:
        """Numbers ``R`` that are kept of every neuron."""
        return 1

    @property
    def linear(self) -> bool:
        """Whether the readout is a matrix on the rows of a case."""
        return True

    @property
    def norm(self) -> float:
        """Upper bound of ``||pooled units|| / ||hidden units||``."""
        return 1.0

    def pool(self, hidden: FloatMatrix) -> FloatMatrix:
        """Hidden units (N, m) of rows as the output layer sees them, region by region: (n, R m)."""
        return hidden

    def unpool(self, gradient: FloatMatrix, hidden: FloatMatrix) -> FloatMatrix:
        """Gradient by the hidden units (N, m) from that by the pooled ones (n, R m)."""
        return gradient

    def by_region(self, output: FloatMatrix) -> FloatMatrix:
        """An output layer (m, R K), one row a neuron, as one (R m, K) of the pooled units."""
        return output

    def by_neuron(self, regional: FloatMatrix) -> FloatMatrix:
        """The inverse of ``by_region``: (R m, K) as (m, R K)."""
        return regional

    def outputs(self, hidden: FloatMatrix, output: FloatMatrix) -> FloatMatrix:
        """Outputs (n, K) of hidden units (N, m) and an output layer (m, R K)."""
        return self.pool(hidden) @ self.by_region(output)

    def gather(self, outputs: FloatMatrix) -> FloatMatrix:
        """Outputs (n, K) of the cases from those of their rows (N, R K), where the readout is linear."""
        return outputs

    def spread(self, dual: FloatMatrix) -> FloatMatrix:
        """The adjoint of ``gather``: a dual point (n, K) as one of the rows (N, R K), or of groups of them."""
        return dual

    def arranged(self, rows: Float) -> Float:
        """Rows (N, q) as hidden units are made of them: one each, or the largest of a group, (n R, G, q)."""
        return rows

    def row_weights(self, weights: Float) -> Float:
        """Weights (n,) of the cases as those of their rows (N,)."""
        return weights

    def composed(self, loss: Loss) -> Loss:
        """The loss as a function of the outputs of the rows, where the readout is linear."""
        return loss


@dataclass(frozen=True)
class Pooling(Readout):
    """What average and maximum have in common.

    Parameters
    ----------
    regions : Regions
    """

    regions: Regions

    @property
    def rows_per_case(self) -> int:
        """``Kp``."""
        return self.regions.n_locations

    @property
    def n_regions(self) -> int:
        """``R``."""
        return self.regions.n_regions

    def by_region(self, output: FloatMatrix) -> FloatMatrix:
        """An output layer (m, R K) as one (R m, K) of the pooled units."""
        m, R, K = len(output), self.n_regions, output.shape[1] // self.n_regions
        return output.reshape(m, R, K).swapaxes(0, 1).reshape(R * m, K)

    def by_neuron(self, regional: FloatMatrix) -> FloatMatrix:
        """The inverse of ``by_region``: (R m, K) as (m, R K)."""
        m, R, K = len(regional) // self.n_regions, self.n_regions, regional.shape[1]
        return regional.reshape(R, m, K).swapaxes(0, 1).reshape(m, R * K)

    def row_weights(self, weights: Float) -> Float:
        """The weight of an image for each of its patches."""
        return np.repeat(weights, self.rows_per_case)

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
        """Hidden units (n Kp, m), averaged region by region: (n, R m)."""
        images = self.regions.by_image(hidden)
        if self.regions.flattened:
            return self._flat(images)
        if self.regions.equal:
            cells = self.regions.in_cells(images)
            averages = array_namespace(hidden).sum(cells, axis=(2, 4)) / (cells.shape[2] * cells.shape[4])
            return averages.reshape(len(images), self.n_regions * hidden.shape[1])
        return self._flat(like(hidden, self.regions.averages) @ images)

    def unpool(self, gradient: FloatMatrix, hidden: FloatMatrix) -> FloatMatrix:
        """Gradient by the hidden units (n Kp, m) from that by the pooled ones (n, R m)."""
        if self.regions.flattened:
            return gradient.reshape(hidden.shape)
        if self.regions.equal:
            cells = self.regions.in_cells(self.regions.by_image(hidden))
            by_cell = gradient.reshape(len(cells), cells.shape[1], 1, cells.shape[3], 1, cells.shape[5])
            xp = array_namespace(gradient)
            return xp.broadcast_to(by_cell / (cells.shape[2] * cells.shape[4]), cells.shape).reshape(hidden.shape)
        by_image: FloatMatrix = like(gradient, self.regions.averages).T @ self._in_regions(gradient)
        return by_image.reshape(hidden.shape)

    def gather(self, outputs: FloatMatrix) -> FloatMatrix:
        """``F_i = sum_r sum_k T_rk G_(ik),r`` of outputs (n Kp, R K) of the rows: (n, K)."""
        images = outputs.reshape(-1, self.rows_per_case, self.n_regions, outputs.shape[1] // self.n_regions)
        return np.einsum("rk,nkrc->nc", self.regions.averages, images, optimize=True)

    def spread(self, dual: FloatMatrix) -> FloatMatrix:
        """``T'V`` (n Kp, R K) of a dual point (n, K)."""
        spread: FloatMatrix = np.einsum("rk,nc->nkrc", self.regions.averages, dual)
        return spread.reshape(len(dual) * self.rows_per_case, -1)

    def composed(self, loss: Loss) -> Loss:
        """``L(T G)`` as a loss of the outputs ``G`` of patches."""
        return ComposedLoss.of_cases(loss, self)


@dataclass(frozen=True)
class MaxPooling(Pooling):
    """Maxima over regions, which are not linear in the rows of an image.

    Examples
    --------
    >>> MaxPooling(Regions((1, 4), (1, 2))).pool(np.array([[1.0], [3], [5], [9]]))
    array([[3., 9.]])
    """

    @property
    def linear(self) -> bool:
        """Whether the readout is a matrix on the rows of a case."""
        return False

    @functools.cached_property
    def norm(self) -> float:
        """Root of the largest number of regions that a location belongs to, rounded upwards."""
        return float(np.sqrt(self.regions.members.sum(axis=0).max())) * (1 + 1e-12)

    def pool(self, hidden: FloatMatrix) -> FloatMatrix:
        """The largest of the hidden units (n Kp, m) in every region: (n, R m)."""
        images, xp = self.regions.by_image(hidden), array_namespace(hidden)
        if self.regions.equal:
            return xp.max(self.regions.in_cells(images), axis=(2, 4)).reshape(len(images), -1)
        return self._flat(xp.max(images[:, self.regions.groups], axis=2))

    def unpool(self, gradient: FloatMatrix, hidden: FloatMatrix) -> FloatMatrix:
        """Gradient by the hidden units (n Kp, m) from that by the pooled ones (n, R m).

        A maximum that is attained at several locations gives its gradient to the first.
        """
        images = self.regions.by_image(hidden)
        if self.regions.equal:
            cells = self.regions.in_cells(images)
            by_cell = gradient.reshape(len(cells), cells.shape[1], 1, cells.shape[3], 1, cells.shape[5])
            return _to_the_first(by_cell, cells).reshape(hidden.shape)
        xp, pooled = array_namespace(hidden), self._in_regions(gradient)
        by_image, places = xp.zeros_like(images), xp.arange(images.shape[1], device=device(images))
        for r, inside in enumerate(self.regions.members):
            found = images[:, inside]
            first = places[inside][xp.argmax(found, axis=1)]
            by_image += (places[None, :, None] == first[:, None, :]) * pooled[:, r, None, :]
        return by_image.reshape(hidden.shape)

    def gather(self, outputs: FloatMatrix) -> FloatMatrix:
        """Not for maxima.

        Raises
        ------
        TypeError
        """
        raise TypeError(_NOT_LINEAR)

    def spread(self, dual: FloatMatrix) -> FloatMatrix:
        """A dual point (n, K) as one (n R, R K) of the groups: each region has outputs of its own."""
        R, (n, K) = self.n_regions, dual.shape
        grouped: FloatMatrix = np.einsum("rs,nc->nrsc", np.eye(R), dual)
        return grouped.reshape(n * R, R * K)

    def arranged(self, rows: Float) -> Float:
        """Rows (n Kp, q) in the groups whose largest is taken: (n R, G, q)."""
        images, groups = self.regions.by_image(rows), self.regions.groups
        return images[:, groups].reshape(-1, groups.shape[1], rows.shape[1])

    def composed(self, loss: Loss) -> Loss:
        """Not for maxima.

        Raises
        ------
        TypeError
        """
        raise TypeError(_NOT_LINEAR)


@dataclass(frozen=True)
class ComposedLoss(Loss):
    """``L(T G)`` for outputs ``G`` of patch rows, by a linear readout ``T``; convex in ``G``.

    Its negative gradient is ``T'V`` with that of ``L``, and its dual value is that of ``V``, so that program, solvers
    and bounds are those of dense data. Targets are zeros (N, R K), weights those of the rows.

    Parameters
    ----------
    cases : Loss
        ``L``, bound to the targets (n, K) of the cases.
    readout : Readout

    Examples
    --------
    >>> from convexbn.program.losses import SquaredLoss
    >>> loss = AveragePooling(Regions((1, 2), (1, 1))).composed(SquaredLoss(np.array([[1.0]]), np.ones(1)))
    >>> loss.value(np.array([[3.0], [1.0]])), loss.negative_gradient(np.array([[3.0], [1.0]])).tolist()
    (0.5, [[-0.5], [-0.5]])
    """

    cases: Loss = field(kw_only=True)
    readout: Pooling = field(kw_only=True)

    @classmethod
    def of_cases(cls, cases: Loss, readout: Pooling) -> ComposedLoss:
        """The loss on the rows of cases."""
        (n, K), count = cases.targets.shape, readout.rows_per_case
        targets = np.broadcast_to(0.0, (n * count, readout.n_regions * K))
        return cls(targets, readout.row_weights(cases.weights), cases=cases, readout=readout)

    def value(self, outputs: Float) -> float:
        """``L(T G)``."""
        return self.cases.value(self.readout.gather(outputs))

    def negative_gradient(self, outputs: Float) -> Float:
        """``T'V``."""
        return self.readout.spread(self.cases.negative_gradient(self.readout.gather(outputs)))

    def dual_value(self, dual: Float) -> float:
        """``D(V)`` of the ``V`` with ``T'V = dual``; ``-inf`` where there is none."""
        V = self.readout.gather(dual) / float(np.sum(self.readout.regions.averages**2))
        apart = np.abs(self.readout.spread(V) - dual).max(initial=0.0)
        return self.cases.dual_value(V) if apart <= _SPREAD * np.abs(dual).max(initial=0.0) else -np.inf

    def hessian_root(self, outputs: Float) -> Float:
        """The rows ``T'R`` (N, R K, K), of which those of a case belong together."""
        root = self.cases.hessian_root(self.readout.gather(outputs))
        return np.stack([self.readout.spread(column) for column in root.transpose(2, 0, 1)], axis=2)

    def gauss_newton(self, outputs: Float, derivative: Derivative, size: int) -> Float:
        """``J' L'' J`` (size, size), the rows of a case summed before they are squared."""
        return sum_of_squares(self.hessian_root(outputs), derivative, size, self.readout.rows_per_case)

    def of_rows(self, part: Index | slice) -> ComposedLoss:
        """The terms of the cases of a slice of rows, which holds all rows of each."""
        assert isinstance(part, slice)
        count = self.readout.rows_per_case
        start, stop, _ = part.indices(len(self.targets))
        return ComposedLoss.of_cases(self.cases.of_rows(slice(start // count, stop // count)), self.readout)


def readout_of(layer: Convolution | None) -> Readout:
    """Readout of a convolutional layer; of dense rows where there is none."""
    if layer is None:
        return Readout()
    linear = layer.pooling == "average" or layer.pool.flattened
    return AveragePooling(layer.pool) if linear else MaxPooling(layer.pool)


def _to_the_first(pooled: FloatMatrix, cells: FloatMatrix) -> FloatMatrix:
    """Gradients of maxima at the first place in each cell that attains it, zero elsewhere."""
    xp = array_namespace(cells)
    gradient, top = xp.empty_like(cells), xp.max(cells, axis=(2, 4))
    still = top == top
    for i, j in np.ndindex(cells.shape[2], cells.shape[4]):
        first = (cells[:, :, i, :, j] == top) & still
        still &= ~first
        gradient[:, :, i, :, j] = pooled[:, :, 0, :, 0] * first
    return gradient
