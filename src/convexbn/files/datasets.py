"""Public data sets: scikit-learn's digits, Fashion-MNIST from its four idx files, CIFAR-10 from two Parquet files.

Nothing is downloaded, and no pickle is loaded.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convexbn.files.dataset import Dataset

_DEBIAN_HOME = Path("/usr/share/datasets/fashion-mnist")
_FASHION_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
_CIFAR_ROWS = (50_000, 10_000)
CIFAR10_HOME = "CIFAR10_HOME"  # the environment variable with its folder


def digits() -> Dataset:
    """Return the 1,797 handwritten digits of scikit-learn: float64 grey values 0 to 16, 8 x 8 pixels, no test part.

    Examples
    --------
    >>> data = digits()
    >>> data.X.shape, data.X_test is None
    ((1797, 64), True)
    """
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    return Dataset("digits", X.astype(np.float64), y.astype(np.int64), image_shape=(8, 8, 1))


def fashion_mnist(data_home: str | os.PathLike[str] | None = None) -> Dataset:
    """Return Fashion-MNIST: uint8 grey values of 60,000 training and 10,000 test images, 28 x 28 pixels.

    Both parts have all ten labels 0 to 9.

    Parameters
    ----------
    data_home : str or path-like, optional
        Folder of the four idx files, each plain or gzipped (``.gz``). None: the folder of Debian's package
        dataset-fashion-mnist.

    Raises
    ------
    FileNotFoundError
        If a file is missing; the message says how to get it.
    ValueError
        If a file is not exactly as expected; the message names the file and the rule.
    """
    home = _DEBIAN_HOME if data_home is None else Path(data_home)
    images, labels, test_images, test_labels = [_find(home, name) for name in _FASHION_FILES]
    train, test = _grey_images(images, labels, 60_000), _grey_images(test_images, test_labels, 10_000)
    return Dataset("fashion-mnist", *train, *test, image_shape=(28, 28, 1))


def cifar10(data_home: str | os.PathLike[str] | None = None) -> Dataset:
    """Return CIFAR-10: uint8 pixels of 50,000 training and 10,000 test images, 32 x 32 in red, green and blue.

    The files are those of the Hugging Face hub: columns ``img`` (``bytes``: a PNG or JPEG image) and ``label``. Images
    are flattened row by row, the three colours of a pixel side by side. Both parts have all ten labels 0 to 9.

    Parameters
    ----------
    data_home : str or path-like, optional
        Folder of ``train.parquet`` and ``test.parquet``. None: the environment variable ``CIFAR10_HOME``.

    Raises
    ------
    ImportError
        If pyarrow or Pillow (extra ``data``) is not installed.
    FileNotFoundError
        If a file is missing; the message says what to give.
    ValueError
        If a file is not exactly as expected; the message names the file and the rule.
    """
    home = os.environ.get(CIFAR10_HOME) if data_home is None else data_home
    paths = [Path(home or "", f"{part}.parquet") for part in ("train", "test")]
    missing = [path for path in paths if not path.is_file()]
    if home is None or missing:
        what = "no folder is given" if home is None else f"there is no {missing[0]}"
        raise FileNotFoundError(
            f"CIFAR-10: {what}; give the folder of train.parquet and test.parquet as data_home (--data-home) or in the "
            f"environment variable {CIFAR10_HOME}"
        )
    (X, y), (X_test, y_test) = (_coloured_images(path, n) for path, n in zip(paths, _CIFAR_ROWS, strict=True))
    return Dataset("cifar-10", X, y, X_test, y_test, image_shape=(32, 32, 3))


def _coloured_images(path: Path, n: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Decode n images of 32 x 32 pixels, one per row, and their labels, batch by batch."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading CIFAR-10 needs pyarrow and Pillow: pip install 'convexbn[data]'.") from error
    X, y, done = np.empty((n, 3072), dtype=np.uint8), np.empty(n, dtype=np.int64), 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if file.metadata.num_rows != n:
                raise ValueError(f"must hold {n:,} images, and it holds {file.metadata.num_rows:,}")
            for batch in file.iter_batches(1000, columns=["img", "label"]):
                for image in batch.column("img").to_pylist():
                    X[done] = _pixels(image["bytes"], Image)
                    done += 1
                y[done - len(batch) : done] = batch.column("label").to_numpy(zero_copy_only=False)
    except (pa.ArrowException, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error or 'no sound Parquet file with columns img and label'}") from error
    return X, _ten_classes(path, y)


def _pixels(image: bytes, pillow: Any) -> NDArray[np.uint8]:
    """Decode one image, after a check of its size."""
    try:
        with pillow.open(io.BytesIO(image), formats=("PNG", "JPEG")) as opened:
            if opened.size != (32, 32):
                raise ValueError(f"images must have 32 x 32 pixels, and one has {opened.size[0]} x {opened.size[1]}")
            return np.asarray(opened.convert("RGB")).ravel()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"images must be sound PNG or JPEG ({error})") from error


def _find(home: Path, name: str) -> Path:
    """Return the path of the plain or the gzipped file."""
    for path in (home / name, home / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"Fashion-MNIST: {home} has neither {name} nor {name}.gz; install the Debian package "
        "dataset-fashion-mnist, or give the folder of the four files as data_home (--data-home)"
    )


def _grey_images(images: Path, labels: Path, n: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read n images of 28 x 28 pixels, one per row, and their labels."""
    X = _read_idx(images, (n, 28, 28)).reshape(n, -1)
    return X, _ten_classes(labels, _read_idx(labels, (n,)).astype(np.int64))


def _ten_classes(path: Path, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the labels; refuse them unless they are 0 to 9, each at least once."""
    if not np.array_equal(np.unique(labels), np.arange(10)):
        raise ValueError(f"{path}: the labels must be 0 to 9, each at least once")
    return labels


def _read_idx(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Read an idx file of unsigned bytes; its header and length must be exactly those of the shape.

    At most one byte beyond the expected length is read or decompressed.
    """
    magic, dimensions = bytes([0, 0, 8, len(shape)]), np.array(shape, dtype=">u4").tobytes()  # 8: unsigned bytes
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
