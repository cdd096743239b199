"""Parquet files, read batch by batch with pyarrow, which is imported only here and only on use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convexbn.files.dataset import Dataset
from convexbn.files.tables.table import TableError, as_labels, cause, check_finite, check_rows, choose, declared

_BATCH_CELLS = 1 << 22  # decoded at a time


def read_parquet(path: Path, target: str | None, features: Sequence[str] | None) -> Dataset:
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
        raise TableError(f"no sound Parquet file ({cause(error)}); write it again") from error


def _parquet_table(file: Any, target: str | None, features: Sequence[str] | None) -> Dataset:
    """Choose the columns of an open Parquet file and fill the arrays."""
    schema, rows = file.schema_arrow, file.metadata.num_rows
    chosen = choose(schema.names, target, features)
    wanted = chosen if target is None else (*chosen, target)
    for name in wanted:
        _check_arrow_type(name, schema.field(name).type, text_allowed=name == target)
    if not rows:
        raise TableError("has columns but no rows; add at least one")
    check_rows(rows, len(chosen), target)
    matrix = np.empty((rows, len(chosen)))
    labels: list[NDArray[Any]] = []
    done = 0
    for batch in file.iter_batches(1 + _BATCH_CELLS // len(wanted), columns=list(wanted)):
        for index, name in enumerate(chosen):
            part = matrix[done : done + len(batch), index]
            part[:] = _arrow_column(batch, name, done)
            check_finite(part, name, done)
        if target is not None:
            labels.append(declared(_arrow_column(batch, target, done), target, done))
        done += len(batch)
    if done != rows:
        raise TableError(f"announces {rows:,} rows and holds {done:,}; write it again")
    return Dataset("", matrix, None if target is None else np.concatenate(labels), feature_names=chosen, target=target)


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
        return as_labels(column.to_pylist())
    return column.to_numpy(zero_copy_only=False)
