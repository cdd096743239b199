"""The record that every bound returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """Upper bound of ``max over ||u|| <= 1 of ||V'(A u)_+||``, and its cost.

    Attributes
    ----------
    value, rounding : float
        The bound, never below the maximum, and the part of it that covers rounding.
    work : int
        Nodes or eigendecompositions: the unit of the method.
    """

    value: float
    rounding: float
    work: int
