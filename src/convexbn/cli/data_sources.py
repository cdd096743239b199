"""Rows of the command line: public data sets by name or table files, and their split."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convexbn.cli.output import described, feature_names, quiet
from convexbn.files import datasets
from convexbn.files.dataset import Dataset
from convexbn.files.tables import read_table

#: Share held out by default when a data set has no test part of its own.
_DEFAULT_TEST_SIZE = {"digits": 0.2, "fashion-mnist": 0.0, "cifar-10": 0.0}


@dataclass(frozen=True, eq=False)
class Split:
    """Training and test rows, the task, and a description from which ``judge_again`` rebuilds them."""

    X_train: np.ndarray
    y_train: np.ndarray
    X_test: np.ndarray | None
    y_test: np.ndarray | None
    task: str
    description: dict[str, Any]

    @property
    def told(self) -> str:
        """What is predicted, and the name of the score."""
        n_classes = len(np.unique(self.y_train)) if self.task == "classification" else None
        return described(self.task, self.description["target"], n_classes)


def split(data: Dataset, test_size: float | None, seed: int, *, task: str) -> Split:
    """Hold rows out (stratified for classes), or keep the official test part.

    Parameters
    ----------
    data : Dataset
    test_size, seed : float or None, int
        Share of rows to hold out; by default that of the data set, 0 for files.
    task : {"auto", "classification", "regression"}
    """
    from sklearn.model_selection import train_test_split

    if data.y is None:
        raise ValueError("--target is required for a file: name the column to predict.")
    task = _infer_task(data.y) if task == "auto" else task
    if task == "regression" and data.y.dtype.kind not in "iufb":
        raise ValueError(f"regression is of numbers, and the target holds text such as {str(data.y[0])!r}.")
    share = _DEFAULT_TEST_SIZE.get(data.name, 0.0) if test_size is None else test_size
    if not 0 <= share < 1:
        raise ValueError(f"--test-size must lie in [0, 1); got {share}.")
    names = None if data.feature_names is None else list(data.feature_names)
    description = {
        "data": data.name, "target": data.target, "feature_names": names,
        "test_size": share, "seed": seed, "task": task,
    }  # fmt: skip
    if share == 0:
        return Split(data.X, data.y, data.X_test, data.y_test, task, description)
    stratify = data.y if task == "classification" else None
    try:
        train, test = train_test_split(np.arange(len(data.y)), test_size=share, random_state=seed, stratify=stratify)
    except ValueError as error:
        if stratify is None:
            raise
        raise ValueError(_few_members(data.y, share)) from error
    return Split(data.X[train], data.y[train], data.X[test], data.y[test], task, description)


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
    data = read_data(options.data, target, data_home=options.data_home, features=names, need_target=True)
    share, seed = (made["test_size"], made["seed"]) if made.get("data") == data.name else (0.0, 0)
    rows = split(data, share, seed, task="classification" if hasattr(model, "classes_") else "regression")
    model.time_limit = options.time_limit
    with quiet():
        proof = model.certify(rows.X_train, rows.y_train)
    return rows, proof, model.fingerprint(rows.X_train, rows.y_train) == model.fingerprint_


def read_columns(options: argparse.Namespace) -> Dataset:
    """Data to train on, with the columns of ``--columns``, or all, but those of ``--drop``."""
    if options.columns is not None and options.data in _DEFAULT_TEST_SIZE:
        raise ValueError(f"--columns is for files; {options.data} has no names of columns.")
    home, columns = options.data_home, options.columns
    return read_data(options.data, options.target, data_home=home, features=columns, dropped=options.drop or ())


def read_data(
    data: str, target: str | None, *, data_home: str | None = None, features: Sequence[str] | None = None,
    dropped: Sequence[str] = (), need_target: bool = False,
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
    return read_table(data, target, features, dropped)


def _infer_task(y: np.ndarray) -> str:
    """Classification for text and for integers of few distinct values: at most 100, and 5 rows each on average."""
    kind, distinct = y.dtype.kind, len(np.unique(y))
    classes = kind not in "iufb" or (kind != "f" and distinct <= 100 and len(y) >= 5 * distinct)
    return "classification" if classes else "regression"
