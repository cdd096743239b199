"""Outputs of a ReLU network on many rows: blocks of rows that threads share, and no hidden layer as a whole."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from convexbn._threads import dealt
from convexbn._types import Float, FloatMatrix
from convexbn.data.row_matrix import MappedRows
from convexbn.program.losses import Loss

#: Entries of the hidden layer that are formed at a time: 4 MB in float64.
_BLOCK_ENTRIES = 1 << 19


def relu_outputs(rows: FloatMatrix | MappedRows, loss: Loss, first: Float, output: Float) -> Float:
    """What the terms of the loss see of ``(A first)_+`` and an output layer, in float64; made as precisely as the rows.

    ``2 n m (q + K)`` flops, and one reading of rows that are made when they are read.
    """
    first, output = (weight.astype(rows.dtype, copy=False) for weight in (first, output))

    def outputs(part: slice) -> FloatMatrix:
        hidden: FloatMatrix = rows[part] @ first
        return loss.outputs(np.maximum(hidden, 0, out=hidden), output)

    parts = row_blocks(len(rows), len(output), loss.rows_together)
    return np.concatenate(list(dealt(outputs, parts))).astype(np.float64, copy=False)


def row_blocks(n: int, width: int, together: int = 1) -> Iterator[slice]:
    """Slices of the rows, such that a hidden layer of this width is of bounded size; ``together`` stay in one."""
    size = -(-max(256, _BLOCK_ENTRIES // max(width, 1)) // together) * together
    for start in range(0, n, size):
        yield slice(start, start + size)
