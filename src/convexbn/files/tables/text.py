"""CSV and TSV files, read in one pass, row by row."""

from __future__ import annotations

import csv
import re
from array import array
from collections.abc import Iterator
from functools import partial
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from convexbn.files.dataset import Dataset
from convexbn.files.tables.table import Selection, TableError, as_labels, check_memory, quoted

_LONGEST_LINE = 1 << 24

# Python's float() also takes "1_000" and the digits of every script: more than a table of numbers means.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)


def read_text(path: Path, wanted: Selection) -> Dataset:
    """Read a CSV or TSV file in one pass, row by row."""
    with path.open("rb") as stream:
        records = _records(stream)
        _, header = next(records, (0, None))
        if header is None:
            raise TableError("the file is empty; it needs a header line and at least one row")
        names = [cell.strip() for cell in header]
        if all(map(_NUMBER.fullmatch, names)):
            raise TableError(
                "line 1: all cells are numbers, so the header is missing; put a line of column names first, "
                "at least one of them not a number"
            )
        chosen = wanted.choose(names)
        wanted.check_rows(_estimated_rows(path), len(chosen))
        position = {name: index for index, name in enumerate(names)}
        label = None if wanted.target is None else position[wanted.target]
        values, labels = _parse(records, header, [position[name] for name in chosen], label)
    if not values:
        raise TableError("has a header but no rows; add at least one")
    matrix = np.frombuffer(values, dtype=np.float64).reshape(-1, len(chosen))
    y = None if label is None else _literals(labels)
    return Dataset(path.name, matrix, y, feature_names=chosen, target=wanted.target)


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Yield numbered lines, decoded one by one, so that a wrong byte has a line number."""
    for number, raw in enumerate(iter(partial(stream.readline, _LONGEST_LINE + 1), b""), start=1):
        if len(raw) > _LONGEST_LINE:
            raise TableError(f"line {number}: longer than {_LONGEST_LINE:,} bytes; break it into rows")
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise TableError(f"line {number}: not UTF-8 text; save the file as UTF-8") from error
        yield number, text.rstrip("\r\n")


def _records(stream: IO[bytes]) -> Iterator[tuple[int, list[str]]]:
    """Yield records with the number of their first line; refuse blank lines, except at the end of the file."""
    lines, separator, blank = _lines(stream), "", 0  # blank: the number of the first blank line
    for number, line in lines:  # the separator cuts the header, without its quoted cells, into the most cells
        separator = separator or max(",;\t", key=re.sub(r'"[^"]*"', "", line).count)
        if not line:
            blank = blank or number
        elif blank:
            raise TableError(f"line {blank}: is blank; delete it or fill in the row")
        elif '"' in line:
            yield number, _quoted_record(number, line, lines, separator)
        else:  # three times as fast as the csv module, with the same result
            yield number, line.split(separator)


def _quoted_record(number: int, line: str, later: Iterator[tuple[int, str]], separator: str) -> list[str]:
    """Cut a record with quoted cells, which may span several lines."""
    lines = (f"{text}\n" for _, text in chain([(number, line)], later))
    try:
        return next(csv.reader(lines, delimiter=separator, strict=True))
    except csv.Error as error:
        raise TableError(f"line {number}: cannot be cut into cells ({error}); check the quotes") from error


def _estimated_rows(path: Path) -> int:
    """Estimate the number of rows from the size of the file and the length of its first lines."""
    with path.open("rb") as stream:
        sample = stream.read(1 << 20)
    return path.stat().st_size * sample.count(b"\n") // len(sample)


def _parse(
    records: Iterator[tuple[int, list[str]]], header: list[str], columns: list[int], label: int | None
) -> tuple[array[float], list[str]]:
    """Return the features of all rows in one growing buffer, and the targets as text."""
    names = [cell.strip() for cell in header]
    values, labels = array("d"), list[str]()
    for line, row in records:
        if len(row) != len(header):
            raise TableError(f"line {line}: {len(row)} cells, and the header has {len(header)}; make them equal")
        if row == header:
            raise TableError(f"line {line}: repeats the header; delete this line")
        numbers = _numbers([row[i] for i in columns])
        values.extend(numbers or [_number(line, names[i], row[i].strip()) for i in columns])
        if label is not None:
            labels.append(_present(line, names[label], row[label].strip()))
        check_memory(8 * len(values))  # the estimate saw only the first lines
    return values, labels


def _numbers(cells: list[str]) -> list[float] | None:
    """Convert a row fast; return None if the cells must be examined one by one."""
    text = "".join(cells)
    if "_" in text or not text.isascii():
        return None
    try:
        numbers = list(map(float, cells))
    except ValueError:
        return None
    return numbers if isfinite(sum(numbers)) else None


def _number(line: int, name: str, cell: str) -> float:
    """Convert a cell of a feature column, or refuse it."""
    if _NUMBER.fullmatch(_present(line, name, cell)):
        return float(cell)
    comma = _NUMBER.fullmatch(cell.replace(",", "."))
    remedy = "write decimals with a point" if comma else "encode the column as numbers or leave it out (--drop)"
    raise TableError(f"line {line}: column {name!r} holds the text {quoted(cell)}, not a number; {remedy}")


def _present(line: int, name: str, cell: str) -> str:
    """Return a cell, number or text; refuse an empty cell and a number that is not finite."""
    if not cell:
        raise TableError(f"line {line}: column {name!r} is empty; fill in the cell or delete the row")
    if _NOT_FINITE.fullmatch(cell) or (_NUMBER.fullmatch(cell) and not isfinite(float(cell))):
        raise TableError(
            f"line {line}: column {name!r} holds {quoted(cell)}, not a finite number in float64; "
            "correct it or delete the row"
        )
    return cell


def _literals(cells: list[str]) -> NDArray[Any]:
    """Convert the texts of a target to int64 or float64 if all of them allow it."""
    if all(map(_INTEGER.fullmatch, cells)):
        try:
            return np.fromiter(map(int, cells), dtype=np.int64, count=len(cells))
        except OverflowError as error:
            raise TableError(
                "the target holds an integer beyond int64; write it as 1e20 if it is a value, or with a "
                "letter if it is a label"
            ) from error
    if all(map(_NUMBER.fullmatch, cells)):
        return np.fromiter(map(float, cells), dtype=np.float64, count=len(cells))
    return as_labels(cells)
