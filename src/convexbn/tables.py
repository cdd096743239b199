r"""Tables of the user's own, for the command line: CSV, Parquet and NPZ.

One function, `read_table`, gives a `Table`: a finite float64 matrix with the names of its columns and, on
request, a target. A file is either read exactly or refused with a `TableError`, one sentence that names the
file, the place, the cause and the remedy: no cell is guessed, skipped or filled in, and no pickle is loaded.
"""

from __future__ import annotations

import csv
import os
import re
import reprlib
import tokenize
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from math import isfinite, prod
from pathlib import Path
from textwrap import shorten
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Table", "TableError", "read_table"]


def _half_of_physical_memory() -> int:
    """Return half of this machine's memory in bytes; 4 GiB where the system does not tell (Windows)."""
    if not hasattr(os, "sysconf"):
        return 4 << 30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


MEMORY_BUDGET = _half_of_physical_memory()
_LONGEST_LINE = 1 << 24
_LONGEST_LABEL = 256  # numpy stores every label as wide as the longest: one long text would cost n times its size
_BATCH_CELLS = 1 << 22  # of a Parquet file decoded at a time
_LABEL_BYTES = 80  # a CSV target is text until its last cell is seen: one Python string a row

# Python's float() also takes "1_000" and the digits of every script: more than a table of numbers means.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)


_quoted = reprlib.Repr()
_quoted.maxstring = 80


class TableError(ValueError):
    """A file that cannot be read as a table; the message is one sentence with the cause and the remedy."""


@dataclass(frozen=True, eq=False)
class Table:
    """A data matrix with named columns and, where one was asked for, a target.

    Attributes
    ----------
    features : ndarray of shape (n_samples, n_features), float64
        The data matrix; every value is finite.
    feature_names : tuple of str
        The names of its columns.
    target : ndarray of shape (n_samples,) or None
        Class labels (int64 or text) or values (int64 or float64).
    target_name : str or None
        The name of the target.
    """

    features: NDArray[np.float64]
    feature_names: tuple[str, ...]
    target: NDArray[Any] | None
    target_name: str | None


def read_table(path: str | os.PathLike[str], target: str | None = None, features: Sequence[str] | None = None) -> Table:
    r"""Read a data matrix and its target from a file.

    Parameters
    ----------
    path : str or path-like
        A file whose name ends in ``.csv``, ``.tsv`` or ``.txt`` (UTF-8 text with a header line; cells are
        separated by ``,``, ``;`` or tab, whichever the header uses), in ``.parquet`` (needs pyarrow) or in
        ``.npz``.
    target : str, optional
        The column that holds the target; in an ``.npz``, the array. None: the table has no target.
    features : sequence of str, optional
        The columns to read, in this order; all others are ignored. None: every column but the target.

    Returns
    -------
    Table
        In a text file the target is int64 if every cell is an integer literal, float64 if every cell is a
        number, text otherwise. Elsewhere its declared type decides: bool and integers become int64, floats
        float64, and text stays text.

    Raises
    ------
    TableError
        If the file cannot be read exactly as a finite table within half of the physical memory.

    Notes
    -----
    The columns of an ``.npz`` are those of its array ``X``, or of its only two-dimensional array, and are
    called ``x0``, ``x1`` and so on. Messages give the line of a text file; in the other formats the row,
    counted from 1.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder) / "houses.csv"
    ...     _ = file.write_text("rooms;area;sold\n3;71.5;yes\n4;90;no\n")
    ...     table = read_table(file, target="sold")
    >>> table.features
    array([[ 3. , 71.5],
           [ 4. , 90. ]])
    >>> table.feature_names, table.target.tolist()
    (('rooms', 'area'), ['yes', 'no'])
    """
    file = Path(path)
    try:
        return _reader(file)(file, target, features)
    except TableError as error:
        error.args = (f"{file}: {error}",)
        raise
    except OSError as error:
        cause = error.strerror or _cause(error)
        raise TableError(f"{file}: cannot be read ({cause}); check the file") from error


