"""Rows to learn from, read from a file or a public data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data matrix with its target, if it has one, and its test part, if its authors split it.

    Attributes
    ----------
    name : str
        Name of the data set or of its file.
    X, X_test : ndarray (n, d), ndarray or None
        Rows for training and for tests, finite; one flattened image per row.
    y, y_test : ndarray (n,) or None
        Class labels (int64 or text) or numbers (int64 or float64).
    feature_names, target : tuple of str, str or None
        Names of the columns of a file.
    image_shape : tuple of int or None
        Shape of a row that is an image or a signal, ``(height, width, channels)`` or ``(length, channels)``.
    """

    name: str
    X: NDArray[Any]
    y: NDArray[Any] | None
    X_test: NDArray[Any] | None = None
    y_test: NDArray[Any] | None = None
    feature_names: tuple[str, ...] | None = None
    target: str | None = None
    image_shape: tuple[int, ...] | None = None
