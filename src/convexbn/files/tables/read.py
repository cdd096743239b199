"""`read_table` finds the reader for a kind of file and names the file that it refuses."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from convexbn.files.dataset import Dataset
from convexbn.files.tables.npz import read_npz
from convexbn.files.tables.parquet import read_parquet
from convexbn.files.tables.source import COMPRESSED
from convexbn.files.tables.table import Reading, Selection, TableError, cause
from convexbn.files.tables.text import read_text

_READERS: dict[str, Callable[[Path, Selection], Dataset]] = {
    **dict.fromkeys((".csv", ".tsv", ".txt"), read_text), ".parquet": read_parquet, ".npz": read_npz,
}  # fmt: skip
_STRICT = Reading()


def read_table(
    path: str | os.PathLike[str],
    target: str | None = None,
    features: Sequence[str] | None = None,
    dropped: Sequence[str] = (),
    reading: Reading = _STRICT,
) -> Dataset:
    r"""Read a data matrix and its target from a file.

    In a text file the target is int64 if every cell is an integer literal, float64 if every cell is a number, and
    otherwise text as it is written, as are integers with leading zeros. A target that is numbers but for a few cells
    is refused. Elsewhere its declared type decides: bool and integers become int64, floats float64, text stays text.

    Parameters
    ----------
    path : str or path-like
        ``.csv``, ``.tsv`` or ``.txt`` (UTF-8 text with a header line; cells are separated by ``,``, ``;`` or tab,
        whichever the header uses), ``.parquet`` (needs pyarrow) or ``.npz`` (columns ``x0``, ``x1`` and so on of the
        array ``X`` or the only two-dimensional array).
    target : str, optional
        Column of the target; in an ``.npz``, the array. None: the table has no target.
    features : sequence of str, optional
        Columns to read, in this order; others are ignored. None: every column but the target.
    dropped : sequence of str
        Columns of these to leave out.
    reading : Reading
        By default a file is read exactly as it is or refused. With ``strict=False`` features may be text, cells of
        them missing and decimals written with a comma, text files may be compressed (``.csv.gz``, ``.bz2``, ``.xz``,
        ``.zip``), name their separator in a line ``sep=;`` and end lines with a carriage return: ``X`` is a `Table`.

    Raises
    ------
    TableError
        If the file cannot be read exactly as a finite table within half of the physical memory. The message gives the
        line of a text file; in other formats the row, counted from 1.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder) / "houses.csv"
    ...     _ = file.write_text("rooms;area;sold\n3;71.5;yes\n4;90;no\n")
    ...     table = read_table(file, target="sold")
    >>> table.X
    array([[ 3. , 71.5],
           [ 4. , 90. ]])
    >>> table.feature_names, table.y.tolist()
    (('rooms', 'area'), ['yes', 'no'])
    """
    file = Path(path)
    try:
        ending = file.suffix.lower()
        if ending in COMPRESSED and not reading.strict:
            ending = Path(file.stem).suffix.lower() or (".csv" if ending == ".zip" else "")
            ending = ending if _READERS.get(ending) is read_text else ""
        reader = _READERS.get(ending)
        if reader is None:
            raise TableError(f"unknown kind of file; its name must end in {', '.join(_READERS)}")
        if not file.exists():
            raise TableError("no such file; check the path")
        if not file.is_file():
            raise TableError("not a regular file; give the path of a file")
        return reader(file, Selection(target, features, dropped, reading))
    except TableError as error:
        error.args = (f"{file}: {error}",)
        raise
    except OSError as error:
        raise TableError(f"{file}: cannot be read ({error.strerror or cause(error)}); check the file") from error
