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

    Columns that are ``constant`` (d,) do not vary beyond rounding; the indices of those that hold two different values
    are ``nearly_constant``. ``eps`` is the machine epsilon of the numbers that the columns may have been rounded to.
    """

    mean: Float
    deviation: Float
    exponents: Index
    total: float
    constant: Bool
    nearly_constant: tuple[int, ...]
    eps: float

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
            Machine epsilon of the numbers that the columns may have been rounded to.
        """
        deviation = norms / np.sqrt(total)
        constant = (deviation <= 8 * input_eps * np.abs(mean)) | ~varies
        if constant.all():
            raise ValueError(
                "all features are constant, so batch normalisation has nothing to normalise: "
                "give at least one feature that varies over the rows of positive weight."
            )
        nearly = np.flatnonzero(constant & varies)
        if len(nearly):
            warn(f"feature {nearly[0]} varies by no more than rounding around its mean: treated as constant.")
        kept = np.flatnonzero(~constant)
        offsets = np.abs(mean[kept]) / deviation[kept]
        worst = int(np.argmax(offsets))
        if offsets[worst] > 1 / np.sqrt(input_eps):
            warn(
                f"feature {kept[worst]} has |mean| / deviation = {offsets[worst]:.1e}: most digits of its variation "
                "are lost in the input; subtract the offset before storing the data."
            )
        deviation = np.where(constant, 0.0, deviation)
        return cls(mean, deviation, exponents, total, constant, tuple(nearly.tolist()), input_eps)

    @property
    def kept(self) -> Index:
        """Indices of the columns that vary."""
        return np.flatnonzero(~self.constant)

    @property
    def rank_cut(self) -> float:
        """Rounding of a factorisation, relative to the largest singular value: no direction below it is kept."""
        return len(self.kept) * self.eps

    def rounding(self, eps: float) -> Float:
        """``eps (1 + |mean| / deviation)`` of the columns that vary, in units of their deviations: (d',)."""
        return eps * (1 + np.abs(self.mean[self.kept]) / self.deviation[self.kept])

    def padded(self, array: Float) -> Float:
        """Rows (d, k) for all columns from rows of the columns that vary; zero for constant columns."""
        padded = np.zeros((len(self.mean), array.shape[1]))
        padded[self.kept] = array
        return padded
