"""Checked targets, classes or numbers, in the form that a loss takes."""

from __future__ import annotations

from typing import Any

import numpy as np

from convexbn._types import Float, Index
from convexbn.program.losses import LOSSES


def class_targets(labels: Index, n_outputs: int, loss: str) -> Float:
    """Targets (n, K) of classes 0, 1, ...: -1 and +1 for one output, else one-hot rows or their signs.

    Parameters
    ----------
    labels, n_outputs : ndarray (n,) of int, int
    loss : str
        A key of ``LOSSES``.

    Examples
    --------
    >>> class_targets(np.array([0, 1]), 1, "squared").ravel(), class_targets(np.array([2]), 3, "squared_hinge")
    (array([-1.,  1.]), array([[-1., -1.,  1.]]))
    """
    one_hot: Float = np.eye(max(n_outputs, 2))[labels][:, -n_outputs:]
    signs = n_outputs == 1 or LOSSES[loss].target_kind == "signs"
    return 2 * one_hot - 1 if signs else one_hot


def checked_labels(y: np.ndarray[Any, Any], n_outputs: int, n: int, name: str = "y") -> Index:
    """Classes 0, 1, ... of ``n`` rows, or a ValueError; with one output -1 stands for 0.

    Parameters
    ----------
    y, n_outputs, n : ndarray (n,), int, int
    name : str, default="y"
        Name of ``y`` in messages.
    """
    classes = max(n_outputs, 2)
    if y.shape != (n,) or y.dtype.kind not in "iub":
        raise ValueError(f"{name} must hold {n} integers, the classes; got shape {y.shape} of type {y.dtype}.")
    labels: Index = y.astype(np.intp)
    if n_outputs == 1:
        labels = np.where(labels == -1, 0, labels)
    if n and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"{name} must hold classes from 0 to {classes - 1}; got {y.min()} to {y.max()}.")
    return labels


def ranked_labels(y: np.ndarray[Any, Any], n_classes: int) -> Index:
    """Integers from 0 to K - 1 as they are, other labels (n,) by their rank; a ValueError unless there are K."""
    if y.dtype.kind in "iu" and y.min() >= 0 and y.max() < n_classes:
        return y
    known, labels = np.unique(y, return_inverse=True)
    require(len(known) == n_classes, f"the network has outputs for {n_classes} classes, and y has {len(known)} labels")
    return labels


def checked_targets(y: Any, n_outputs: int, loss: str) -> Float:
    """Targets (n, K) of a loss from numbers, signs, class indices or rows of probabilities, or a ValueError.

    Parameters
    ----------
    y, n_outputs : array-like (n,) or (n, K), int
    loss : str
        A key of ``LOSSES``.
    """
    kind = LOSSES[loss].target_kind
    if kind == "probabilities":
        return _probabilities(y, n_outputs)
    targets = numbers(y, n_outputs)
    if kind == "signs":
        words = f"the {loss.replace('_', ' ')}" + " loss" * (loss == "logistic")
        require(bool((np.abs(targets) == 1).all()), f"{words} takes targets -1 and +1")
    return targets


def numbers(y: Any, n_outputs: int) -> Float:
    """Finite targets (n, K) in float64, or a ValueError."""
    require(not np.iscomplexobj(y), "y must be real, and is complex")
    targets = np.asarray(y, dtype=np.float64)
    targets = targets[:, None] if targets.ndim == 1 else targets
    fits = targets.ndim == 2 and targets.shape[1] == n_outputs
    require(fits, f"the network has {n_outputs} outputs, and y has shape {np.shape(y)}")
    require(bool(np.isfinite(targets).all()), "y must be finite")
    return targets


def require(holds: bool, sentence: str) -> None:
    """Raise a ValueError of this sentence about targets unless a condition holds."""
    if not holds:
        raise ValueError(f"{sentence}: give the targets that the loss was trained with.")


def are_soft_targets(Y: Float, loss: str) -> bool:
    """Whether targets (n, K) are soft labels of a loss: signs in [-1, 1], rows of the simplex, or any numbers."""
    kind = LOSSES[loss].target_kind
    if kind == "signs":
        return bool(np.abs(Y).max() <= 1)
    return kind == "numbers" or bool(Y.min() >= 0 and np.abs(Y.sum(axis=1) - 1).max() <= 1e-6)


def _probabilities(y: Any, n_classes: int) -> Float:
    """One-hot rows of class indices (n,), or rows of probabilities (n, K)."""
    labels = np.asarray(y)
    if labels.ndim != 1:
        rows = numbers(y, n_classes)
        valid = rows.min(initial=0.0) >= 0 and np.abs(rows.sum(axis=1) - 1).max(initial=0.0) < 1e-6
        require(bool(valid), "cross-entropy takes class indices or rows of probabilities, and y has other rows")
        return rows / rows.sum(axis=1, keepdims=True)
    inside = labels.dtype.kind in "iu" and labels.min(initial=0) >= 0 and labels.max(initial=0) < n_classes
    require(bool(inside), f"cross-entropy takes class indices from 0 to {n_classes - 1}, integers, and y holds others")
    return np.eye(n_classes)[labels]
