"""Rows of the command line: public data sets by name or table files, and their split."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from convexbn.cli.output import described, feature_names, note, quiet
from convexbn.files import datasets
from convexbn.files.dataset import Dataset, Table
from convexbn.files.tables import Reading, read_table
from convexbn.files.tables.table import exactly

#: Share held out by default when a data set has no test part of its own.
_DEFAULT_TEST_SIZE = {"digits": 0.2, "fashion-mnist": 0.0, "cifar-10": 0.0}

if TYPE_CHECKING:
    from convexbn.estimators.table_columns import TableColumns

_STRICTLY = Reading()


@dataclass(frozen=True, eq=False)
class Split:
    """Training and test rows, the task, and a description from which ``judge_again`` rebuilds them.

    ``columns`` is what the columns of a table became, None for a matrix.
    """

    X_train: np.ndarray
    y_train: np.ndarray
    X_test: np.ndarray | None
    y_test: np.ndarray | None
    task: str
    description: dict[str, Any]
    columns: TableColumns | None = None

    def describe(self, model: Any) -> None:
        """Note in a fitted model where its rows are, and what their columns became."""
        model.source_ = self.description
        if self.columns is not None:
            model.columns_ = self.columns

    @property
    def told(self) -> str:
        """What is predicted, and the name of the score."""
        n_classes = len(np.unique(self.y_train)) if self.task == "classification" else None
        return described(self.task, self.description["target"], n_classes)


def split(
    data: Dataset, test_size: float | None, seed: int, *, task: str, columns: TableColumns | None = None
) -> Split:
    """Hold rows out (stratified for classes), or keep the official test part.

    Text and missing cells of a table become numbers as ``columns`` says, which the training rows tell by default.

    Parameters
    ----------
    data : Dataset
    test_size, seed : float or None, int
        Share of rows to hold out; by default that of the data set, 0 for files.
    task : {"auto", "classification", "regression"}
    columns : TableColumns, optional
    """
    if data.y is None:
        raise ValueError("--target is required for a file: name the column to predict.")
    task = _infer_task(data.y, data.target) if task == "auto" else task
    if task == "regression" and data.y.dtype.kind not in "iufb":
        raise ValueError(f"regression is of numbers, and the target holds text such as {str(data.y[0])!r}.")
    if task == "regression":
        exactly(data.y, str(data.target))
    share = _DEFAULT_TEST_SIZE.get(data.name, 0.0) if test_size is None else test_size
    if not 0 <= share < 1:
        raise ValueError(f"--test-size must lie in [0, 1); got {share}.")
    names = None if data.feature_names is None else list(data.feature_names)
    description = {
        "data": data.name, "target": data.target, "feature_names": names,
        "test_size": share, "seed": seed, "task": task,
    }  # fmt: skip
    train, test = _held_out(data.y, share, seed, stratified=task == "classification")
    X_train, X_test, columns = _encoded(data, train, test, columns)
    y_test = data.y_test if test is None else data.y[test]
    return Split(X_train, data.y[train], X_test, y_test, task, description, columns)


def _held_out(y: np.ndarray, share: float, seed: int, *, stratified: bool) -> tuple[Any, Any]:
    """Indices of the rows to train on and of those held out; None if there are none.

    Parameters
    ----------
    y, share, seed : ndarray, float, int
    stratified : bool
        Whether ``y`` holds classes, of each of which the same share is held out.
    """
    from sklearn.model_selection import train_test_split

    if share == 0:
        return slice(None), None
    try:
        return tuple(
            train_test_split(np.arange(len(y)), test_size=share, random_state=seed, stratify=y if stratified else None)
        )
    except ValueError as error:
        if not stratified:
            raise
        raise ValueError(_few_members(y, share)) from error


def _encoded(data: Dataset, train: Any, test: Any, columns: TableColumns | None) -> tuple[Any, Any, Any]:
    """Rows to train on and held out as matrices, and what the columns of a table became; told on standard error."""
    note(data.notes)
    if not isinstance(data.X, Table):
        return data.X[train], data.X_test if test is None else data.X[test], None
    assert data.feature_names is not None
    if columns is None:
        from convexbn.estimators.table_columns import TableColumns

        rows = data.X if test is None else data.X.rows(train)
        columns = TableColumns.learn(rows, data.feature_names)
        note(columns.told_of_training(rows))
    X = encode(columns, data.X)
    return X[train], None if test is None else X[test], columns


def encode(columns: TableColumns, table: Any, *, strict: bool = False) -> np.ndarray:
    """Inputs of a network from the columns of a table; what is filled in is told, or refused.

    Parameters
    ----------
    columns, table : TableColumns, Table or ndarray
        A matrix is taken as it is.
    strict : bool
        Whether a table with missing cells or unknown categories is refused.
    """
    if not isinstance(table, Table):
        return np.asarray(table)
    filled = columns.told_of_gaps(table)
    if strict and filled:
        raise ValueError(f"--strict refuses this table ({'; '.join(filled)}): correct it, or give no --strict.")
    note(filled)
    return columns.encode(table)


def _few_members(y: np.ndarray, share: float) -> str:
    """Why rows cannot be held out class by class."""
    classes, counts = np.unique(y, return_counts=True)
    least, numeric = int(np.argmin(counts)), y.dtype.kind in "iufb"
    remedy = "give --task regression if the target is a number and no class, or " if numeric else ""
    return (
        f"a share of {share:g} of {len(y)} rows cannot be held out of each of {len(classes)} classes, the smallest of "
        f"which, {classes[least].item()!r}, has {counts[least]}: {remedy}hold out another share or none."
    )


def read_model(file: str) -> Any:
    """Model of a file that ``fit`` or ``path`` wrote."""
    from convexbn.estimators import load

    if not os.path.exists(file):
        raise FileNotFoundError(f"there is no model {file!r}: name the file that fit or path wrote with --out.")
    return load(file)


def judge_again(model: Any, options: argparse.Namespace) -> tuple[Split, Any, bool]:
    """Rows split as in the training of a saved model, its certificate on them, and whether they are those rows."""
    made, names = dict(getattr(model, "source_", {})), feature_names(model)
    target = options.target or made.get("target")
    reading = reading_of(model, options)
    data = read_data(
        options.data, target, data_home=options.data_home, features=names, reading=reading, need_target=True
    )
    share, seed = (made["test_size"], made["seed"]) if made.get("data") == data.name else (0.0, 0)
    task, columns = "classification" if hasattr(model, "classes_") else "regression", getattr(model, "columns_", None)
    rows = split(data, share, seed, task=task, columns=columns)
    model.time_limit = options.time_limit
    with quiet():
        proof = model.certify(rows.X_train, rows.y_train)
    return rows, proof, model.fingerprint(rows.X_train, rows.y_train) == model.fingerprint_


def reading_of(model: Any, options: argparse.Namespace, verbatim: Sequence[str] = ()) -> Reading:
    """How the cells of a file are read for a saved model: its labels are of one type, and its columns known.

    Parameters
    ----------
    model, options : estimator, Namespace
    verbatim : sequence of str
        Columns to return as they are written.
    """
    columns = getattr(model, "columns_", None)
    kinds = {"i": "label", "u": "label", "b": "label", "f": "number"}
    kind = kinds.get(model.classes_.dtype.kind, "text") if hasattr(model, "classes_") else "number"
    texts = None if columns is None else columns.texts
    return Reading(kind, strict=columns is None, decimal=options.decimal, texts=texts, verbatim=verbatim)


#: What the target of a text file is read as, by task.
_KINDS = {"auto": "auto", "classification": "label", "regression": "number"}


def read_columns(options: argparse.Namespace) -> Dataset:
    """Data to train on, with the columns of ``--columns``, or all, but those of ``--drop``."""
    if options.columns is not None and options.data in _DEFAULT_TEST_SIZE:
        raise ValueError(f"--columns is for files; {options.data} has no names of columns.")
    return read_data(
        options.data, options.target, data_home=options.data_home, features=options.columns,
        dropped=options.drop or (), reading=Reading(_KINDS[options.task], options.strict, options.decimal),
    )  # fmt: skip


def read_data(
    data: str, target: str | None, *, data_home: str | None = None, features: Sequence[str] | None = None,
    dropped: Sequence[str] = (), reading: Reading = _STRICTLY, need_target: bool = False,
) -> Dataset:  # fmt: skip
    """Read ``digits``, ``fashion-mnist``, ``cifar-10`` or a file.

    Parameters
    ----------
    data, target : str, str or None
        Name or path, and the column to predict (None for named data).
    data_home, features : str, sequence of str, optional
        Folder of the named data; columns to read as features, by default all others.
    dropped : sequence of str
        Columns of a file to leave out.
    reading : Reading
        How its cells are read.
    need_target : bool
        Whether a file without ``target`` is an error.
    """
    if data in _DEFAULT_TEST_SIZE:
        if dropped:
            raise ValueError(f"--drop is for files; {data} has no names of columns.")
        if target is not None and features is None and not need_target:
            raise ValueError(f"--target is for files; {data} brings its own labels.")
        if data == "digits":
            return datasets.digits()
        return datasets.cifar10(data_home) if data == "cifar-10" else datasets.fashion_mnist(data_home)
    if need_target and target is None:
        raise ValueError("--target is required for a file: name the column to compare with.")
    if not os.path.exists(data):
        raise FileNotFoundError(f"{data!r} is neither a file nor one of {', '.join(_DEFAULT_TEST_SIZE)}")
    return read_table(data, target, features, dropped, reading)


def _infer_task(y: np.ndarray, target: str | None) -> str:
    """Classification for text and for integers of few distinct values: at most 100, and 5 rows each on average."""
    kind, distinct = y.dtype.kind, len(np.unique(y))
    if kind not in "iufb" and distinct > max(100, len(y) / 2):
        raise ValueError(
            f"the target {target!r} holds {distinct} different texts in {len(y)} rows, such as {str(y[0])!r}: name "
            "another, or give --task classification."
        )
    classes = kind not in "iufb" or (kind != "f" and distinct <= 100 and len(y) >= 5 * distinct)
    return "classification" if classes else "regression"
