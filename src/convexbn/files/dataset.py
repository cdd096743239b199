"""Rows to learn from, read from a file or a public data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of a file, numbers and text, in which cells may be missing.

    Attributes
    ----------
    numbers : ndarray (n, k)
        Columns of numbers, float64; NaN where a cell is missing.
    names : tuple of str
        Names of these columns.
    texts : mapping of str to ndarray (n,)
        Columns of text, objects; None where a cell is missing.
    """

    numbers: NDArray[Any]
    names: tuple[str, ...]
    texts: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.texts[name] if name in self.texts else self.numbers[:, self.names.index(name)]

    def rows(self, chosen: NDArray[np.intp]) -> Table:
        """Table of some rows."""
        return Table(self.numbers[chosen], self.names, {name: cells[chosen] for name, cells in self.texts.items()})


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data matrix with its target, if it has one, and its test part, if its authors split it.

    Attributes
    ----------
    name : str
        Name of the data set or of its file.
    X, X_test : ndarray (n, d) or Table, ndarray or None
        Rows for training and for tests, finite; one flattened image per row.
    y, y_test : ndarray (n,) or None
        Class labels (int64 or text) or numbers (int64 or float64).
    feature_names, target : tuple of str, str or None
        Names of the columns of a file.
    image_shape : tuple of int or None
        Shape of a row that is an image or a signal, ``(height, width, channels)`` or ``(length, channels)``.
    verbatim : mapping of str to sequence of str
        Columns as they are written, beside the features.
    notes : tuple of str
        What the reader left out or took another way than it is written, in short lines.
    """

    name: str
    X: Any
    y: NDArray[Any] | None
    X_test: NDArray[Any] | None = None
    y_test: NDArray[Any] | None = None
    feature_names: tuple[str, ...] | None = None
    target: str | None = None
    image_shape: tuple[int, ...] | None = None
    verbatim: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
