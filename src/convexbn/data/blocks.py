"""Blocks of rows: large arrays are read and made a bounded number of entries at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockSize:
    """Number of rows in a block: as many as ``entries`` allow.

    Parameters
    ----------
    width, entries : int
        Entries that a row takes, and that a block may take.
    least : int, default=1
        Fewest rows of a block, whatever their width.
    together : int, default=1
        Consecutive rows of a case, which stay in one block; it divides the number of rows.

    Examples
    --------
    >>> list(BlockSize(width=3, entries=12).slices(10))
    [slice(0, 4, None), slice(4, 8, None), slice(8, 12, None)]
    """

    width: int
    entries: int
    least: int = 1
    together: int = 1

    def slices(self, n: int) -> Iterator[slice]:
        """Slices of ``n`` rows, in order; the last may end beyond them."""
        size = -(-max(self.least, self.entries // max(self.width, 1)) // self.together) * self.together
        return map(slice, range(0, n, size), range(size, n + size, size))

    def cases(self, part: slice) -> slice:
        """Slice of the cases that a slice of rows holds."""
        return part if self.together == 1 else slice(part.start // self.together, part.stop // self.together)
