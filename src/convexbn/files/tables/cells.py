"""Cells of a column of a text file: numbers, missing, or text, and what they make of the column."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from math import isfinite, nan
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from convexbn.files.tables.table import TableError, as_labels, quoted

# Python's float() also takes "1_000" and the digits of every script: more than a table of numbers means.
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)
_CODE = re.compile(r"0\d+", re.ASCII)
_COMMA = re.compile(r"[+-]?(\d+,\d*|,\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}([.,' ]\d{3})+([.,]\d+)?", re.ASCII)

#: What stands for a missing number; of a column of text an empty cell alone is missing.
_MISSING = {"", "na", "n/a", "#n/a", "<na>", "nan", "-nan", "null", "none", "?", "-", "."}
#: Largest share of other cells in a column that is meant to be numbers.
_FEW = 0.1


def exact(cell: str) -> bool:
    """Whether float64 holds a number as it is written, if it is an integer."""
    if not INTEGER.fullmatch(cell):
        return True
    digits = cell.lstrip("+-0") or "0"
    return len(digits) < 310 and int(float(digits)) == int(digits)


def kind_of(cell: str) -> str:
    """``number``, ``not finite``, ``inexact``, ``missing``, ``text``, or with commas ``comma`` or ``thousands``."""
    if cell.lower() in _MISSING:
        return "missing"
    if NUMBER.fullmatch(cell):
        return ("number" if exact(cell) else "inexact") if isfinite(float(cell)) else "not finite"
    if NOT_FINITE.fullmatch(cell):
        return "not finite"
    if _THOUSANDS.fullmatch(cell):  # 1,234 may be either
        return "thousands"
    return "comma" if _COMMA.fullmatch(cell) else "text"


class TextColumn(NamedTuple):
    """A column as it is written, without blanks around its cells, and the line of each."""

    name: str
    cells: Sequence[str]
    lines: Sequence[int]


class _Kinds:
    """Kinds of the cells of a column."""

    def __init__(self, column: TextColumn) -> None:
        self.column = column
        self.cells = Counter(column.cells)
        self.of = {cell: kind_of(cell) for cell in self.cells}

    @cached_property
    def counts(self) -> Counter[str]:
        """Number of cells of each kind."""
        counts = Counter[str]()
        for cell, times in self.cells.items():
            counts[self.of[cell]] += times
        return counts

    def refuse(self, kinds: Iterable[str], reason: str) -> None:
        """Raise an error with the first cell of some kinds, if there is one."""
        kinds = set(kinds)
        for line, cell in zip(self.column.lines, self.column.cells, strict=True):
            if self.of[cell] in kinds:
                raise TableError(f"line {line}: column {self.column.name!r} holds {quoted(cell)}{reason}")


def has_decimal_commas(column: TextColumn) -> bool:
    """Whether the cells are numbers, some of them with a comma that can be a decimal mark alone."""
    if not any("," in cell for cell in column.cells):
        return False
    counts = _Kinds(column).counts
    return counts["comma"] > 0 and not counts["text"] and not counts["not finite"]


def numbers(column: TextColumn, decimal: str, remedy: str, few: float = _FEW) -> NDArray[np.float64] | None:
    """Numbers of a column, NaN where a cell is missing; None if it is text.

    A column of numbers but for a few cells is refused with the line of the first.

    Parameters
    ----------
    column : TextColumn
    decimal : {".", ","}
        Decimal mark of numbers that have a comma.
    remedy : str
        End of the sentence that refuses a cell.
    few : float
        Largest share of other cells in a column that is meant to be numbers.
    """
    if (plain := _plain(column.cells)) is not None:
        return plain
    kinds = _Kinds(column)
    counts = kinds.counts
    with_comma = counts["comma"] + counts["thousands"]
    words = counts["text"] + counts["not finite"] + counts["inexact"]
    present = len(column.cells) - counts["missing"]
    if words > few * present and counts["text"]:
        return None
    kinds.refuse(("text",), f" among numbers; {remedy}")
    kinds.refuse(("inexact",), f", an integer beyond 2^53 that float64 does not hold exactly; {remedy}")
    kinds.refuse(("not finite",), f", not a finite number in float64; {remedy}")
    if with_comma and decimal == ".":
        kinds.refuse(("comma",), ", not a number; write decimals with a point, or give --decimal ,")
        way = "; write it without separators of thousands, or give --decimal , if the comma is a decimal mark"
        kinds.refuse(("thousands",), way)
    if with_comma:
        points = [cell for cell in kinds.cells if kinds.of[cell] == "number" and "." in cell]
        if points or any(_decimal(cell) is None for cell in kinds.cells if kinds.of[cell] == "thousands"):
            kinds.refuse(("comma", "thousands"), " beside decimals or thousands with a point; write all in one way")
    values = {cell: nan if kind == "missing" else _decimal(cell) for cell, kind in kinds.of.items()}
    return np.array([values[cell] for cell in column.cells], dtype=np.float64)


def _plain(cells: Sequence[str]) -> NDArray[np.float64] | None:
    """Finite numbers of cells that hold nothing else, in a third of the time."""
    if not all(map(NUMBER.fullmatch, cells)):
        return None
    values = np.fromiter(map(float, cells), dtype=np.float64, count=len(cells))
    large = np.flatnonzero(np.abs(values) >= 2**53)
    return values if np.isfinite(values).all() and all(exact(cells[row]) for row in large.tolist()) else None


def _decimal(cell: str) -> float | None:
    """Number with a point or one decimal comma."""
    cell = cell.replace(",", ".", 1)
    return float(cell) if NUMBER.fullmatch(cell) else None


def text(column: TextColumn) -> NDArray[Any]:
    """Text of a column as it is written, None where a cell is empty."""
    return np.array([cell or None for cell in column.cells], dtype=object)


def target_of(column: TextColumn, kind: str, decimal: str) -> NDArray[Any]:
    """Target of a column of cells.

    Parameters
    ----------
    column : TextColumn
    kind : str
        As in `Reading`.
    decimal : {".", ","}
    """
    if kind == "text":
        return as_labels(column.cells)
    if all(map(INTEGER.fullmatch, column.cells)):
        codes = kind != "number" and any(map(_CODE.fullmatch, column.cells))  # 01 is not 1
        return as_labels(column.cells) if codes else _integers(column.cells)
    if kind != "label" and (values := _plain(column.cells)) is not None:
        return values
    _check_present(column)
    remedy = "correct it" if kind == "number" else "correct it, or if it is a label, give --task classification"
    values = None if kind == "label" else numbers(column, decimal, remedy)
    if values is None:
        return as_labels(column.cells)
    _Kinds(column).refuse(("missing",), f" among numbers; {remedy}, or delete the row")
    return values


def _check_present(column: TextColumn) -> None:
    """Refuse empty cells, and numbers that are not finite."""
    for line, cell in zip(column.lines, column.cells, strict=True):
        if not cell:
            raise TableError(f"line {line}: column {column.name!r} is empty; fill in the cell or delete the row")
        if NOT_FINITE.fullmatch(cell) or (NUMBER.fullmatch(cell) and not isfinite(float(cell))):
            raise TableError(
                f"line {line}: column {column.name!r} holds {quoted(cell)}, not a finite number in float64; "
                "correct it or delete the row"
            )


def _integers(cells: Sequence[str]) -> NDArray[np.int64]:
    try:
        return np.fromiter(map(int, cells), dtype=np.int64, count=len(cells))
    except OverflowError as error:
        raise TableError(
            "the target holds an integer beyond int64; write it as 1e20 if it is a value, or with a "
            "letter if it is a label"
        ) from error
