"""What a bound returns, and the scaling that all of them share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convexbn._types import Float

EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Bound:
    """An upper bound of ``max over ||u|| <= 1 of ||V'(A u)_+||`` and what it cost.

    Attributes
    ----------
    value : float
        Never below the maximum, rounding included.
    rounding : float
        The part of ``value`` that covers rounding.
    work : int
        What it cost, in the unit of the method: nodes, or eigendecompositions.
    """

    value: float
    rounding: float
    work: int


def unit_scale(V: Float) -> float:
    """Power of two that brings the largest entry of ``V`` into [1/2, 1]; 1 for a zero matrix.

    The maximum is homogeneous in ``V``, so that this scaling is exact and keeps squares from overflow and underflow.
    """
    peak = float(np.abs(V).max(initial=0.0))
    return float(np.ldexp(1.0, max(int(np.frexp(peak)[1]), -1000))) if peak > 0 else 1.0
