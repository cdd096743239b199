"""Statistics of the columns: which of them vary, and below which singular value a direction is rounding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convexbn._types import Bool, Float, Index
from convexbn.data.warn import warn


@dataclass(frozen=True)
class Columns:
    """Statistics of the columns: weighted ``mean`` and ``deviation`` (d,) in units of ``2^exponents``.

    ``total`` is the weight of all rows.

    Columns that are ``constant`` (d,) do not vary beyond rounding. A direction is rounding if its singular value among
    the standardised columns, relative to the largest, is below ``rank_cut``.
    """

    mean: Float
    deviation: Float
    exponents: Index
    total: float
    constant: Bool
    rank_cut: float

    @classmethod
    def measure(
        cls, mean: Float, norms: Float, varies: Bool, exponents: Index, total: float, input_eps: float
    ) -> Columns:
        """Find the constant columns; warn of columns that nearly are, and of large offsets.

        Parameters
        ----------
        mean, norms, exponents : ndarray (d,)
            Weighted means, and norms of the centred columns, in units of ``2^exponents``.
        varies, total : ndarray (d,) of bool, float
            Columns that hold two different values; it is a ``ValueError`` if none varies beyond rounding.
        input_eps : float
            Machine epsilon of the type in which the data came.
        """
        deviation = norms / np.sqrt(total)
        constant = (deviation <= 8 * input_eps * np.abs(mean)) | ~varies
        if constant.all():
            raise ValueError(
                "all features are constant, so batch normalisation has nothing to normalise: "
                "give at least one feature that varies over the rows of positive weight."
            )
        if (near := constant & varies).any():
            warn(f"feature {near.argmax()} varies by no more than rounding around its mean: treated as constant.")
        kept = np.flatnonzero(~constant)
        offsets = np.abs(mean[kept]) / deviation[kept]
        worst = int(np.argmax(offsets))
        if offsets[worst] > 1 / np.sqrt(input_eps):
            warn(
                f"feature {kept[worst]} has |mean| / deviation = {offsets[worst]:.1e}: most digits of its variation "
                "are lost in the input; subtract the offset before storing the data."
            )
        cut = min(len(kept) * input_eps * (1 + offsets.max()), 1 / 16)
        return cls(mean, np.where(constant, 0.0, deviation), exponents, total, constant, float(cut))

    @property
    def kept(self) -> Index:
        """Indices of the columns that vary."""
        return np.flatnonzero(~self.constant)

    def padded(self, array: Float) -> Float:
        """Rows (d, k) for all columns from rows of the columns that vary; zero for constant columns."""
        padded = np.zeros((len(self.mean), array.shape[1]))
        padded[self.kept] = array
        return padded
