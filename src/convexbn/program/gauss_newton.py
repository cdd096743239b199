"""Gauss-Newton matrices ``J' L'' J`` of a loss in the variables behind its outputs, summed over blocks of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from convexbn._types import Float
from convexbn.data.blocks import BlockSize

#: ``R_i' J_i`` (b, K, size) of some rows, from their ``R`` and their slice.
Derivative: TypeAlias = Callable[[Float, slice], Float]

#: Doubles of the derivative that are formed at a time.
_BLOCK = 1 << 19


def sum_of_squares(root: Float, derivative: Derivative, size: int, rows_per_case: int = 1) -> Float:
    """Sum ``(R_i' J_i)'(R_i' J_i)`` over cases: (size, size).

    Parameters
    ----------
    root : ndarray (n, K', K)
        ``R_i`` with ``R_i R_i'`` the second derivative of the loss, see ``Loss.hessian_root``.
    derivative, size : Derivative, int
        ``R_i' J_i``, and the number of variables.
    rows_per_case : int, default=1
        Consecutive rows whose ``R_i' J_i`` are one term.
    """
    n, _, K = root.shape
    total = np.zeros((size, size))
    for part in BlockSize(K * max(size, 1), _BLOCK, together=rows_per_case).slices(n):
        flat = derivative(root[part], part).reshape(-1, rows_per_case, K * size).sum(axis=1).reshape(-1, size)
        total += flat.T @ flat
    return total
