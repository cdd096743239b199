"""Rows to learn from, of a file or of a public data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data matrix, its target where there is one, and the test part where its authors split it.

    Attributes
    ----------
    name : str
        What the data set is called; of a file, its name.
    X : ndarray (n, d)
        The (training) rows, finite; one flattened image a row.
    y : ndarray (n,) or None
        Class labels (int64 or text) or numbers (int64 or float64).
    X_test, y_test : ndarray or None
        The test part.
    feature_names : tuple of str or None
        Names of the columns of a file.
    target : str or None
        Name of the column that ``y`` is.
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
