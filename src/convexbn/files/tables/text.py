"""CSV and TSV files, read in one pass, row by row."""

from __future__ import annotations

import csv
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from math import isfinite, nan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convexbn.files.dataset import Dataset, Table
from convexbn.files.tables.cells import (
    NOT_FINITE,
    NUMBER,
    TextColumn,
    exact,
    has_decimal_commas,
    kind_of,
    numbers,
    target_of,
    text,
)
from convexbn.files.tables.source import COMPRESSED, opened
from convexbn.files.tables.table import Selection, TableError, check_memory, listed, quoted

_LONGEST_LINE = 1 << 24
#: Rows whose cells tell which columns are text, before any is converted.
_FIRST_ROWS = 100
_SEPARATOR = re.compile(r'"?sep=(.)"?', re.IGNORECASE)


class _Rows(NamedTuple):
    """Rows of a file.

    Attributes
    ----------
    features : tuple of str
        Columns that were asked for.
    names : list of str
        Those of them that are numbers.
    values : array of float
        Row by row, NaN where a cell is missing.
    columns : dict of str to TextColumn
        Columns that are kept as text.
    odd : set of str
        Columns among the numbers that hold text after all.
    notes : list of str
        On columns without a name.
    """

    features: tuple[str, ...]
    names: list[str]
    values: array[float]
    columns: dict[str, TextColumn]
    odd: set[str]
    notes: list[str]


def read_text(path: Path, wanted: Selection) -> Dataset:
    """Read a CSV or TSV file in one pass, or two if a column turns out to be text late."""
    reading, target = wanted.reading, wanted.target
    rows = _read(path, wanted, set())
    if rows.odd:
        rows = _read(path, wanted, rows.odd)
    n = len(next(iter(rows.columns.values())).cells) if rows.columns else len(rows.values) // len(rows.names)
    matrix = np.frombuffer(rows.values, dtype=np.float64).reshape(n, len(rows.names))
    decimal = reading.decimal or "."
    read_as_numbers = [rows.columns[name] for name in (*rows.features, target) if name in rows.columns]
    if not (reading.strict or reading.decimal) and any(map(has_decimal_commas, read_as_numbers)):
        decimal = ","
    y = None if target is None else target_of(rows.columns[target], reading.target, decimal)
    X: Any = matrix if reading.strict else _table(matrix, rows, decimal, reading.texts)
    commas = [column.name for column in read_as_numbers if decimal == "," and has_decimal_commas(column)]
    return Dataset(
        path.name, X, y, feature_names=rows.features, target=target,
        verbatim={name: rows.columns[name].cells for name in reading.verbatim},
        notes=(*rows.notes, *([f"read with decimal commas: {listed(commas)}"] if commas else ())),
    )  # fmt: skip


def _table(matrix: np.ndarray, rows: _Rows, decimal: str, known: Sequence[str] | None) -> Table:
    """Table of the number columns and of those that are kept as text, some of which may be numbers too.

    Parameters
    ----------
    matrix, rows, decimal : ndarray, _Rows, str
    known : sequence of str, optional
        The columns of text. None: the cells decide.
    """
    remedy, few = "correct it or leave the column out (--drop)", {} if known is None else {"few": 1.0}
    texts, more, names = {}, [matrix], list(rows.names)
    for name in rows.features:
        if name not in names:
            column = rows.columns[name]
            values = None if name in (known or ()) else numbers(column, decimal, remedy, **few)
            if values is None:
                texts[name] = text(column)
            else:
                more.append(values[:, None])
                names.append(name)
    return Table(matrix if len(more) == 1 else np.hstack(more), tuple(names), texts)


def _read(path: Path, wanted: Selection, texts: set[str]) -> _Rows:
    """Read a file once, some columns as text."""
    reading, strict = wanted.reading, wanted.reading.strict
    with opened(path, strict=strict) as stream:
        records = _records(stream, strict)
        _, header = next(records, (0, None))
        if header is None:
            raise TableError("the file is empty; it needs a header line and at least one row")
        names = [cell.strip() for cell in header]
        if all(map(NUMBER.fullmatch, names)):
            raise TableError(
                "line 1: all cells are numbers, so the header is missing; put a line of column names first, "
                "at least one of them not a number"
            )
        chosen = wanted.choose(names)
        wanted.check_rows(_estimated_rows(path), len(chosen))
        if reading.texts is not None:
            texts = texts.union(reading.texts)
        elif not strict:
            first = list(islice(records, _FIRST_ROWS))
            records = chain(first, records)
            odd = [{n for n, cell in zip(names, row, strict=False) if _is_text(cell.strip())} for _, row in first]
            texts = texts.union(*odd)
        kept = [name for name in chosen if name not in texts]
        as_text = [*(name for name in chosen if name in texts), *reading.verbatim]
        as_text = list(dict.fromkeys(as_text if wanted.target is None else [*as_text, wanted.target]))
        found = set[str]()
        values, cells, lines = _parse(records, header, kept, as_text, None if strict else found.add)
    if not (values or lines):
        raise TableError("has a header but no rows; add at least one")
    columns = {name: TextColumn(name, column, lines) for name, column in zip(as_text, cells, strict=True)}
    return _Rows(chosen, kept, values, columns, found, wanted.told(names))


