"""What a bound returns, and the scaling that all of them share."""

from __future__ import annotations

from dataclasses import dataclass


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