def _reader(file: Path) -> _Reader:
    """Return the function that reads this kind of file."""
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise TableError(f"unknown kind of file; its name must end in {', '.join(_READERS)}")
    if not file.exists():
        raise TableError("no such file; check the path")
    if not file.is_file():
        raise TableError("not a regular file; give the path of a file")
    return reader


# -- what all formats share --


def _choose(names: Sequence[str], target: str | None, features: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the feature columns: those asked for, or all but the target."""
    known = Counter(names)
    if len(known) < len(names):
        repeated = [name for name, times in known.items() if times > 1]
        raise TableError(f"several columns are called {_listed(repeated)}; give each its own name")
    chosen = tuple(name for name in names if name != target) if features is None else tuple(features)
    missing = [name for name in (*chosen, target) if name is not None and name not in known]
    if missing:
        raise TableError(f"has no column {_listed(missing)}; its columns are {_listed(names)}")
    if target in chosen:
        raise TableError(f"column {target!r} is asked for as target and as feature; name it once")
    for unnamed in {"", "__index_level_0__"}.intersection(chosen):
        # What pandas writes for a row index: as a feature it would be a column nobody meant.
        position = names.index(unnamed) + 1
        raise TableError(f"column {position} has no name; name it, or if it numbers the rows, leave it out")
    if not chosen:
        raise TableError("no feature column is left; a table needs one besides the target")
    return chosen


def _cause(error: Exception) -> str:
    """Quote another library's message on one line."""
    return shorten(str(error), 120) or type(error).__name__


def _listed(names: Sequence[str]) -> str:
    """Quote names for a message, the first twenty of them."""
    shown = ", ".join(map(_quoted.repr, names[:20]))
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20:,} more"


def _check_memory(needed: int) -> None:
    """Refuse a table that would not leave half of the memory free."""
    if needed > MEMORY_BUDGET:
        raise TableError(
            f"needs about {needed:,} bytes of memory and {MEMORY_BUDGET:,} are allowed, half of all; "
            "keep fewer rows or columns"
        )


def _check_finite(values: NDArray[Any], name: str, before: int = 0) -> None:
    """Refuse a column with NaN or infinity; `before` of its rows were checked already."""
    finite = np.isfinite(values)
    if not finite.all():
        row = int(finite.argmin())
        raise TableError(
            f"row {before + row + 1}: column {name!r} holds {values[row]}, not a finite number; "
            "correct it or delete the row"
        )


def _declared(values: NDArray[Any], name: str, before: int = 0) -> NDArray[Any]:
    """Convert a column whose type is known: integers to int64, floats to float64, text as it is."""
    if values.dtype.kind == "U":
        return values
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):
            result = values.astype(np.float64, copy=False)
        _check_finite(result, name, before)
        return result
    if values.dtype.kind not in "biu":
        raise TableError(f"the target {name!r} is {values.dtype}; choose one of numbers or text")
    if values.dtype == np.uint64 and values.max(initial=0) > np.iinfo(np.int64).max:
        raise TableError(f"the target {name!r} holds {values.max()}, beyond int64; use smaller labels")
    return values.astype(np.int64, copy=False)


def _labels(texts: list[str]) -> NDArray[np.str_]:
    """Store class labels as a numpy array of text."""
    longest = max(texts, key=len, default="")
    if len(longest) > _LONGEST_LABEL:
        raise TableError(
            f"the target holds {_quoted.repr(longest)} of {len(longest):,} characters, and a class label may "
            f"have {_LONGEST_LABEL}; choose another target"
        )
    _check_memory(4 * len(longest) * len(texts))
    return np.array(texts, dtype=np.str_)


# -- text --


