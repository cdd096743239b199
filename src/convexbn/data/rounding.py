"""Which directions of the data are more than the rounding of their columns.

Stored numbers are rounded to half a unit in the last place: column ``j`` holds, in units of its deviation, an error of
``e_j = eps (1 + |mean_j| / deviation_j)`` or less. A right singular direction ``v`` of the standardised columns then
holds about ``||e * v||``: the offset of a column counts in the directions in which it takes part, and in no others.
Directions of eight times that and more are kept. Those below it are what columns leave that depend on each other, such
as sums and dummy codes: they are no directions of the data. What lies between may be either, and is cut *by name*.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convexbn._types import EPS, Float
from convexbn.data.blocks import BlockSize
from convexbn.data.columns import Columns

#: Multiple of its rounding from which a direction is kept.
_KEPT = 8.0
#: Extended precision, in which weak directions are measured: that of doubles on machines that have no other.
_WIDE = np.longdouble
#: Products in it up to which they are made, some half a second, and entries of a block of rows.
_PRODUCTS, _ENTRIES = 1 << 26, 1 << 20
#: Share of the largest entry of a direction from which a column counts as taking part.
_TAKES_PART = 0.1


@dataclass(frozen=True)
class CutByRounding:
    """What is left out of the data although it may be more than rounding.

    ``directions`` is the number of directions, of the columns ``features``; the columns ``constant`` vary by no more
    than rounding, and are taken as constant.

    Examples
    --------
    >>> str(CutByRounding(1, (0, 2), (4,)))
    ', except along 1 direction of features 0, 2 and along feature 4, which rounding may have made'
    >>> str(CutByRounding()), bool(CutByRounding())
    ('', False)
    """

    directions: int = 0
    features: tuple[int, ...] = ()
    constant: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.directions or self.constant)

    def __str__(self) -> str:
        several = "s" if self.directions > 1 else ""
        parts = [f"along {self.directions} direction{several} of {_named(self.features)}"] if self.directions else []
        parts += [f"along {_named(self.constant)}"] if self.constant else []
        return f", except {' and '.join(parts)}, which rounding may have made" if parts else ""


NOTHING_CUT = CutByRounding()


def _named(features: tuple[int, ...]) -> str:
    listed = ", ".join(map(str, features[:10])) + (", ..." if len(features) > 10 else "")
    return f"feature{'s' if len(features) > 1 else ''} {listed}"


def direction_cuts(columns: Columns, values: Float, directions: Float) -> Float:
    """Singular values (k,) of standardised columns of norm 1 above which directions are kept.

    Parameters
    ----------
    columns : Columns
        With ``d`` columns that vary.
    values, directions : ndarray (k,), (d, k)
        Singular values, and right singular vectors.
    """
    hidden = np.linalg.norm(columns.rounding(columns.eps)[:, None] * directions, axis=0)
    return np.maximum(_KEPT * hidden, columns.rank_cut * values.max())


def cut_by_rounding(
    columns: Columns, X: Float, weights: Float, values: Float, weak: Float, strong: tuple[Float, Float]
) -> CutByRounding:  # fmt: skip
    """What is cut by name among the weak directions: those that exactly dependent columns would not leave.

    A factorisation in float64 cannot tell: it leaves some ``eps`` of dependent columns too. So the weak directions are
    measured in extended precision, unless the data are large.

    Parameters
    ----------
    columns : Columns
    X, weights : ndarray (n, d), (n,)
        Rows in units of ``2^exponents``, and sample weights.
    values, weak : ndarray (k,), (d', k)
        Singular values of the standardised columns that vary, the weak ones last, and the weak directions.
    strong : (ndarray (d', r), ndarray (n, r))
        ``V S^{-1}`` and ``U`` of the directions that are kept.
    """
    kept, d, k = columns.kept, *weak.shape
    error, sizes = EPS, values[len(values) - k :]
    if k and X.size * k <= _PRODUCTS:
        left = _remaining(X[:, kept] if d < X.shape[1] else X, columns, weights, weak, strong)
        _, sizes, turned = np.linalg.svd(left, full_matrices=False)
        error, weak = float(np.finfo(_WIDE).eps), weak @ turned.T
    hidden = np.linalg.norm(columns.rounding(EPS)[:, None] * weak, axis=0)
    named = np.flatnonzero(sizes > hidden + (4 + np.sqrt(d)) * error * values[0])
    size = np.abs(weak[:, named])
    taking_part = kept[(size >= _TAKES_PART * size.max(axis=0, initial=0.0)).any(axis=1)]
    return CutByRounding(len(named), tuple(taking_part.tolist()), columns.nearly_constant)


def _remaining(X: Float, columns: Columns, weights: Float, weak: Float, strong: tuple[Float, Float]) -> Float:
    """What weak combinations of the columns leave beyond the strong directions, in extended precision: (n, k)."""
    kept, root, total = columns.kept, np.sqrt(weights)[:, None], weights.sum()
    mean, norms = columns.mean[kept], columns.deviation[kept] * np.sqrt(total)
    combinations, parts = weak.astype(_WIDE), list(BlockSize(X.shape[1], _ENTRIES).slices(len(X)))
    for _ in range(3):
        wide = combinations / norms[:, None]
        left = np.concatenate([(X[part].astype(_WIDE) - mean) @ wide for part in parts])
        left = root * (left - weights.astype(_WIDE) @ left / total)
        share = strong[1].T @ left.astype(np.float64)
        combinations = combinations - strong[0] @ share
    return left.astype(np.float64) - strong[1] @ share
