"""Weights of classes, which multiply those of their rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np

from convexbn._types import Float, Index


def class_weighted(
    sample_weight: Float, labels: Index, classes: np.ndarray[Any, Any], class_weight: Mapping[Any, float] | str
) -> Float:
    """Sample weights times the weights of the rows' classes: (n,).

    Parameters
    ----------
    sample_weight, labels : ndarray (n,), ndarray (n,) of int
        Weights, and place of each row's class among ``classes``.
    classes : ndarray (n_classes,)
        Class labels.
    class_weight : mapping of label to weight, or "balanced"
        Classes that a mapping does not name have weight 1. ``"balanced"`` gives all classes that occur equal totals,
        and keeps the total of all: ``total / (n_classes * total of the class)``.
    """
    if isinstance(class_weight, str):
        totals = np.bincount(labels, sample_weight, len(classes))
        of_class = totals.sum() / (np.count_nonzero(totals) * np.where(totals > 0, totals, 1.0))
    else:
        of_class = _named(class_weight, classes.tolist())
    with np.errstate(over="ignore"):
        weights: Float = sample_weight * of_class[labels]
        if not 0 < weights.sum() < np.inf:
            raise ValueError("class_weight leaves no positive finite total of the weights: give weights near 1.")
    return weights


def _named(class_weight: Mapping[Any, float], classes: list[Any]) -> Float:
    """Weights of the classes in order, 1 where none is given."""
    for label, weight in class_weight.items():
        if not (isinstance(weight, Real) and 0 <= weight < math.inf):
            raise ValueError(f"class_weight must hold finite numbers from 0 on; class {label!r} has {weight!r}.")
    unknown = [label for label in class_weight if label not in classes]
    if unknown and not set(classes) <= set(class_weight):  # scikit-learn allows more classes, if all of y are there
        raise ValueError(f"class_weight names {unknown[0]!r}, which is no class of y; they are {classes}.")
    return np.array([class_weight.get(label, 1.0) for label in classes], dtype=np.float64)