def _read_text(path: Path, target: str | None, features: Sequence[str] | None) -> Table:
    """Read a CSV or TSV file in one pass, row by row."""
    with path.open("rb") as stream:
        records = _records(stream)
        _, header = next(records, (0, None))
        if header is None:
            raise TableError("the file is empty; it needs a header line and at least one row")
        names = _header_names(header)
        chosen = _choose(names, target, features)
        _check_memory(_estimated_rows(path) * (8 * len(chosen) + _LABEL_BYTES * (target is not None)))
        position = {name: index for index, name in enumerate(names)}
        label = None if target is None else position[target]
        values, labels = _parse(records, header, [position[name] for name in chosen], label)
    if not values:
        raise TableError("has a header but no rows; add at least one")
    matrix = np.frombuffer(values, dtype=np.float64).reshape(-1, len(chosen))
    return Table(matrix, chosen, None if target is None else _literals(labels), target)


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Yield the lines with their numbers; each is decoded by itself, so that a wrong byte has a line."""
    for number in count(1):
        raw = stream.readline(_LONGEST_LINE + 1)
        if len(raw) > _LONGEST_LINE:
            raise TableError(f"line {number}: longer than {_LONGEST_LINE:,} bytes; break it into rows")
        if not raw:
            return
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise TableError(f"line {number}: not UTF-8 text; save the file as UTF-8") from error
        yield number, text.rstrip("\r\n")


def _records(stream: IO[bytes]) -> Iterator[tuple[int, list[str]]]:
    """Yield each record with the line it starts on; blank lines may stand at the end of the file only."""
    lines = _lines(stream)
    separator, blank = "", 0
    for number, line in lines:
        separator = separator or _separator(line)
        if not line:
            blank = blank or number
        elif blank:
            raise TableError(f"line {blank}: is blank; delete it or fill in the row")
        elif '"' in line:
            yield number, _quoted_record(number, line, lines, separator)
        else:  # three times as fast as the csv module, and the same
            yield number, line.split(separator)


def _quoted_record(number: int, line: str, later: Iterator[tuple[int, str]], separator: str) -> list[str]:
    """Cut a record with quoted cells, which may run over several lines."""
    lines = (f"{text}\n" for text in chain([line], (text for _, text in later)))
    try:
        return next(csv.reader(lines, delimiter=separator, strict=True))
    except csv.Error as error:
        raise TableError(f"line {number}: cannot be cut into cells ({error}); check the quotes") from error


def _separator(header: str) -> str:
    """Return the separator that cuts the header line into the most cells."""
    return max(",;\t", key=re.sub(r'"[^"]*"', "", header).count)


def _header_names(header: list[str]) -> list[str]:
    """Return the column names, or refuse a first row that is data."""
    names = [cell.strip() for cell in header]
    if all(map(_NUMBER.fullmatch, names)):
        raise TableError(
            "line 1: all cells are numbers, so the header is missing; put a line of column names first, "
            "at least one of them not a number"
        )
    return names


def _estimated_rows(path: Path) -> int:
    """Estimate the number of rows from the size of the file and the length of its first lines."""
    with path.open("rb") as stream:
        sample = stream.read(1 << 20)
    return path.stat().st_size * sample.count(b"\n") // len(sample)


def _parse(
    records: Iterator[tuple[int, list[str]]], header: list[str], columns: list[int], label: int | None
) -> tuple[array[float], list[str]]:
    """Return the numbers of all rows in one growing buffer, and the cells of the target as text."""
    names = [cell.strip() for cell in header]
    values, labels = array("d"), list[str]()
    for line, row in records:
        if len(row) != len(header):
            raise TableError(f"line {line}: {len(row)} cells, and the header has {len(header)}; make them equal")
        if row == header:
            raise TableError(f"line {line}: repeats the header; delete this line")
        cells = [row[index] for index in columns]
        numbers = _numbers(cells)
        if numbers is None:
            numbers = [_number(line, names[index], row[index].strip()) for index in columns]
        values.extend(numbers)
        if label is not None:
            labels.append(_present(line, names[label], row[label].strip()))
        _check_memory(8 * len(values))  # the estimate saw only the first lines
    return values, labels


def _numbers(cells: list[str]) -> list[float] | None:
    """Convert a row fast; None where the cells must be looked at one by one."""
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
    remedy = "write decimals with a point" if comma else "encode the column as numbers or leave it out"
    raise TableError(f"line {line}: column {name!r} holds the text {_quoted.repr(cell)}, not a number; {remedy}")


def _present(line: int, name: str, cell: str) -> str:
    """Return a cell, number or text, or refuse it because it is missing or not finite."""
    if not cell:
        raise TableError(f"line {line}: column {name!r} is empty; fill in the cell or delete the row")
    if _NOT_FINITE.fullmatch(cell) or (_NUMBER.fullmatch(cell) and not isfinite(float(cell))):
        raise TableError(
            f"line {line}: column {name!r} holds {_quoted.repr(cell)}, not a finite number in float64; "
            "correct it or delete the row"
        )
    return cell


def _literals(cells: list[str]) -> NDArray[Any]:
    """Give a target that was read as text its type: int64, float64 or text."""
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
    return _labels(cells)


# -- Parquet --


def _read_parquet(path: Path, target: str | None, features: Sequence[str] | None) -> Table:
    """Read a Parquet file batch by batch into one array."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise TableError("reading Parquet needs pyarrow; run: pip install convexbn[data]") from error
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return _parquet_table(file, target, features)
    except TableError:
        raise
    except (pa.ArrowException, ValueError) as error:
        # ValueError: text that is no UTF-8, counts of rows that cannot be
        raise TableError(f"no sound Parquet file ({_cause(error)}); write it again") from error


