"""Second derivatives: of the losses, one K x K matrix ``R_i R_i'`` a row, and in the variables behind the outputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from convexbn._types import Float
from convexbn.program.losses import CrossEntropyLoss, HuberLoss, LogisticLoss, Loss, SquaredHingeLoss, SquaredLoss
from convexbn.program.pooled_loss import PooledLoss

#: Doubles of the derivative that are formed at a time.
_BLOCK = 1 << 19

#: Eigenvalues of the second derivative in an output bias below this, relative, are 0: the softmax does not see a
#: common bias.
_FLAT = 1e-12


def gauss_newton(loss: Loss, outputs: Float, derivative: Callable[[Float, slice], Float], size: int) -> Float:
    """``J' L'' J`` (size, size) for outputs with derivative ``J``, by blocks of rows.

    An output bias that the loss minimises over is ``K`` more variables, which are eliminated (Schur complement).

    Parameters
    ----------
    loss : Loss
    outputs : ndarray (n, K)
    derivative : callable
        ``R_i' J_i`` of a part of the rows, of which it gets ``R`` and their slice: (rows, K, size).
    size : int
        Variables.
    """
    plain, outputs, decay = loss.at_best_bias(outputs)
    half = half_hessian(plain, outputs)
    n, _, K = half.shape
    total, coupling = np.zeros((size, size)), np.zeros((size, K))
    together = loss.rows_together
    length = max(1, _BLOCK // (K * max(size, 1) * together)) * together
    for start in range(0, n, length):
        part = slice(start, start + length)
        flat = derivative(half[part], part).reshape(-1, together, K * size).sum(axis=1).reshape(-1, size)
        total += flat.T @ flat
        if decay is not None:
            coupling += flat.T @ half[part].transpose(0, 2, 1).reshape(-1, K)
    if decay is not None:
        total -= coupling @ np.linalg.pinv(in_the_bias(half, decay), rcond=_FLAT, hermitian=True) @ coupling.T
    return total


def in_the_bias(half: Float, decay: float) -> Float:
    """Second derivative in a bias ``b`` of all rows, with its decay: (K, K)."""
    side = half.transpose(1, 0, 2).reshape(half.shape[1], -1)
    second: Float = side @ side.T + decay * np.eye(len(side))
    return second


def half_hessian(loss: Loss, outputs: Float) -> Float:
    """``R`` (n, K, K) with ``R_i R_i' = w_i d2 l(f_i) / df_i2``; of a pooled loss the rows ``T'R`` (N, R K, K).

    Squared: ``I``. Logistic: ``p (1 - p)``. Softmax: ``diag(p) - p p' = (I - p 1') diag(p) (I - 1 p')``. Huber and
    squared hinge have a generalised one: 1 where they are quadratic, 0 where they are linear or zero.
    """
    if isinstance(loss, PooledLoss):
        half = half_hessian(loss.of_images, loss.pooling.gather(outputs))
        columns = [loss.pooling.spread(column) for column in half.transpose(2, 0, 1)]
        return np.stack(columns, axis=2)
    n, K = outputs.shape
    unweighted = _HALVES[type(loss)](loss, outputs)
    scaled: Float = np.sqrt(loss.weights)[:, None, None] * np.broadcast_to(unweighted, (n, K, K))
    return scaled


def _squared(loss: Loss, outputs: Float) -> Float:
    return np.eye(outputs.shape[1])


def _huber(loss: Loss, outputs: Float) -> Float:
    assert isinstance(loss, HuberLoss)
    return _diagonals(np.where(np.abs(outputs - loss.targets) < loss.delta, 1.0, 0.0))


def _squared_hinge(loss: Loss, outputs: Float) -> Float:
    p = 0.5 * (1 + loss.targets)
    return _diagonals(np.sqrt(p * (outputs < 1) + (1 - p) * (outputs > -1)))


def _logistic(loss: Loss, outputs: Float) -> Float:
    residual = loss.negative_gradient(outputs) / loss.weights[:, None]
    p = np.clip(0.5 * (1 + loss.targets) - residual, 0, 1)
    return _diagonals(np.sqrt(p * (1 - p)))


def _cross_entropy(loss: Loss, outputs: Float) -> Float:
    residual = loss.negative_gradient(outputs) / loss.weights[:, None]
    p = np.clip(loss.targets - residual, 0, 1)
    root = np.sqrt(p)
    half: Float = root[:, None, :] * np.eye(p.shape[1]) - p[:, :, None] * root[:, None, :]
    return half


def _diagonals(entries: Float) -> Float:
    """Diagonal matrices (n, K, K) of rows (n, K)."""
    matrices: Float = entries[:, :, None] * np.eye(entries.shape[1])
    return matrices


_HALVES: dict[type[Loss], Callable[[Loss, Float], Float]] = {
    SquaredLoss: _squared,
    HuberLoss: _huber,
    SquaredHingeLoss: _squared_hinge,
    LogisticLoss: _logistic,
    CrossEntropyLoss: _cross_entropy,
}
