"""Kernels of raw rows: functions of one block, written against its array namespace.

Per row of ``d`` numbers ``weighted_gram`` takes ``2 d^2`` flops and ``projected`` ``2 d r``. Both are matrix products
and run at their speed; on the host ``moments.weighted_sums`` adds up one triangle of the Gram matrix in place instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

_NAMESPACES: dict[type, Any] = {}


def namespace(array: Any) -> Any:
    """Array namespace of an array, cached by type: the look-up takes as long as a product of some dozens of rows."""
    kind = type(array)
    if kind not in _NAMESPACES:
        _NAMESPACES[kind] = array_namespace(array)
    return _NAMESPACES[kind]


def positive_part(array: Any) -> Any:
    """``(a)_+`` of an array, which may be overwritten."""
    if isinstance(array, np.ndarray):
        return np.maximum(array, 0, out=array)
    xp = namespace(array)
    return xp.maximum(array, xp.zeros((), dtype=array.dtype, device=device(array)))


def cast(array: Any, dtype: Any) -> Any:
    """Array in a precision: itself if it has it."""
    return array if array.dtype == dtype else namespace(array).astype(array, dtype)


def like(array: Any, host: np.ndarray) -> Any:
    """Copy of a NumPy array in the namespace, on the device and in the precision of another array."""
    return namespace(array).asarray(host, dtype=array.dtype, device=device(array))


def scaled(block: Any, dtype: Any, *factors: Any) -> Any:
    """Rows in a precision, their columns multiplied by factors: (b, d).

    Parameters
    ----------
    block, dtype : array (b, d) of any real type, data type of its namespace
    *factors : array (d,)
        Powers of two, see ``scaling.powers``.
    """
    block = cast(block, dtype)
    for factor in factors:
        block = block * factor
    return block


def weighted_gram(block: Any, weights: Any, mean: Any, *factors: Any) -> tuple[Any, Any]:
    """``sum w (x - mean)(x - mean)'`` (d, d) and ``sum w (x - mean)`` (d,) of scaled rows.

    Parameters
    ----------
    block, weights, mean, *factors : array (b, d), (b,), (d,), (d,)
        The factors are those of ``scaled``.
    """
    root = namespace(weights).sqrt(weights)
    rows = root[:, None] * (scaled(block, weights.dtype, *factors) - mean)
    return rows.T @ rows, root @ rows


def projected(block: Any, mean: Any, projection: Any, *factors: Any) -> Any:
    """``(x - mean)' projection`` of scaled rows, in the precision of the projection: (b, r).

    Parameters
    ----------
    block, mean, projection, *factors : array (b, d), (d,), (d, r), (d,)
        The factors are those of ``scaled``.
    """
    return (scaled(block, projection.dtype, *factors) - mean) @ projection


def squared_norms(block: Any) -> Any:
    """Squared norms of the rows of a block: (b, q) -> (b,)."""
    return namespace(block).vecdot(block, block)