def _is_text(cell: str) -> bool:
    return kind_of(cell) not in ("number", "missing")


def _lines(stream: Any) -> Iterator[tuple[int, str]]:
    """Yield numbered lines, decoded one by one, so that a wrong byte has a line number."""
    for number, raw in enumerate(iter(partial(stream.readline, _LONGEST_LINE + 1), b""), start=1):
        if len(raw) > _LONGEST_LINE:
            raise TableError(f"line {number}: longer than {_LONGEST_LINE:,} bytes; break it into rows")
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise TableError(f"line {number}: not UTF-8 text; save the file as UTF-8") from error
        yield number, text.rstrip("\r\n")


def _records(stream: Any, strict: bool) -> Iterator[tuple[int, list[str]]]:
    """Yield records with the number of their first line; refuse blank lines, except at the end of the file."""
    lines, separator, blank = _lines(stream), "", 0  # blank: the number of the first blank line
    for number, line in lines:  # the separator cuts the header, without its quoted cells, into the most cells
        if number == 1 and (named := _SEPARATOR.fullmatch(line)):
            if strict:
                raise TableError(f"line 1: {quoted(line)} names a separator and is no header; delete the line")
            separator = named[1]
            continue
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
    """Estimate the number of rows from the size of the file and the length of its first lines; 0 if compressed."""
    if path.suffix.lower() in COMPRESSED:
        return 0
    with path.open("rb") as stream:
        sample = stream.read(1 << 20)
    return path.stat().st_size * sample.count(b"\n") // len(sample)


def _parse(
    records: Iterable[tuple[int, list[str]]],
    header: list[str],
    columns: list[str],
    texts: list[str],
    note_text: Callable[[str], object] | None,
) -> tuple[array[float], list[list[str]], array[int]]:
    """Read all rows: columns of numbers in one growing buffer, columns of text, and the lines of these.

    Parameters
    ----------
    records, header : iterable, list
        Rows with their lines, and the first.
    columns, texts : list of str
        Names of the columns of numbers and of text.
    note_text : callable, optional
        Called with the name of a number column that holds text. None: such a cell and missing ones are refused.
    """
    names = [cell.strip() for cell in header]
    numeric, verbatim = ([names.index(name) for name in of] for of in (columns, texts))
    values, cells, lines = array("d"), [list[str]() for _ in texts], array("q")
    known = dict[str, str]()  # equal texts are one object
    for line, row in records:
        if len(row) != len(header):
            raise TableError(f"line {line}: {len(row)} cells, and the header has {len(header)}; make them equal")
        if row == header:
            raise TableError(f"line {line}: repeats the header; delete this line")
        if (converted := _numbers([row[i] for i in numeric])) is None:
            convert = _number if note_text is None else partial(_number_or_nan, note_text)
            converted = [convert(line, names[i], row[i].strip()) for i in numeric]
        values.extend(converted)
        if texts:
            lines.append(line)
            for column, i in zip(cells, verbatim, strict=True):
                cell = row[i].strip()
                column.append(known.setdefault(cell, cell))
        check_memory(8 * (len(values) + len(lines) * (1 + len(texts))))  # the estimate saw only the first lines
    return values, cells, lines


def _numbers(cells: list[str]) -> list[float] | None:
    """Convert a row fast; return None if the cells must be examined one by one."""
    text = "".join(cells)
    if "_" in text or not text.isascii():
        return None
    try:
        numbers = list(map(float, cells))
    except ValueError:
        return None
    if sum(map(abs, numbers)) < 2**53:
        return numbers
    return numbers if isfinite(sum(numbers)) and all(exact(cell.strip()) for cell in cells) else None


def _number_or_nan(note_text: Callable[[str], object], line: int, name: str, cell: str) -> float:
    """Convert a cell of a column that may be text; NaN if it is missing or text."""
    kind = kind_of(cell)
    if kind not in ("number", "missing"):
        note_text(name)
    return float(cell) if kind == "number" else nan


def _number(line: int, name: str, cell: str) -> float:
    """Convert a cell of a feature column, or refuse it."""
    if not cell:
        raise TableError(f"line {line}: column {name!r} is empty; fill in the cell or delete the row")
    number = NUMBER.fullmatch(cell)
    if NOT_FINITE.fullmatch(cell) or (number and not isfinite(float(cell))):
        raise TableError(
            f"line {line}: column {name!r} holds {quoted(cell)}, not a finite number in float64; "
            "correct it or delete the row"
        )
    if number and exact(cell):
        return float(cell)
    if number:
        raise TableError(
            f"line {line}: column {name!r} holds {quoted(cell)}, an integer beyond 2^53 that float64 does not hold "
            "exactly; write it as 1e20 if it is a value, or leave the column out (--drop)"
        )
    comma = NUMBER.fullmatch(cell.replace(",", "."))
    remedy = "write decimals with a point" if comma else "encode the column as numbers or leave it out (--drop)"
    raise TableError(f"line {line}: column {name!r} holds the text {quoted(cell)}, not a number; {remedy}")
