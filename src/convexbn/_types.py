"""Array types in signatures, the machine epsilon of float64, and deadlines."""

from __future__ import annotations

import time
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Float: TypeAlias = NDArray[np.float64]
FloatMatrix: TypeAlias = NDArray[Any]
Bool: TypeAlias = NDArray[np.bool_]
Index: TypeAlias = NDArray[np.intp]

EPS = float(np.finfo(np.float64).eps)


#: Clock of all time limits; the tests put one in its place that counts its readings, so that limits are of work.
_clock = time.monotonic


def now() -> float:
    """Seconds on the clock of all deadlines."""
    return _clock()


def is_over(deadline: float | None) -> bool:
    """Whether ``now()`` has reached the deadline; never without one."""
    return deadline is not None and now() >= deadline


def share_of(deadline: float | None, share: float) -> float | None:
    """``now()`` at which a share of the time that is left is over, None without a deadline."""
    if deadline is None:
        return None
    current = now()
    return current + share * (deadline - current)