def _parquet_table(file: Any, target: str | None, features: Sequence[str] | None) -> Table:
    """Choose the columns of an open Parquet file and fill the arrays."""
    schema, rows = file.schema_arrow, file.metadata.num_rows
    chosen = _choose(schema.names, target, features)
    wanted = chosen if target is None else (*chosen, target)
    for name in wanted:
        _check_arrow_type(name, schema.field(name).type, text_allowed=name == target)
    if not rows:
        raise TableError("has columns but no rows; add at least one")
    _check_memory(rows * (8 * len(chosen) + _LABEL_BYTES * (target is not None)))
    matrix, parts, done = np.empty((rows, len(chosen))), list[NDArray[Any]](), 0
    for batch in file.iter_batches(1 + _BATCH_CELLS // len(wanted), columns=list(wanted)):
        for index, name in enumerate(chosen):
            matrix[done : done + len(batch), index] = _arrow_column(batch, name, done)
            _check_finite(matrix[done : done + len(batch), index], name, done)
        if target is not None:
            parts.append(_declared(_arrow_column(batch, target, done), target, done))
        done += len(batch)
    if done != rows:
        raise TableError(f"announces {rows:,} rows and holds {done:,}; write it again")
    return Table(matrix, chosen, None if target is None else np.concatenate(parts), target)


def _check_arrow_type(name: str, kind: Any, text_allowed: bool) -> None:
    """Refuse a column of neither numbers nor, where allowed, text; a dictionary is what its values are."""
    from pyarrow import types

    values = kind.value_type if types.is_dictionary(kind) else kind
    number = types.is_boolean(values) or types.is_integer(values) or types.is_floating(values)
    text = types.is_string(values) or types.is_large_string(values)
    if not (number or (text and text_allowed)):
        wanted = "numbers or text" if text_allowed else "numbers"
        raise TableError(f"column {name!r} is {kind}, and {wanted} are needed; convert it or leave it out")


def _arrow_column(batch: Any, name: str, before: int) -> NDArray[Any]:
    """Return a column of a batch as a numpy array without nulls; `before` rows came in earlier batches."""
    from pyarrow import types

    column = batch.column(name)
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column.null_count:
        row = before + column.is_valid().to_pylist().index(False) + 1
        raise TableError(f"row {row}: column {name!r} is null; fill in the cell or delete the row")
    if types.is_string(column.type) or types.is_large_string(column.type):
        return _labels(column.to_pylist())
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values


# -- NPZ --

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# What zipfile and numpy.lib.format raise on damaged bytes.
_DAMAGE = (
    ValueError,
    EOFError,
    LookupError,
    RuntimeError,
    SyntaxError,
    TypeError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class _Member:
    """An array of an archive as its header describes it."""

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def _read_npz(path: Path, target: str | None, features: Sequence[str] | None) -> Table:
    """Read an archive of numpy arrays; pickled objects inside are refused, never loaded."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _npz_table(archive, target, features)
    except TableError:
        raise
    except _DAMAGE as error:
        raise TableError(f"no sound .npz archive ({_cause(error)}); write it again") from error


def _npz_table(archive: zipfile.ZipFile, target: str | None, features: Sequence[str] | None) -> Table:
    """Find the matrix and the target in an open archive, and read them."""
    members = _members(archive)
    name = _matrix_name(members)
    rows, width = members[name].shape
    if not rows:
        raise TableError(f"array {name!r} has no rows; add at least one")
    if target is not None and (target not in members or members[target].shape != (rows,)):
        shapes = ", ".join(f"{other!r} {member.shape}" for other, member in list(members.items())[:20])
        raise TableError(f"has no array {target!r} of shape ({rows},) for the target; its arrays are {shapes}")
    _check_memory(8 * rows * width)
    chosen = _choose([f"x{index}" for index in range(width)], None, features)
    matrix = _matrix(_array(archive, members[name]))
    if features is not None:
        matrix = matrix[:, [int(wanted.removeprefix("x")) for wanted in chosen]]
    labels = None if target is None else _declared(_array(archive, members[target]), target)
    return Table(matrix, chosen, labels, target)


def _members(archive: zipfile.ZipFile) -> dict[str, _Member]:
    """Read the headers of all arrays; refuse one that promises more data than its file holds."""
    members = {}
    for info in archive.infolist():
        if not info.filename.endswith(".npy"):
            continue
        _check_memory(info.file_size)
        shape, dtype = _npy_header(archive, info)
        held = 0 if dtype.hasobject else prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or held > info.file_size:
            raise TableError(f"{info.filename} is shorter than its header says; write it again")
        members[info.filename.removesuffix(".npy")] = _Member(info, shape, dtype)
    return members


def _npy_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and type of an array without reading it."""
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in _HEADERS:
            raise TableError(f"{info.filename} has .npy version {version}; write it with plain numbers or text")
        try:
            shape, _, dtype = _HEADERS[version](stream)
        except MemoryError as error:  # Python's parser, on hostile nesting
            raise TableError(f"{info.filename} has no sound header; write it again") from error
    return shape, dtype


def _matrix_name(members: dict[str, _Member]) -> str:
    """Return the name of the array that holds the features: X, or the only two-dimensional one."""
    matrices = [name for name, member in members.items() if len(member.shape) == 2]
    if "X" not in matrices and len(matrices) != 1:
        raise TableError(
            f"has {len(matrices)} two-dimensional arrays, none called 'X'; call the features 'X' (its arrays "
            f"are {_listed(list(members))})"
        )
    name = "X" if "X" in matrices else matrices[0]
    if members[name].dtype.kind not in "biufO":
        raise TableError(f"array {name!r} is {members[name].dtype}; the features must be real numbers")
    return name


def _array(archive: zipfile.ZipFile, member: _Member) -> NDArray[Any]:
    """Read one array to the end of its file, which is where the checksum is compared."""
    if member.dtype.hasobject:
        raise TableError(f"{member.info.filename} holds a pickle, which is never loaded; store numbers or text")
    with archive.open(member.info) as stream:
        values: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        if stream.read(1):
            raise TableError(f"{member.info.filename} is longer than its header says; write it again")
    return values


def _matrix(values: NDArray[Any]) -> NDArray[np.float64]:
    """Convert a numeric matrix to finite float64."""
    with np.errstate(over="ignore"):
        matrix = np.asarray(values, dtype=np.float64)
    for index, column in enumerate(matrix.T):  # a mask of the whole matrix would cost an eighth of it
        _check_finite(column, f"x{index}")
    return matrix


_Reader = Callable[[Path, str | None, Sequence[str] | None], Table]
_READERS: dict[str, _Reader] = {
    ".csv": _read_text,
    ".tsv": _read_text,
    ".txt": _read_text,
    ".parquet": _read_parquet,
    ".npz": _read_npz,
}
