"""A loss of images as a function of the rows of their patches, of which pooling makes the outputs.

    L_T(G) = L(T G),   F_i = sum_r sum_k T_rk G_(ik),r       G (N, R K), F (n, K), N = n Kp

It is convex in ``G``, so that all that is known of losses holds on the patch rows: its negative gradient is ``T'V``
with that of ``L``, its dual value is that of ``V``, and program, solvers and bounds are those of dense data.
Max pooling has no ``T``: its loss knows the outputs of images alone, whose network is trained by gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from convexbn._types import Float, FloatMatrix, Index
from convexbn.data.pooling import Pooling
from convexbn.program.losses import Loss

#: Relative difference of the entries of a dual point that are one number spread over a region.
_SPREAD = 1e-12


@dataclass(frozen=True)
class PooledLoss(Loss):
    """``L(T G)`` for outputs ``G`` of patch rows; targets are zeros (N, R K), weights those of the images.

    Parameters
    ----------
    of_images : Loss
        ``L``, bound to the targets (n, K) of the images.
    pooling : Pooling

    Examples
    --------
    >>> from convexbn.program.losses import SquaredLoss
    >>> images = SquaredLoss(np.array([[1.0]]), np.ones(1))
    >>> loss = PooledLoss.of(images, Pooling("average", (1, 2), (1, 1)))
    >>> loss.value(np.array([[3.0], [1.0]])), loss.negative_gradient(np.array([[3.0], [1.0]])).tolist()
    (0.5, [[-0.5], [-0.5]])
    """

    of_images: Loss = field(kw_only=True)
    pooling: Pooling = field(kw_only=True)

    @classmethod
    def of(cls, of_images: Loss, pooling: Pooling) -> PooledLoss:
        """The loss on the patch rows of images."""
        (n, K), count = of_images.targets.shape, pooling.n_locations
        targets = np.broadcast_to(0.0, (n * count, pooling.n_regions * K))
        return cls(targets, np.repeat(of_images.weights, count), of_images=of_images, pooling=pooling)

    @property
    def rows_together(self) -> int:
        """``Kp``."""
        return self.pooling.n_locations

    @property
    def of_cases(self) -> Loss:
        """``L``."""
        return self.of_images

    def pooled(self, hidden: FloatMatrix) -> FloatMatrix:
        """Pooled hidden units, region by region: (n, R m)."""
        pooled = self.pooling.pool(hidden)
        return pooled.reshape(len(pooled), self.pooling.n_regions * hidden.shape[1])

    def unpooled(self, gradient: FloatMatrix, hidden: FloatMatrix) -> FloatMatrix:
        """Gradient by the hidden units from that by the pooled ones."""
        return self.pooling.unpool(gradient.reshape(len(gradient), self.pooling.n_regions, hidden.shape[1]), hidden)

    def by_region(self, output: FloatMatrix) -> FloatMatrix:
        """An output layer (m, R K) as one (R m, K) of the pooled units."""
        return self.pooling.by_region(output)

    def by_neuron(self, regional: FloatMatrix) -> FloatMatrix:
        """The way back: (R m, K) as (m, R K)."""
        return self.pooling.by_neuron(regional)

    def spread(self, dual: Float) -> Float:
        """``T'V`` on the rows; for max pooling ``V`` on the groups."""
        return self.pooling.spread(dual) if self.pooling.linear else self.pooling.by_group(dual)

    def arranged(self, rows: Float) -> Float:
        """The rows, or for max pooling their groups."""
        return rows if self.pooling.linear else self.pooling.grouped(rows)

    @property
    def hidden_norm(self) -> float:
        """Upper bound of ``||pooled rows|| / ||rows||``."""
        return self.pooling.norm

    def value(self, outputs: Float) -> float:
        """``L(T G)``."""
        return self.of_images.value(self._gathered(outputs))

    def negative_gradient(self, outputs: Float) -> Float:
        """``T'V``."""
        return self.pooling.spread(self.of_images.negative_gradient(self._gathered(outputs)))

    def dual_value(self, dual: Float) -> float:
        """``D(V)`` of the ``V`` with ``T'V = dual``; ``-inf`` where there is none."""
        matrix = self.pooling.matrix
        V = self._gathered(dual) / float(np.sum(matrix**2))
        apart = np.abs(self.pooling.spread(V) - dual).max(initial=0.0)
        return self.of_images.dual_value(V) if apart <= _SPREAD * np.abs(dual).max(initial=0.0) else -np.inf

    def of_rows(self, part: Index | slice) -> PooledLoss:
        """The terms of the images of a slice of rows, which holds all rows of each."""
        assert isinstance(part, slice)
        count = self.rows_together
        start, stop, _ = part.indices(len(self.targets))
        return PooledLoss.of(self.of_images.of_rows(slice(start // count, stop // count)), self.pooling)

    def _gathered(self, outputs: Float) -> Float:
        if not self.pooling.linear:
            raise TypeError("max pooling is not linear in the rows of an image: this solver takes average pooling.")
        gathered: Float = self.pooling.gather(outputs)
        return gathered
