"""Values that are no numbers or labels, and missing ones: refused by name, whatever holds them."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from decimal import Decimal
from numbers import Real
from typing import Any, ClassVar

import numpy as np

_NUMBERS = (Real, Decimal, np.bool_)
_DATES = (datetime.date, np.datetime64)
_DURATIONS = (datetime.timedelta, np.timedelta64)
#: Names of values of pandas that stand for missing ones.
_MISSING = ("NAType", "NaTType")
#: Beginnings of the names of pyarrow's types of numbers.
_ARROW_NUMBERS = ("int", "uint", "float", "halffloat", "double", "bool", "decimal")


def refuse_columns(X: Any) -> None:
    """Refuse features with a value that is no number, by the name of its column or by its place."""
    if type(X).__name__ == "LazyFrame":
        raise TypeError("X is a LazyFrame, which holds no rows yet: give X.collect().")
    for column, kind, values in _columns(X):
        if values is None:
            raise ValueError(f"column {column!r} of X has type {kind}, which is not numeric: encode or drop it.")
        if values.dtype.kind == "O":
            for row, value in enumerate(values.tolist()):
                _refuse(value, f"X: column {column!r}, row {row}", "encode or drop the column")
    if isinstance(X, (list, tuple, np.ndarray)):
        values = _as_array(X)
        if values is not None and values.dtype.kind in "mM":
            raise TypeError(f"X holds dates or durations ({values.dtype}), which are not numeric: encode or drop them.")
        if values is not None and values.dtype.kind in "US":
            raise TypeError(f"X holds text such as {str(values.flat[0])!r}, which is not numeric: encode or drop it.")
        if values is not None and values.dtype.kind == "O":
            for place, value in np.ndenumerate(values):
                where = ", ".join(f"{axis} {i}" for axis, i in zip(("row", "column"), place, strict=False))
                _refuse(value, f"X: {where}", "encode or drop the column")


def _columns(X: Any) -> Iterator[tuple[Any, Any, np.ndarray | None]]:
    """Names, types and values of the columns of a frame; None where the type is none of numbers."""
    if hasattr(X, "iloc") and hasattr(X, "columns"):  # pandas
        for index, (column, kind) in enumerate(zip(X.columns, X.dtypes, strict=True)):
            code = getattr(kind, "kind", "O")
            text = str(kind) in ("category", "string", "str") or code not in "fiubcO"
            yield column, kind, None if text else np.asarray(X.iloc[:, index])
    elif hasattr(X, "schema") and hasattr(X, "get_columns"):  # polars
        for column, kind in X.schema.items():
            numeric = kind.is_numeric() or str(kind) in ("Boolean", "Object")
            yield column, kind, X[column].to_numpy() if numeric else None
    elif hasattr(X, "schema") and hasattr(X, "column_names"):  # pyarrow
        for column, kind in zip(X.column_names, X.schema.types, strict=True):
            numeric = str(kind).startswith(_ARROW_NUMBERS)
            yield column, kind, np.asarray(X.column(column)) if numeric else None


def _refuse(value: Any, where: str, remedy: str) -> None:
    """Refuse an object that is no number; None and NaN are missing ones."""
    if value is None or type(value).__name__ in _MISSING:
        raise ValueError(f"{where}: missing value; fill it in or leave the row out.")
    if isinstance(value, (*_NUMBERS, complex)):
        return
    if isinstance(value, (str, bytes, *_DATES, *_DURATIONS)):
        raise TypeError(f"{where}: {value!r} is not a number; {remedy}.")
    try:
        float(value)
    except TypeError as error:
        raise TypeError(f"{where}: {error}; {remedy}.") from error


def _as_array(values: Any) -> np.ndarray | None:
    """Array of numpy, of objects for lists with text; None if there is none, which scikit-learn reports."""
    try:
        array = np.asarray(values)
        mixed = isinstance(values, (list, tuple)) and array.dtype.kind in "US"  # numpy made text of the numbers
        return np.asarray(values, dtype=object) if mixed else array
    except (ValueError, TypeError, RuntimeError):
        return None


def plain_targets(y: Any, *, numeric: bool) -> Any:
    """Targets as an array of numpy, with the place of a value that is missing or none.

    Parameters
    ----------
    y : array-like
    numeric : bool
        Whether they are numbers. False: labels, which are numbers, text, booleans or dates, all of one type.
    """
    values = _as_array(y)
    if values is None or values.ndim == 0:
        return y
    if values.dtype.kind == "O":
        values = _of_objects(values, numeric)
        if isinstance(y, (list, tuple)) and isinstance(values.flat[0], str):
            values = np.asarray(y)
    if values.dtype.kind in "fmM" and (missing := np.isnan(values)).any():
        row, *column = np.argwhere(missing)[0].tolist()
        where = f"row {row}" + "".join(f", column {c}" for c in column)
        raise ValueError(f"y: missing value at {where} (NaN); fill it in or leave the row out.")
    if numeric and values.dtype.kind in "mM":
        raise TypeError(f"y holds dates or durations ({values.dtype}), and numbers are needed: give them in a unit.")
    if numeric and values.dtype.kind in "USV":
        raise TypeError(f"y holds text such as {str(values.flat[0])!r}, and numbers are needed: convert it.")
    return values


def _of_objects(values: np.ndarray, numeric: bool) -> np.ndarray:
    """Array of objects, checked one by one; dates become numpy's."""
    for place, value in np.ndenumerate(values):
        where = f"row {place[0]}" + "".join(f", column {c}" for c in place[1:])
        if value is None or type(value).__name__ in _MISSING or (isinstance(value, float) and np.isnan(value)):
            raise ValueError(f"y: missing value at {where} ({value!r}); fill it in or leave the row out.")
        if numeric:
            _refuse(value, f"y: {where}", "numbers are needed")
    if numeric:
        return values if any(isinstance(value, complex) for value in values.flat) else values.astype(np.float64)
    if any(isinstance(value, np.generic) for value in values.flat):
        plain = [value.item() if isinstance(value, np.generic) else value for value in values.flat]
        values = np.array([*plain, None], dtype=object)[:-1].reshape(values.shape)
    of_time: tuple[tuple[str, tuple[type, ...]], ...] = (("M8", _DATES), ("m8", _DURATIONS))
    for dtype, types in of_time:
        if values.size and all(isinstance(value, types) for value in values.flat):
            return _dates(values, dtype)
    kinds = {_kind(value): value for value in values.flat}
    if None in kinds:
        raise TypeError(f"y: {kinds[None]!r} is no label: give numbers, text, booleans or dates.")
    if len(kinds) > 1:
        one, other, *_ = kinds.values()
        raise TypeError(f"y mixes labels of several types, such as {one!r} and {other!r}: give labels of one type.")
    return values


def _dates(values: np.ndarray, dtype: str) -> np.ndarray:
    """Dates or durations as numpy holds them."""
    if any(getattr(value, "tzinfo", None) is not None for value in values.flat):
        raise TypeError("y holds times with a time zone: convert them to UTC without one.")
    return np.array(values.tolist(), dtype=dtype)


def _kind(label: Any) -> str | None:
    """Kind of a label of an array of objects."""
    if isinstance(label, (bool, np.bool_)):
        return "boolean"
    if isinstance(label, str):
        return "text"
    return "number" if isinstance(label, (int, float, np.integer, np.floating)) else None


class ScoreOfPlainTargets:
    """Base, before scikit-learn's, of estimators whose ``score`` takes targets in any form that ``fit`` takes."""

    _task: ClassVar[str]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Accuracy, or coefficient of determination R^2, of the predictions.

        Parameters
        ----------
        X, y, sample_weight : array-like
        """
        y = plain_targets(y, numeric=self._task == "regression")
        return float(super().score(X, y, sample_weight))  # type: ignore[misc]
