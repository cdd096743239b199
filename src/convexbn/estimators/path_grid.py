"""Grid of a path: checked values, defaults, and unfitted estimators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from convexbn.estimators.base import own_random_state

Ranks: TypeAlias = Sequence[int | float | None]

#: Points of the default grid of weight decays, and its smallest relative to its largest.
_N_WEIGHT_DECAYS, _SMALLEST = 20, 0.01


def unfitted(estimator: Any, **changes: Any) -> Any:
    """An unfitted estimator with some parameters changed and the same callback, which ``clone`` would copy."""
    return type(estimator)(**{**estimator.get_params(deep=False), **changes})


def with_seed(estimator: Any) -> Any:
    """An unfitted estimator with repeatable draws: an integer ``random_state`` stays, else one is drawn from it."""
    model = unfitted(estimator)
    if not isinstance(model.random_state, (int, np.integer)):
        model.random_state = int(own_random_state(model.random_state).randint(2**31 - 1))
    return model


def checked_values(model: Any, parameter: str, values: Sequence[Any] | None) -> list[Any]:
    """Valid values of a parameter; the estimator's own if ``values`` is None.

    Parameters
    ----------
    model, parameter, values : estimator, str, sequence or None
    """
    kept = [getattr(model, parameter)] if values is None else list(values)
    if not kept:
        raise ValueError(f"{parameter}s is empty: give at least one, or None for the estimator's own.")
    for value in kept:
        unfitted(model, **{parameter: value})._validate_params()
    return [value.item() if isinstance(value, np.generic) else value for value in kept]


def checked_decays(weight_decays: Sequence[float]) -> list[float]:
    """Positive finite weight decays, at least one."""
    kept = np.asarray(weight_decays, dtype=np.float64)
    if kept.ndim != 1 or not len(kept) or not np.all((kept > 0) & np.isfinite(kept)):
        raise ValueError(f"weight_decays must be a sequence of positive finite numbers; got {weight_decays!r}.")
    return kept.tolist()


def default_decays(largest: float) -> list[float]:
    """Geometric grid from the largest useful weight decay downwards."""
    decays: list[float] = ((largest if largest > 0 else 1.0) * np.geomspace(1, _SMALLEST, _N_WEIGHT_DECAYS)).tolist()
    return decays
