"""Parquet files, read batch by batch with pyarrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convexbn.files.dataset import Dataset, Table
from convexbn.files.tables.table import Selection, TableError, as_labels, declared, exactly, finite, sound

_BATCH_CELLS = 1 << 22  # decoded at a time


def read_parquet(path: Path, wanted: Selection) -> Dataset:
    """Read a Parquet file batch by batch into one array."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise TableError("reading Parquet needs pyarrow; run: pip install convexbn[data]") from error
    # ValueError: text that is not UTF-8, impossible numbers of rows
    with (
        sound("Parquet file", pa.ArrowException, ValueError),
        pq.ParquetFile(path, page_checksum_verification=True) as file,
    ):
        schema, rows = file.schema_arrow, file.metadata.num_rows
        chosen = wanted.choose(schema.names)
        as_text = _texts(schema, chosen, wanted)
        if not rows:
            raise TableError("has columns but no rows; add at least one")
        wanted.check_rows(rows, len(chosen))
        kept = tuple(name for name in chosen if name not in as_text)
        matrix, labels = np.empty((rows, len(kept))), list[NDArray[Any]]()
        texts: dict[str, list[Any]] = {name: [] for name in (*as_text, *wanted.reading.verbatim)}
        done = _read_batches(file, wanted, (kept, matrix, texts, labels))
        if done != rows:
            raise TableError(f"announces {rows:,} rows and holds {done:,}; write it again")
        X: Any = matrix
        if not wanted.reading.strict:
            cells = {name: np.array([cell or None for cell in texts[name]], dtype=object) for name in as_text}
            X = Table(matrix, kept, cells)
        return Dataset(
            path.name, X, np.concatenate(labels) if labels else None, feature_names=chosen, target=wanted.target,
            notes=tuple(wanted.told(schema.names)),
            verbatim={
                name: ["" if cell is None else str(cell) for cell in texts[name]] for name in wanted.reading.verbatim
            },
        )  # fmt: skip


def _texts(schema: Any, chosen: tuple[str, ...], wanted: Selection) -> tuple[str, ...]:
    """Return the feature columns of text; refuse columns that are neither numbers nor text where it is allowed."""
    lenient = not wanted.reading.strict
    for name in chosen:
        _check_arrow_type(name, schema.field(name).type, text_allowed=lenient)
    if wanted.target is not None:
        _check_arrow_type(wanted.target, schema.field(wanted.target).type, text_allowed=True)
    return tuple(name for name in chosen if lenient and _is_text(schema.field(name).type))


def _read_batches(file: Any, wanted: Selection, into: tuple[Any, Any, Any, Any]) -> int:
    """Decode all rows and return their number.

    Parameters
    ----------
    file : ParquetFile
    wanted : Selection
    into : tuple
        Names of the columns of numbers and the matrix for them, lists of cells by name, and the list of the targets.
    """
    (kept, matrix, texts, labels), done = into, 0
    columns = list(dict.fromkeys([*kept, *texts, *([] if wanted.target is None else [wanted.target])]))
    for batch in file.iter_batches(1 + _BATCH_CELLS // len(columns), columns=columns):
        for index, name in enumerate(kept):
            values = _arrow_column(batch, name, done, may_miss=not wanted.reading.strict)
            matrix[done : done + len(batch), index] = exactly(values, name, done)
        for name, cells in texts.items():
            cells.extend(batch.column(name).to_pylist())
        if wanted.target is not None:
            values = _arrow_column(batch, wanted.target, done)
            labels.append(finite(declared(values, wanted.target), wanted.target, done))
        done += len(batch)
    return done


def _is_text(kind: Any) -> bool:
    """Whether a type is text; a dictionary counts as its values."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _check_arrow_type(name: str, kind: Any, text_allowed: bool) -> None:
    """Refuse a column unless it holds numbers or, if allowed, text; a dictionary counts as its values."""
    from pyarrow import types

    values = kind.value_type if types.is_dictionary(kind) else kind
    number = types.is_boolean(values) or types.is_integer(values) or types.is_floating(values)
    if not (number or (_is_text(kind) and text_allowed)):
        wanted = "numbers or text" if text_allowed else "numbers"
        raise TableError(f"column {name!r} is {kind}, and {wanted} are needed; convert it or leave it out (--drop)")


def _arrow_column(batch: Any, name: str, before: int, *, may_miss: bool = False) -> NDArray[Any]:
    """Return a column of a batch as a numpy array of its own type, or of floats with NaN if cells are missing.

    Parameters
    ----------
    batch : RecordBatch
    name : str
    before : int
        Number of rows before the batch.
    may_miss : bool
        Whether cells may be null or NaN.
    """
    from pyarrow import types

    column = batch.column(name)
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column.null_count and not may_miss:
        row = before + column.is_valid().to_pylist().index(False) + 1
        raise TableError(f"row {row}: column {name!r} is null; fill in the cell or delete the row")
    if _is_text(column.type):
        return as_labels(column.to_pylist())
    missing = np.asarray(column.is_null(nan_is_null=may_miss))
    zeros: Any = False if types.is_boolean(column.type) else 0
    values = (column.fill_null(zeros) if column.null_count else column).to_numpy(zero_copy_only=False)
    if not missing.any():
        return finite(values, name, before)
    finite(np.where(missing, 0, values), name, before)
    return np.where(missing, np.nan, exactly(values, name, before))
