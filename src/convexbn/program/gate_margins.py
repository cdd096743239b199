"""Gates that keep their distance from training rows: rows rounded to float32 then fall on the same side.

The ReLU neurons that trained gates come from like to have their kink on training rows, on as many as they have weights.
Such a gate is moved in the whitened space so that all rows near it gain the same distance, half way to where another
row would change sides: no pattern changes, hence neither does the program.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from convexbn._types import Bool, Float, Index
from convexbn.data.blocks import BlockSize
from convexbn.data.row_matrix import Rows
from convexbn.data.whitening import Whitening
from convexbn.program.gates import gate_patterns, gates_along

#: Rows and responses that are held at once.
_BLOCK_ENTRIES = 1 << 20

#: Distance up to which rows are moved away from, in units of what rounding can move a response.
_NEAR = 64

#: Largest error of rounding, in deviations of a column, with which float32 holds the column.
_HELD = 1e-4


@np.errstate(all="ignore")
def apart_from_rows(X: Rows, whitening: Whitening, gates: Float, offsets: Float, patterns: Bool) -> tuple[Float, Float]:
    """Gates of equal patterns, moved where rounding the rows to float32 could take one across: (d, P), (P,).

    A pass over the rows finds the gates to move, ``2 d P`` flops a row; rows that float32 holds exactly need none.

    Parameters
    ----------
    X, whitening : ndarray (n, d) or RowMatrix, Whitening
    gates, offsets, patterns : ndarray (d, P), (P,), (n, P)
        ``patterns`` are those of ``gate_patterns``.
    """
    reach = np.abs(gates).T @ _rounding_errors(X, whitening.deviations)
    near: list[Index] = []
    doubtful, largest = np.zeros(len(offsets), dtype=bool), np.zeros(len(offsets))
    for part, responses in _responses(X, whitening.mean, gates, offsets) if reach.any() else ():
        distances = np.abs(responses)
        doubtful |= (distances < reach).any(axis=0)
        largest = np.maximum(largest, distances.max(axis=0))
        near.append(np.argwhere(distances <= _NEAR * reach) + np.array([part.start, 0]))
    moved = np.flatnonzero(doubtful & np.isfinite(reach))
    if not len(moved):
        return gates, offsets
    rows, columns = np.concatenate(near).T
    steps = np.column_stack([_step(whitening, rows[columns == j], patterns[:, j]) for j in moved])
    old = gates[:, moved], offsets[moved]
    sizes = np.minimum(largest[moved], 0.5 * _limits(X, whitening, old, patterns[:, moved], steps))
    change, shift = gates_along(whitening, steps * sizes)
    new = old[0] + change, old[1] + shift
    same = (gate_patterns(X, whitening.mean, *new) == patterns[:, moved]).all(axis=0)
    gates, offsets = gates.copy(), offsets.copy()
    gates[:, moved[same]], offsets[moved[same]] = new[0][:, same], new[1][same]
    return gates, offsets


def _step(whitening: Whitening, rows: Index, pattern: Bool) -> Float:
    """Shortest step (q,) that takes all of some rows one unit further from a gate."""
    signed = np.column_stack([whitening.rows[rows], np.where(pattern[rows], 1.0, -1.0)])
    signed = np.unique(signed, axis=0)  # patches repeat
    found: Float = np.linalg.lstsq(signed[:, :-1], signed[:, -1])[0]
    return found


def _limits(X: Rows, whitening: Whitening, gates: tuple[Float, Float], patterns: Bool, steps: Float) -> Float:
    """Largest multiple of each step that takes no row across its gate: (P,).

    Parameters
    ----------
    X, whitening, gates, patterns : ndarray (n, d) or RowMatrix, Whitening, (directions, offsets), ndarray (n, P)
    steps : ndarray (q, P)
    """
    limits = np.full(steps.shape[1], np.inf)
    for part, responses in _responses(X, whitening.mean, *gates):
        side = np.where(patterns[part], 1.0, -1.0)
        gains = side * (whitening.rows[part] @ steps)
        limits = np.minimum(limits, np.where(gains < 0, side * responses / -gains, np.inf).min(axis=0))
    return np.maximum(limits, 0.0)


def _responses(X: Rows, mean: Float, gates: Float, offsets: Float) -> Iterator[tuple[slice, Float]]:
    """Slices of the rows, and their responses to the gates (b, P)."""
    for part in BlockSize(max(gates.shape), _BLOCK_ENTRIES, least=64).slices(len(X)):
        yield part, (np.asarray(X[part], dtype=np.float64) - mean) @ gates + offsets


def _rounding_errors(X: Rows, deviations: Float) -> Float:
    """Largest error of each column (d,) when rows are rounded to float32; 0 for columns that it does not hold."""
    errors = np.zeros(X.shape[1])
    if not np.can_cast(X.dtype, np.float32):
        for part in BlockSize(X.shape[1], _BLOCK_ENTRIES).slices(len(X)):
            block = np.asarray(X[part], dtype=np.float64)
            errors = np.maximum(errors, np.abs(block - block.astype(np.float32)).max(axis=0))
    return np.where(errors <= _HELD * deviations, errors, 0.0)
