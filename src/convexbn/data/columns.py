"""Statistics of the columns before any direction is: which of them vary, and what the rank may rest on."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from convexbn._types import Bool, Float, Index


@dataclass(frozen=True)
class Columns:
    """Statistics of the columns, in units of ``2^exponents``, and which of them vary.

    Attributes
    ----------
    mean : ndarray (d,)
        Weighted means.
    exponents : ndarray (d,) of int
    total : float
        Sum of the sample weights.
    constant : ndarray (d,) of bool
        Columns that do not vary beyond rounding.
    rank_cut : float
        Singular value of the standardised columns, relative to the largest, below which a direction is rounding.
    """

    mean: Float
    exponents: Index
    total: float
    constant: Bool
    rank_cut: float

    @classmethod
    def measure(
        cls, mean: Float, norms: Float, varies: Bool, exponents: Index, total: float, input_eps: float
    ) -> Columns:
        """Find the constant columns, and warn of those that nearly are.

        Parameters
        ----------
        mean, norms : ndarray (d,)
            Weighted means, and norms of the centred columns.
        varies : ndarray (d,) of bool
            Columns that hold two different values.
        exponents : ndarray (d,) of int
        total : float
            Sum of the sample weights.
        input_eps : float
            Machine epsilon of the type that the data came in.

        Raises
        ------
        ValueError
            When all columns are constant.
        """
        deviation = norms / np.sqrt(total)
        constant = (deviation <= 8 * input_eps * np.abs(mean)) | ~varies
        if constant.all():
            raise ValueError(
                "all features are constant, so batch normalisation has nothing to normalise: "
                "give at least one feature that varies over the rows of positive weight."
            )
        _warn_of_nearly_constant(np.flatnonzero(constant & varies))
        kept = np.flatnonzero(~constant)
        offsets = np.abs(mean[kept]) / deviation[kept]
        _warn_of_offsets(kept, offsets, input_eps)
        cut = min(len(kept) * input_eps * (1 + offsets.max()), 1 / 16)
        return cls(mean, exponents, total, constant, float(cut))

    @property
    def kept(self) -> Index:
        """Indices of the columns that vary."""
        return np.flatnonzero(~self.constant)

    def padded(self, array: Float) -> Float:
        """Rows (d, k) of all columns from those of the columns that vary; zero where a column is constant."""
        padded = np.zeros((len(self.mean), array.shape[1]))
        padded[self.kept] = array
        return padded

    def refuse_denormal(self, back: Float) -> None:
        """Refuse columns whose projection overflows.

        Raises
        ------
        ValueError
            With the first of them.
        """
        overflown = np.flatnonzero(~np.isfinite(back).all(axis=1))
        if len(overflown):
            raise ValueError(
                f"feature {self.kept[overflown[0]]} varies by less than 1e-308, where floating point has few digits "
                "left: multiply it by a power of ten; batch norm does not care about units."
            )


def _warn_of_nearly_constant(columns: Index) -> None:
    if len(columns):
        warnings.warn(
            f"feature {columns[0]} varies by no more than rounding around its mean and is treated as constant.",
            UserWarning,
            stacklevel=6,
        )


def _warn_of_offsets(kept: Index, offsets: Float, input_eps: float) -> None:
    worst = int(np.argmax(offsets))
    if offsets[worst] > 1 / np.sqrt(input_eps):
        warnings.warn(
            f"feature {kept[worst]} has |mean| / deviation = {offsets[worst]:.1e}: most digits of its "
            "variation are lost in the input; subtract the offset before storing the data.",
            UserWarning,
            stacklevel=6,
        )
