"""Public data sets: the digits that come with scikit-learn, and Fashion-MNIST from its four idx files.

Nothing is downloaded, and no pickle is loaded.
"""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Dataset", "digits", "fashion_mnist"]

_DEBIAN_HOME = Path("/usr/share/datasets/fashion-mnist")
_FASHION_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_UNSIGNED_BYTE = 0x08  # the idx format's code of its element type


@dataclass(frozen=True, eq=False)
class Dataset:
    """A labelled data matrix, split into training and test part where its authors split it.

    Attributes
    ----------
    name : str
        What the data set is called.
    X : ndarray of shape (n_samples, n_features)
        The (training) data, one flattened image a row.
    y : ndarray of shape (n_samples,), int64
        Its class labels.
    X_test, y_test : ndarray or None
        The test part; None where there is none.
    """

    name: str
    X: NDArray[Any]
    y: NDArray[np.int64]
    X_test: NDArray[Any] | None
    y_test: NDArray[np.int64] | None


def digits() -> Dataset:
    """Return the 1,797 handwritten digits of scikit-learn: float64 grey values 0 to 16, 8 x 8 pixels.

    Returns
    -------
    Dataset
        Without a test part.

    Examples
    --------
    >>> data = digits()
    >>> data.X.shape, data.X_test is None
    ((1797, 64), True)
    """
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    return Dataset("digits", X.astype(np.float64), y.astype(np.int64), None, None)


def fashion_mnist(data_home: str | os.PathLike[str] | None = None) -> Dataset:
    """Return Fashion-MNIST: uint8 grey values of 60,000 training and 10,000 test images, 28 x 28 pixels.

    Parameters
    ----------
    data_home : str or path-like, optional
        The folder of the four idx files, each plain or with the ending ``.gz``. None: where Debian's package
        dataset-fashion-mnist puts them.

    Returns
    -------
    Dataset
        Labels 0 to 9, all ten in both parts.

    Raises
    ------
    FileNotFoundError
        If one of the files is missing; the sentence says how to get it.
    ValueError
        If a file is not exactly what it should be; the sentence names the file and the rule.
    """
    home = _DEBIAN_HOME if data_home is None else Path(data_home)
    X, y, X_test, y_test = [_find(home, name) for name in _FASHION_FILES]
    return Dataset(
        "fashion-mnist",
        _images(X, 60_000),
        _labels(y, 60_000),
        _images(X_test, 10_000),
        _labels(y_test, 10_000),
    )


def _find(home: Path, name: str) -> Path:
    """Return the plain or the compressed file of this name."""
    for path in (home / name, home / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"Fashion-MNIST: {home} has neither {name} nor {name}.gz; install the Debian package "
        "dataset-fashion-mnist, or give the folder of the four files as data_home (--data-home)"
    )


def _images(path: Path, n: int) -> NDArray[np.uint8]:
    """Read n images of 28 x 28 pixels, one a row."""
    return _read_idx(path, (n, 28, 28)).reshape(n, -1)


def _labels(path: Path, n: int) -> NDArray[np.int64]:
    """Read n labels and check that they are the ten classes."""
    labels = _read_idx(path, (n,)).astype(np.int64)
    if not np.array_equal(np.unique(labels), np.arange(10)):
        raise ValueError(f"{path}: the labels must be 0 to 9, each at least once")
    return labels


def _read_idx(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Read an idx file of unsigned bytes that must have this shape, header and length exact.

    Never more than one byte beyond the expected length is read or decompressed.
    """
    magic, dimensions = bytes([0, 0, _UNSIGNED_BYTE, len(shape)]), np.array(shape, dtype=">u4").tobytes()
    expected = prod(shape)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            if stream.read(4) != magic:
                raise ValueError(f"{path}: must begin with {magic.hex()}, unsigned bytes in {len(shape)} dimensions")
            if stream.read(len(dimensions)) != dimensions:
                raise ValueError(f"{path}: its header must announce the shape {shape}")
            data = stream.read(expected + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: must be a sound gzip file ({error})") from error
    if len(data) != expected:
        more_or_less = "fewer" if len(data) < expected else "more"
        raise ValueError(f"{path}: {expected:,} bytes must follow its header, and there are {more_or_less}")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape).copy()
