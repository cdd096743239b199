"""Checks that all table formats share: names, memory, finite numbers, labels."""

from __future__ import annotations

import os
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Half of the physical memory in bytes; 4 GiB where the system does not tell its size (Windows).
MEMORY_BUDGET = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 4 << 30
_LONGEST_LABEL = 256  # numpy stores every label as wide as the longest: one long text would cost n times its size
UNNAMED = ("", "__index_level_0__")  # pandas' row index: as a feature, a column nobody meant
_LABEL_BYTES = 80  # a CSV target is text until its last cell is seen: one Python string per row

_quoter = reprlib.Repr()
_quoter.maxstring = 80
quoted = _quoter.repr


class TableError(ValueError):
    """A file cannot be read as a table; the message is one sentence with cause and remedy."""


class Reading(NamedTuple):
    """How cells are read.

    Attributes
    ----------
    target : {"auto", "number", "label", "text"}
        What the target of a text file is: see `read_table`; a number; a label, an integer or text as it is written;
        text.
    strict : bool
        Whether features are finite numbers and nothing else. False: they become a `Table`.
    decimal : {",", "."}, optional
        Decimal mark of a text file that is not strict. None: a point, and a comma in columns that can mean nothing
        else.
    texts : sequence of str, optional
        The columns of text, of a file that is not strict; all others are numbers. None: the cells decide.
    verbatim : sequence of str
        Columns to return as they are written, besides.
    """

    target: str = "auto"
    strict: bool = True
    decimal: str | None = None
    texts: Sequence[str] | None = None
    verbatim: Sequence[str] = ()


class Selection(NamedTuple):
    """Columns to read: a target or None, the features in order, or None for all other columns, but those dropped."""

    target: str | None
    features: Sequence[str] | None
    dropped: Sequence[str] = ()
    reading: Reading = Reading()

    def choose(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the names of the feature columns among the names of all columns."""
        known = Counter(names)
        if repeated := [name for name, times in known.items() if times > 1]:
            raise TableError(f"several columns are called {listed(repeated)}; give each its own name")
        chosen = tuple(name for name in names if name != self.target) if self.features is None else tuple(self.features)
        wanted = (*chosen, self.target, *self.dropped, *self.reading.verbatim)
        if missing := [name for name in wanted if name is not None and name not in known]:
            raise TableError(f"has no column {listed(missing)}; its columns are {listed(names)}")
        if self.target in self.dropped:
            raise TableError(f"column {self.target!r} is asked for as target and to be left out (--drop); choose one")
        if self.target in chosen:
            raise TableError(f"column {self.target!r} is asked for as target and as feature; name it once")
        chosen = tuple(name for name in chosen if name not in self.dropped)
        if not self.reading.strict and self.features is None:
            chosen = tuple(name for name in chosen if name not in UNNAMED)
        for unnamed in UNNAMED:
            if unnamed in chosen:
                position = names.index(unnamed) + 1
                raise TableError(
                    f"column {position} has no name; name it, or if it numbers the rows, leave it out (--drop)"
                )
        if not chosen:
            raise TableError("no feature column is left; a table needs one besides the target")
        return chosen

    def told(self, names: Sequence[str]) -> list[str]:
        """Return lines on the columns that `choose` left out because they have no name."""
        unnamed = [] if self.reading.strict or self.features is not None else [*set(UNNAMED).intersection(names)]
        return [
            f"left out: column {names.index(name) + 1}, which has no name" for name in unnamed if name != self.target
        ]

    def check_rows(self, rows: int, columns: int) -> None:
        """Refuse, before they are read, more rows of features and target than the memory allows."""
        texts = (self.target is not None) + len(self.reading.verbatim)
        check_memory(rows * (8 * columns + _LABEL_BYTES * texts))


@contextmanager
def sound(kind: str, *damage: type[Exception]) -> Iterator[None]:
    """Turn the errors that another library raises on damaged bytes into a `TableError`."""
    try:
        yield
    except TableError:
        raise
    except damage as error:
        raise TableError(f"no sound {kind} ({cause(error)}); write it again") from error


def cause(error: Exception) -> str:
    """Quote another library's message on one line."""
    return shorten(str(error), 120) or type(error).__name__


def listed(names: Sequence[str]) -> str:
    """Quote names for a message, the first twenty of them."""
    shown = ", ".join(map(quoted, names[:20]))
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20:,} more"


def check_memory(needed: int) -> None:
    """Refuse a table that would not leave half of the memory free."""
    if needed > MEMORY_BUDGET:
        raise TableError(
            f"needs about {needed:,} bytes of memory and {MEMORY_BUDGET:,} are allowed, half of all; "
            "keep fewer rows or columns"
        )


def finite(values: NDArray[Any], name: str, before: int = 0) -> NDArray[Any]:
    """Return a column; refuse floats that are NaN or infinite.

    Parameters
    ----------
    values : ndarray (n,)
    name : str
    before : int
        Number of earlier rows, for the message.
    """
    if values.dtype.kind == "f" and not (held := np.isfinite(values)).all():
        row = int(held.argmin())
        raise TableError(
            f"row {before + row + 1}: column {name!r} holds {values[row]}, not a finite number; "
            "correct it or delete the row"
        )
    return values


def exactly(values: NDArray[Any], name: str, before: int = 0) -> NDArray[Any]:
    """Return a column; refuse integers beyond 2^53 that float64 does not hold exactly.

    Parameters
    ----------
    values : ndarray (n,)
    name : str
    before : int
        Number of earlier rows, for the message.
    """
    if values.dtype.kind in "iu" and values.dtype.itemsize == 8:
        for row in np.flatnonzero(np.abs(values.astype(np.float64)) >= 2**53):
            if int(values[row]) != int(float(values[row])):
                raise TableError(
                    f"row {before + row + 1}: column {name!r} holds {values[row]}, an integer beyond 2^53 that float64 "
                    "does not hold exactly; subtract an offset or leave the column out (--drop)"
                )
    return values


def declared(values: NDArray[Any], name: str) -> NDArray[Any]:
    """Convert a target of declared type: integers to int64, floats to float64; text stays as it is."""
    if values.dtype.kind == "U":
        return values
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):
            return values.astype(np.float64, copy=False)
    if values.dtype.kind not in "biu":
        raise TableError(f"the target {name!r} is {values.dtype}; choose one of numbers or text")
    if values.dtype == np.uint64 and values.max(initial=0) > np.iinfo(np.int64).max:
        raise TableError(f"the target {name!r} holds {values.max()}, beyond int64; use smaller labels")
    return values.astype(np.int64, copy=False)


def as_labels(texts: Sequence[str]) -> NDArray[np.str_]:
    """Store class labels as a numpy array of text."""
    longest = max(texts, key=len, default="")
    if len(longest) > _LONGEST_LABEL:
        raise TableError(
            f"the target holds {quoted(longest)} of {len(longest):,} characters, and a class label may have "
            f"{_LONGEST_LABEL}; choose another target"
        )
    check_memory(4 * len(longest) * len(texts))
    return np.array(texts, dtype=np.str_)
