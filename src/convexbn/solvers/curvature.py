"""Second derivatives of the losses, one K x K matrix a row, as products ``R_i R_i'``."""

from __future__ import annotations

import numpy as np

from convexbn._typing import Float
from convexbn.losses import CrossEntropyLoss, LogisticLoss, Loss, SquaredLoss


def half_hessian(loss: Loss, outputs: Float) -> Float:
    """``R`` (n, K, K) with ``R_i R_i' = w_i d2 l(f_i) / df_i2``.

    Squared: ``I``. Logistic: ``p (1 - p)``. Softmax: ``diag(p) - p p' = (I - p 1') diag(p) (I - 1 p')``.
    """
    n, K = outputs.shape
    half = {SquaredLoss: _squared, LogisticLoss: _logistic, CrossEntropyLoss: _cross_entropy}[type(loss)]
    scaled: Float = np.sqrt(loss.weights)[:, None, None] * np.broadcast_to(half(loss, outputs), (n, K, K))
    return scaled


def _squared(loss: Loss, outputs: Float) -> Float:
    return np.eye(outputs.shape[1])


def _logistic(loss: Loss, outputs: Float) -> Float:
    residual = loss.negative_gradient(outputs) / loss.weights[:, None]
    p = np.clip(0.5 * (1 + loss.targets) - residual, 0, 1)
    half: Float = np.sqrt(p * (1 - p))[:, :, None]
    return half


def _cross_entropy(loss: Loss, outputs: Float) -> Float:
    residual = loss.negative_gradient(outputs) / loss.weights[:, None]
    p = np.clip(loss.targets - residual, 0, 1)
    root = np.sqrt(p)
    half: Float = root[:, None, :] * np.eye(p.shape[1]) - p[:, :, None] * root[:, None, :]
    return half
