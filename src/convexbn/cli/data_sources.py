"""Where the command line takes rows from: public data sets by name, or a table file; and how it splits them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convexbn.files import datasets
from convexbn.files.dataset import Dataset
from convexbn.files.tables import read_table

#: Share held out by default when a data set has no test part of its own.
DEFAULT_TEST_SIZE = {"digits": 0.2, "fashion-mnist": 0.0, "cifar-10": 0.0}


@dataclass(frozen=True, eq=False)
class Split:
    """Training and test rows, the task, and a description that lets ``certify`` rebuild them."""

    X_train: np.ndarray
    y_train: np.ndarray
    X_test: np.ndarray | None
    y_test: np.ndarray | None
    task: str
    description: dict[str, Any]


def split(data: Dataset, test_size: float | None, seed: int, *, task: str) -> Split:
    """Hold rows out (stratified for classes), or keep the official test part.

    Parameters
    ----------
    data : Dataset
    test_size : float, optional
        Share of rows to hold out; by default that of the data set, 0 for files.
    seed : int
    task : {"auto", "classification", "regression"}
    """
    if data.y is None:
        raise ValueError("--target is required for a file: name the column to predict.")
    task = _infer_task(data.y) if task == "auto" else task
    share = DEFAULT_TEST_SIZE.get(data.name, 0.0) if test_size is None else test_size
    if not 0 <= share < 1:
        raise ValueError(f"--test-size must lie in [0, 1); got {share}.")
    description = {
        "data": data.name,
        "target": data.target,
        "feature_names": None if data.feature_names is None else list(data.feature_names),
        "test_size": share,
        "seed": seed,
        "task": task,
    }
    if share == 0:
        return Split(data.X, data.y, data.X_test, data.y_test, task, description)
    train, test = _split_rows(data.y, share, seed, stratify=task == "classification")
    return Split(data.X[train], data.y[train], data.X[test], data.y[test], task, description)


def training_rows(data: Dataset, description: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Rebuild the training rows of a saved split; all rows when it was made on other data."""
    assert data.y is not None
    if description.get("data") != data.name or not description.get("test_size"):
        return data.X, data.y
    stratify = description["task"] == "classification"
    train, _ = _split_rows(data.y, description["test_size"], description["seed"], stratify=stratify)
    return data.X[train], data.y[train]


def read_data(
    data: str,
    target: str | None,
    *,
    data_home: str | None = None,
    features: Sequence[str] | None = None,
    need_target: bool = False,
) -> Dataset:
    """Read ``digits``, ``fashion-mnist``, ``cifar-10`` or a file of the user's.

    Parameters
    ----------
    data, target : str
        Name or path, and the column to predict (None for named data).
    data_home : str, optional
        Folder of the named data.
    features : sequence of str, optional
        Columns to read as features; all others by default.
    need_target : bool, default=False
        Whether a file without ``target`` is an error.
    """
    if data in DEFAULT_TEST_SIZE:
        if target is not None and features is None and not need_target:
            raise ValueError(f"--target is for files; {data} brings its own labels.")
        return _public(data, data_home)
    if need_target and target is None:
        raise ValueError("--target is required for a file: name the column to compare with.")
    if not os.path.exists(data):
        raise FileNotFoundError(f"{data!r} is neither a file nor one of {', '.join(DEFAULT_TEST_SIZE)}")
    return read_table(data, target, features)


def _public(name: str, data_home: str | None) -> Dataset:
    if name == "digits":
        return datasets.digits()
    return datasets.cifar10(data_home) if name == "cifar-10" else datasets.fashion_mnist(data_home)


def _infer_task(y: np.ndarray) -> str:
    """Text is classes; so are integers with few distinct values (at most 100, and 5 rows each on average)."""
    if y.dtype.kind not in "iufb":
        return "classification"
    distinct = len(np.unique(y))
    few = distinct <= 100 and len(y) >= 5 * distinct
    return "classification" if y.dtype.kind != "f" and few else "regression"


def _split_rows(y: np.ndarray, share: float, seed: int, *, stratify: bool) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(
        np.arange(len(y)), test_size=share, random_state=seed, stratify=y if stratify else None
    )
    return train, test
