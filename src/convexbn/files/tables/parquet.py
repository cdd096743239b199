"""Parquet files, read batch by batch with pyarrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convexbn.files.dataset import Dataset
from convexbn.files.tables.table import Selection, TableError, as_labels, declared, finite, sound

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
        schema, rows, target = file.schema_arrow, file.metadata.num_rows, wanted.target
        chosen = wanted.choose(schema.names)
        columns = [*chosen] if target is None else [*chosen, target]
        for name in columns:
            _check_arrow_type(name, schema.field(name).type, text_allowed=name == target)
        if not rows:
            raise TableError("has columns but no rows; add at least one")
        wanted.check_rows(rows, len(chosen))
        matrix, labels, done = np.empty((rows, len(chosen))), [], 0
        for batch in file.iter_batches(1 + _BATCH_CELLS // len(columns), columns=columns):
            for index, name in enumerate(columns):
                values = _arrow_column(batch, name, done)
                if name == target:
                    labels.append(finite(declared(values, name), name, done))
                else:
                    matrix[done : done + len(batch), index] = finite(values, name, done)
            done += len(batch)
        if done != rows:
            raise TableError(f"announces {rows:,} rows and holds {done:,}; write it again")
        y = None if target is None else np.concatenate(labels)
        return Dataset(path.name, matrix, y, feature_names=chosen, target=target)


def _check_arrow_type(name: str, kind: Any, text_allowed: bool) -> None:
    """Refuse a column unless it holds numbers or, if allowed, text; a dictionary counts as its values."""
    from pyarrow import types

    values = kind.value_type if types.is_dictionary(kind) else kind
    number = types.is_boolean(values) or types.is_integer(values) or types.is_floating(values)
    text = types.is_string(values) or types.is_large_string(values)
    if not (number or (text and text_allowed)):
        wanted = "numbers or text" if text_allowed else "numbers"
        raise TableError(f"column {name!r} is {kind}, and {wanted} are needed; convert it or leave it out (--drop)")


def _arrow_column(batch: Any, name: str, before: int) -> NDArray[Any]:
    """Return a column of a batch, which follows `before` rows, as a numpy array; refuse nulls."""
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
