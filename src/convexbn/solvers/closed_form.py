"""Rank n - 1: the ReLU program solved by formula.

When the distinct rows are affinely independent, ``A`` is orthogonal and ``(A s)_+`` ranges over all ``u >= 0``:
neurons are arbitrary unit vectors ``u >= 0`` with ``s = A'u``. If the targets fall into rays whose directions
make no acute angle, each ray is one neuron (mathematics, sections 2d and 2e).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from convexbn._types import Float
from convexbn.bounds import group_directions
from convexbn.program.losses import CrossEntropyLoss, HuberLoss, LogisticLoss, Loss, SquaredHingeLoss, SquaredLoss


class NoFormulaError(ValueError):
    """The targets have no formula: the program is for an iterative solver."""


def solve_full_rank(rows: Float, loss: Loss, weight_decay: float) -> tuple[Float, Float]:
    """Globally optimal neurons at rank n - 1: first layer (n, m) on the whitened rows, output (m, K).

    Parameters
    ----------
    rows : ndarray (n, n)
        Whitened distinct rows; ``diag(sqrt(w)) rows`` is orthogonal.
    loss : Loss
        Squared, squared hinge, Huber (one output), logistic (one output) or softmax cross-entropy (one-hot targets).
    weight_decay : float

    Raises
    ------
    NoFormulaError
        When the targets have no formula: two rays with an acute angle, or soft labels in cross-entropy.

    Examples
    --------
    Three one-hot targets on orthogonal data; the class of two rows survives a weight decay of 1.2:

    >>> first, output = solve_full_rank(np.eye(3), SquaredLoss(np.eye(2)[[0, 0, 1]], np.ones(3)), 1.2)
    >>> output.round(4)
    array([[0.2142, 0.    ]])
    """
    formulas = {
        SquaredLoss: _squared,
        SquaredHingeLoss: _squared,  # its outputs stay between the margins, where the two losses differ by a constant
        HuberLoss: _huber,
        LogisticLoss: _logistic,
        CrossEntropyLoss: _cross_entropy,
    }
    if (formula := formulas.get(type(loss))) is None:
        raise NoFormulaError(f"there is no formula for {type(loss).__name__}.")
    hidden, output = formula(loss, weight_decay)
    if weight_decay >= max_weight_decay(loss):
        output = np.zeros_like(output)
    live = np.linalg.norm(output, axis=1) > 0
    root = np.sqrt(loss.weights)[:, None]
    return (root * rows).T @ hidden[:, live], output[live]


def max_weight_decay(loss: Loss) -> float:
    """Smallest weight decay at which the zero network is optimal at rank n - 1: the largest ray norm."""
    dual = loss.negative_gradient(np.zeros_like(loss.targets)) / np.sqrt(loss.weights)[:, None]
    return float(_rays(dual)[1].max(initial=0.0))


def _squared(loss: Loss, weight_decay: float) -> tuple[Float, Float]:
    """``F_g = (1 - beta / ||Y_g||)_+ Y_g`` on every ray ``g`` of the targets."""
    targets = np.sqrt(loss.weights)[:, None] * loss.targets
    hidden, norms, directions = _rays(targets)
    return hidden, np.maximum(norms - weight_decay, 0)[:, None] * directions


def _cross_entropy(loss: Loss, weight_decay: float) -> tuple[Float, Float]:
    """One shared logit row ``amplitude (e_k - 1/K)`` a class; ``1 - p_own = tau`` at the optimum."""
    K = loss.targets.shape[1]
    labels = loss.targets.argmax(axis=1)
    if not np.array_equal(loss.targets, np.eye(K)[labels]):
        raise NoFormulaError(
            "no formula: rows with equal features carry different classes, which makes their labels soft."
        )
    totals = np.bincount(labels, loss.weights, K)
    hidden = np.sqrt(loss.weights / totals[labels])[:, None] * loss.targets
    with np.errstate(divide="ignore"):
        tau = weight_decay / np.sqrt(totals) * np.sqrt((K - 1) / K)
    live = tau < (K - 1) / K
    safe = np.where(live, tau, (K - 1) / K)  # amplitude 0
    amplitude = np.log((K - 1) * (1 - safe) / safe)
    amplitude[~live] = 0.0
    return hidden, (np.sqrt(totals) * amplitude)[:, None] * (np.eye(K) - 1 / K)


def _huber(loss: Loss, weight_decay: float) -> tuple[Float, Float]:
    """One neuron for the positive targets and one for the negative ones."""
    assert isinstance(loss, HuberLoss)
    if loss.targets.shape[1] > 1:
        raise NoFormulaError("no formula: the Huber loss has one for one output only.")
    delta = loss.delta
    return _two_sides(loss, lambda weights, y: _huber_amplitudes(weights, y, delta, weight_decay))


def _logistic(loss: Loss, weight_decay: float) -> tuple[Float, Float]:
    """One neuron for the rows that lean to +1 and one for those that lean to -1."""
    return _two_sides(loss, lambda weights, y: _amplitudes(weights, 0.5 * (1 + y), weight_decay))


def _two_sides(loss: Loss, amplitudes: Callable[[Float, Float], Float]) -> tuple[Float, Float]:
    """Neurons of the rows with targets of either sign, from the outputs of weights and targets made positive."""
    y = loss.targets[:, 0]
    hidden, output = np.zeros((len(y), 2)), np.zeros((2, 1))
    for j, sign in enumerate((1.0, -1.0)):
        side = sign * y > 0
        weights = loss.weights[side]
        amplitude = amplitudes(weights, sign * y[side])
        norm = np.linalg.norm(np.sqrt(weights) * amplitude)
        if norm > 0:
            hidden[side, j] = np.sqrt(weights) * amplitude / norm
            output[j] = sign * norm
    return hidden, output


def _amplitudes(weights: Float, p: Float, weight_decay: float) -> Float:
    """Minimise ``sum w (log(1 + e^f) - p f) + beta ||sqrt(w) f||`` over ``f >= 0``, for ``p`` in (1/2, 1].

    Hard labels: ``f = log(||sqrt(w)|| / beta - 1)``. Soft ones: ``p - sigmoid(f) = lambda f`` with
    ``lambda ||sqrt(w) f|| = beta``, both monotone, by nested bisection.
    """
    if weight_decay >= np.linalg.norm(np.sqrt(weights) * (p - 0.5)):
        return np.zeros_like(p)
    if np.all(p == 1):
        return np.full_like(p, np.log(np.sqrt(weights.sum()) / weight_decay - 1))
    return _with_norm(weights, lambda ratio: _stationary(p, ratio), weight_decay)


def _huber_amplitudes(weights: Float, y: Float, delta: float, weight_decay: float) -> Float:
    """Minimise ``sum w h(y - f) + beta ||sqrt(w) f||`` over ``f >= 0``, for ``y > 0``.

    ``clip(y - f, -delta, delta) = lambda f``, so that ``f = min(y / (1 + lambda), delta / lambda)``.
    """
    if weight_decay >= np.linalg.norm(np.sqrt(weights) * np.minimum(y, delta)):
        return np.zeros_like(y)
    return _with_norm(weights, lambda ratio: np.minimum(y / (1 + ratio) * ratio, delta) / ratio, weight_decay)


def _with_norm(weights: Float, stationary: Callable[[float], Float], weight_decay: float) -> Float:
    """The outputs ``f(lambda)`` for which ``lambda ||sqrt(w) f||``, which grows with lambda, is the weight decay."""
    low, high = -700.0, 700.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        f = stationary(np.exp(middle))
        too_small = np.exp(middle) * np.linalg.norm(np.sqrt(weights) * f) < weight_decay
        low, high = (middle, high) if too_small else (low, middle)
    return f


def _stationary(p: Float, ratio: float) -> Float:
    """Root of ``p - sigmoid(f) = ratio f`` in ``f >= 0`` for every ``p``, by bisection."""
    low, high = np.zeros_like(p), np.full_like(p, 0.5 / ratio)
    for _ in range(200):
        middle = 0.5 * (low + high)
        positive = p - 0.5 * (1 + np.tanh(0.5 * middle)) > ratio * middle
        low, high = np.where(positive, middle, low), np.where(positive, high, middle)
    root: Float = 0.5 * (low + high)
    return root


def _rays(targets: Float) -> tuple[Float, Float, Float]:
    """Split rows by direction: hidden ``u_g`` (n, G), norms ``||Y_g||`` (G,) and directions ``d_g`` (G, K)."""
    group, directions = group_directions(targets)
    live = group >= 0
    acute = directions @ directions.T - np.eye(len(directions)) > 1e-9
    if acute.any():
        raise NoFormulaError(
            "no formula: the targets have directions with an acute angle between them; one output, one-hot, "
            "+-1 and balanced centred targets have one."
        )
    lengths = np.linalg.norm(targets, axis=1)
    norms = np.sqrt(np.bincount(group[live], lengths[live] ** 2, len(directions)))
    hidden = np.zeros((len(targets), len(directions)))
    hidden[live, group[live]] = lengths[live] / norms[group[live]]
    return hidden, norms, directions
