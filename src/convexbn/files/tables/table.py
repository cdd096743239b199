"""The checks that every format of a table shares: names, memory, finite numbers, labels."""

from __future__ import annotations

import os
import reprlib
from collections import Counter
from collections.abc import Sequence
from textwrap import shorten
from typing import Any

import numpy as np
from numpy.typing import NDArray


def _half_of_physical_memory() -> int:
    """Return half of this machine's memory in bytes; 4 GiB where the system does not tell (Windows)."""
    if not hasattr(os, "sysconf"):
        return 4 << 30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


MEMORY_BUDGET = _half_of_physical_memory()
_LONGEST_LABEL = 256  # numpy stores every label as wide as the longest: one long text would cost n times its size
_LABEL_BYTES = 80  # a CSV target is text until its last cell is seen: one Python string a row

_quoter = reprlib.Repr()
_quoter.maxstring = 80
quoted = _quoter.repr


class TableError(ValueError):
    """A file that cannot be read as a table; the message is one sentence with the cause and the remedy."""


def choose(names: Sequence[str], target: str | None, features: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the feature columns: those asked for, or all but the target."""
    known = Counter(names)
    if len(known) < len(names):
        repeated = [name for name, times in known.items() if times > 1]
        raise TableError(f"several columns are called {listed(repeated)}; give each its own name")
    chosen = tuple(name for name in names if name != target) if features is None else tuple(features)
    missing = [name for name in (*chosen, target) if name is not None and name not in known]
    if missing:
        raise TableError(f"has no column {listed(missing)}; its columns are {listed(names)}")
    if target in chosen:
        raise TableError(f"column {target!r} is asked for as target and as feature; name it once")
    for unnamed in ("", "__index_level_0__"):  # pandas' row index: as a feature, a column nobody meant
        if unnamed in chosen:
            position = names.index(unnamed) + 1
            raise TableError(f"column {position} has no name; name it, or if it numbers the rows, leave it out")
    if not chosen:
        raise TableError("no feature column is left; a table needs one besides the target")
    return chosen


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


def check_rows(rows: int, columns: int, target: str | None) -> None:
    """Refuse so many rows of features, and a target where there is one, before they are read."""
    check_memory(rows * (8 * columns + (0 if target is None else _LABEL_BYTES)))


def check_finite(values: NDArray[Any], name: str, before: int = 0) -> None:
    """Refuse a column with NaN or infinity; `before` of its rows were checked already."""
    finite = np.isfinite(values)
    if not finite.all():
        row = int(finite.argmin())
        raise TableError(
            f"row {before + row + 1}: column {name!r} holds {values[row]}, not a finite number; "
            "correct it or delete the row"
        )


def declared(values: NDArray[Any], name: str, before: int = 0) -> NDArray[Any]:
    """Convert a column whose type is known: integers to int64, floats to float64, text as it is."""
    if values.dtype.kind == "U":
        return values
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):
            result = values.astype(np.float64, copy=False)
        check_finite(result, name, before)
        return result
    if values.dtype.kind not in "biu":
        raise TableError(f"the target {name!r} is {values.dtype}; choose one of numbers or text")
    if values.dtype == np.uint64 and values.max(initial=0) > np.iinfo(np.int64).max:
        raise TableError(f"the target {name!r} holds {values.max()}, beyond int64; use smaller labels")
    return values.astype(np.int64, copy=False)


def as_labels(texts: list[str]) -> NDArray[np.str_]:
    """Store class labels as a numpy array of text."""
    longest = max(texts, key=len, default="")
    if len(longest) > _LONGEST_LABEL:
        raise TableError(
            f"the target holds {quoted(longest)} of {len(longest):,} characters, and a class label may "
            f"have {_LONGEST_LABEL}; choose another target"
        )
    check_memory(4 * len(longest) * len(texts))
    return np.array(texts, dtype=np.str_)
