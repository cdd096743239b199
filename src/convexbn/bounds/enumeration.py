"""The exact maximum of ``|v'(A u)_+|`` over all cells, for one output and data that have few activation patterns.

On a cell of the arrangement of the rows with ``v_i > 0`` the function is concave,
``v'(A u)_+ = p'u - sum w_i (a_i'u)_+`` with ``p = A'D v_+``, ``w = v_-``; everywhere else it is larger, as
``v_+'(A u)_+ >= v_+'D A u``. So, with every pattern ``D`` of these rows,

    max over ||u|| <= 1 of v'(A u)_+ = max over D of min over 0 <= s <= w of ||A'(D v_+ - s)||,

where any ``s`` bounds its pattern: one at hand settles most patterns, least squares the rest, first all at once and
to the end if that is not enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from scipy.optimize import lsq_linear

from convexbn._types import EPS, Bool, Float, is_over
from convexbn.bounds.bound import Bound
from convexbn.bounds.local_search import concave_maximiser, hidden_norms, normalise
from convexbn.data.blocks import BlockSize
from convexbn.data.scaling import unit_scale
from convexbn.program.arrangement import count_bound, enumerate_patterns, row_keys

#: Entries of the table of patterns in three dimensions, half as many in each further one: more take over a second.
_ENTRIES = 1 << 23
_BLOCK_ENTRIES = 1 << 20
_ACCURACY = 1e-9  # relative distance of bound and value at which a minimum counts as found
_THIN = 1e-12  # width of cells that may be missed


@dataclass(frozen=True)
class Maxima(Bound):
    """A bound, and a maximiser (m, q) on each set of cells where the maximum may exceed the target."""

    directions: Float


class EveryCell:
    """The cells of a data matrix, enumerated once for any number of maximisations.

    Parameters
    ----------
    A : ndarray (n, q)
        ``||A|| <= 1``, and ``few_cells(A)``.
    deadline : float, optional
        Of the enumeration, which is a ``TimeoutError`` afterwards.
    """

    def __init__(self, A: Float, deadline: float | None = None) -> None:
        cells = enumerate_patterns(A, max_bytes=64 * _ENTRIES, tolerance=_THIN, deadline=deadline)
        self.A, self.patterns = A, cells.patterns

    @classmethod
    def of_few(cls, A: Float, deadline: float | None = None) -> EveryCell | None:
        """The cells, if they are few and the deadline leaves time to enumerate them; else None.

        Parameters
        ----------
        A, deadline : ndarray (n, q) or groups of rows (n, G, q), float or None
        """
        if A.ndim > 2 or not few_cells(A):
            return None
        with suppress(TimeoutError):
            return cls(A, deadline)
        return None

    def maxima(self, V: Float, target: float = 0.0, deadline: float | None = None) -> Maxima:
        """Bound ``max over ||u|| <= 1 of |V'(A u)_+|``, sharply if above the target; ``work`` counts patterns.

        Parameters
        ----------
        V : ndarray (n, 1)
        target : float
            Cells with a bound of at most this are settled.
        deadline : float, optional
            After it the bound is less sharp.
        """
        n, q = self.A.shape
        scale = unit_scale(V)
        largest, found = 0.0, [np.zeros((0, q))]
        for v in (V[:, 0] / scale, -V[:, 0] / scale):
            if not (v > 0).any():
                continue
            for opened, bounds in self._groups(v):
                unsettled = bounds > target / scale
                bound, directions = self._least_squares(v, opened[unsettled], target / scale, deadline)
                largest = max(largest, bound, float(bounds[~unsettled].max(initial=0.0)))
                found.append(directions)
        # a direction in a missed cell is within its width of one that was not missed, hyperplane by hyperplane
        rounding = ((n + q + 4) * np.sqrt(q) * EPS + 2 * n * _THIN) * float(np.linalg.norm(V / scale))
        directions = np.vstack(found)
        directions = directions[hidden_norms(directions, V, self.A) > target]
        return Maxima((largest + rounding) * scale, rounding * scale, len(self.patterns), directions)

    def _groups(self, v: Float) -> Iterator[tuple[Bool, Float]]:
        """Yield the cell of smallest gradient for each pattern of the rows with ``v_i > 0``, and the norm."""
        size, signed = BlockSize(len(v), _BLOCK_ENTRIES), v[:, None] * self.A
        parts = (self.patterns[part] for part in size.slices(len(self.patterns)))
        gradients = np.concatenate([np.linalg.norm(opened @ signed, axis=1) for opened in parts])
        _, group = np.unique(row_keys(self.patterns[:, v > 0]), return_inverse=True)
        order = np.lexsort((gradients, group))
        smallest = order[np.flatnonzero(np.diff(group[order], prepend=-1))]
        for part in size.slices(len(smallest)):
            yield self.patterns[smallest[part]], gradients[smallest[part]]

    def _least_squares(self, v: Float, opened: Bool, target: float, deadline: float | None) -> tuple[float, Float]:
        """Largest of the minima over ``s``, from above, and a maximiser for each."""
        upper = np.maximum(-v, 0)
        gradients = np.where(opened, np.maximum(v, 0), 0.0) @ self.A
        slopes, subgradients = concave_maximiser(gradients, upper, np.where(opened, upper, 0.0), self.A, deadline)
        bounds = np.linalg.norm(gradients - subgradients @ self.A, axis=1)
        reached = np.maximum(hidden_norms(slopes, v[:, None], self.A) * (1 + _ACCURACY), target)
        bending = upper > 0
        for i in np.flatnonzero(bounds > reached):
            if is_over(deadline):
                break
            found = lsq_linear(self.A[bending].T, gradients[i], (0, upper[bending]), method="bvls", tol=1e-15)
            rest = gradients[i] - found.x @ self.A[bending]
            bounds[i], slopes[i] = np.linalg.norm(rest), rest
        return float(bounds.max(initial=0.0)), normalise(slopes)


def few_cells(A: Float) -> bool:
    """Whether enumerating the cells of the rows of ``A`` (n, q) takes at most a second.

    Examples
    --------
    >>> import numpy as np
    >>> few_cells(np.ones((60, 3))), few_cells(np.ones((200, 6)))
    (True, False)
    """
    n, q = A.shape
    return bool(count_bound(n, q) * n << max(q - 3, 0) <= _ENTRIES)
