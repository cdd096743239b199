"""Which singular directions are kept: ``rank`` and the spectral filter."""

from __future__ import annotations

from numbers import Integral
from typing import NamedTuple

import numpy as np

from convexbn._types import Float
from convexbn.data.rounding import CutByRounding

#: Directions that the spectral filter shrinks below this are left out, as a truncation.
FAINTEST = 2.0**-26


class Kept(NamedTuple):
    """Which directions to keep, as in ``whiten``."""

    rank: int | float | None = None
    spectral_filter: float | None = None
    standardize: bool = False

    @property
    def every(self) -> bool:
        """Whether all directions stay as they are: then units of columns do not matter."""
        return self.rank is None and self.spectral_filter is None

    def filter(self, values: Float, r: int) -> Float:
        """``phi`` (k,) of the kept ones among ``r`` directions with these singular values."""
        return kept_filter(values, r, self.rank, self.spectral_filter)


class Directions(NamedTuple):
    """Singular directions that are kept, before the filter: orthonormal columns ``(X - mean) back`` of the rows.

    ``rows`` (n, k + 1) holds these columns and room for the constant one, or is None if they are computed on access.
    ``back`` and the right singular ``vectors`` (d', k) are for the ``d'`` columns of ``X`` that vary. ``values`` are
    all singular values that were found, ``filter`` (k,) is ``phi``, and ``numerical_rank`` counts the independent
    directions of the data, ``cut`` tells which more may be. ``departure`` from orthonormality was measured; it is None
    for a QR.
    """

    rows: Float | None
    back: Float
    vectors: Float
    values: Float
    filter: Float
    numerical_rank: int
    cut: CutByRounding
    departure: float | None = None


def kept_filter(values: Float, r: int, rank: int | float | None, spectral_filter: float | None) -> Float:
    """Filter ``phi`` (k,) of the directions that ``rank`` and ``spectral_filter`` keep.

    Parameters
    ----------
    values, r : ndarray, int
        Singular values, largest first, and the number of directions that there are.
    rank, spectral_filter
        As in ``whiten``.
    """
    relative = values / values[0]
    phi = np.ones(r) if spectral_filter is None else relative[:r] / np.hypot(relative[:r], spectral_filter)
    if isinstance(rank, Integral):
        phi = phi[: int(rank)]
    elif rank is not None:
        share = np.cumsum(relative**2)
        phi = phi[: np.searchsorted(share, rank * share[-1] * (1 - 1e-12)) + 1]
    return phi[: np.count_nonzero(phi >= FAINTEST)]
