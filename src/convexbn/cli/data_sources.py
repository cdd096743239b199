"""Where the command line takes rows from: bundled data sets by name, or a table file; and how it splits them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convexbn.files import datasets
from convexbn.files.tables import read_table

#: Shapes of the images of the bundled sets.
IMAGES = {"digits": (8, 8, 1), "fashion-mnist": (28, 28, 1), "cifar-10": (32, 32, 3)}

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


@dataclass(frozen=True, eq=False)
class Source:
    """Rows of one data set: all of a table, or the training and test part of a bundled set."""

    name: str
    X: np.ndarray
    y: np.ndarray | None
    X_test: np.ndarray | None = None
    y_test: np.ndarray | None = None
    feature_names: tuple[str, ...] | None = None
    target: str | None = None
    image_shape: tuple[int, ...] | None = None  # where the rows are known to be images or signals

    def split(self, test_size: float | None, seed: int, *, task: str) -> Split:
        """Hold rows out (stratified for classes), or keep the official test part."""
        if self.y is None:
            raise ValueError("--target is required for a file: name the column to predict.")
        task = _infer_task(self.y) if task == "auto" else task
        share = DEFAULT_TEST_SIZE.get(self.name, 0.0) if test_size is None else test_size
        if not 0 <= share < 1:
            raise ValueError(f"--test-size must lie in [0, 1); got {share}.")
        description = {
            "data": self.name,
            "target": self.target,
            "feature_names": None if self.feature_names is None else list(self.feature_names),
            "test_size": share,
            "seed": seed,
            "task": task,
        }
        if share == 0:
            return Split(self.X, self.y, self.X_test, self.y_test, task, description)
        train, test = _split_rows(self.y, share, seed, stratify=task == "classification")
        return Split(self.X[train], self.y[train], self.X[test], self.y[test], task, description)

    def training_rows(self, description: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Rebuild the training rows of a saved split; all rows when it was made on other data."""
        assert self.y is not None
        if description.get("data") != self.name or not description.get("test_size"):
            return self.X, self.y
        train, _ = _split_rows(
            self.y,
            description["test_size"],
            description["seed"],
            stratify=description["task"] == "classification",
        )
        return self.X[train], self.y[train]


def read_source(
    data: str,
    target: str | None,
    *,
    data_home: str | None = None,
    features: Sequence[str] | None = None,
    need_target: bool = False,
) -> Source:
    """Read ``digits``, ``fashion-mnist``, ``cifar-10`` or a file of the user's."""
    if data in DEFAULT_TEST_SIZE:
        if target is not None and features is None and not need_target:
            raise ValueError(f"--target is for files; {data} brings its own labels.")
        bundled = _bundled(data, data_home)
        return Source(data, bundled.X, bundled.y, bundled.X_test, bundled.y_test, image_shape=IMAGES[data])
    if need_target and target is None:
        raise ValueError("--target is required for a file: name the column to compare with.")
    if not os.path.exists(data):
        raise FileNotFoundError(f"{data!r} is neither a file nor one of {', '.join(DEFAULT_TEST_SIZE)}")
    table = read_table(data, target, features)
    name = os.path.basename(data)
    return Source(
        name, table.features, table.target, feature_names=table.feature_names, target=target, image_shape=table.shape
    )


def _bundled(name: str, data_home: str | None) -> datasets.Dataset:
    if name == "digits":
        return datasets.digits()
    return datasets.cifar10(data_home) if name == "cifar-10" else datasets.fashion_mnist(data_home)


def estimator_for(task: str) -> Any:
    """The estimator class of a task."""
    from convexbn.estimators.classifier import ConvexBNClassifier
    from convexbn.estimators.regressor import ConvexBNRegressor

    return ConvexBNClassifier if task == "classification" else ConvexBNRegressor


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
