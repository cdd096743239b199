"""Blocks of rows: large arrays are read and made a bounded number of entries at a time."""

from __future__ import annotations

from collections.abc import Iterator


def row_blocks(n: int, width: int, *, entries: int, least: int = 1, together: int = 1) -> Iterator[slice]:
    """Slices of ``n`` rows, in order, such that so many rows of ``width`` numbers have about ``entries`` numbers.

    Parameters
    ----------
    n : int
        Number of rows.
    width : int
        Numbers that a row takes.
    entries : int
        Numbers that a block may take.
    least : int, default=1
        Fewest rows of a block, whatever their width.
    together : int, default=1
        Consecutive rows that stay in one block; ``n`` is a multiple.

    Examples
    --------
    >>> list(row_blocks(10, 3, entries=12))
    [slice(0, 4, None), slice(4, 8, None), slice(8, 12, None)]
    """
    size = -(-max(least, entries // max(width, 1)) // together) * together
    return (slice(start, start + size) for start in range(0, n, size))
