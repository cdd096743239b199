"""Rows of the studies: public data sets, loaded once, and planted networks."""

from __future__ import annotations

import functools

import numpy as np

from convexbn._types import Float, FloatMatrix
from convexbn.files import datasets
from convexbn.files.dataset import Dataset

_LOADERS = {"digits": datasets.digits, "fashion-mnist": datasets.fashion_mnist, "cifar-10": datasets.cifar10}

#: Largest grey value.
_LARGEST = {"digits": 16.0, "fashion-mnist": 255.0, "cifar-10": 255.0}


@functools.cache
def load(name: str) -> Dataset:
    """Data set of a name, read once; do not write to its arrays.

    Parameters
    ----------
    name : {"digits", "fashion-mnist", "cifar-10"}

    Raises
    ------
    FileNotFoundError, ImportError
        As the functions of ``datasets``.
    """
    return _LOADERS[name]()


def draw(name: str, counts: tuple[int, ...], seed: int) -> list[tuple[Float, np.ndarray]]:
    """Disjoint random parts of a data set's training rows: grey values in [0, 1], and labels.

    Parameters
    ----------
    name : str
        See ``load``.
    counts : tuple of int
        Rows of each part.
    seed : int
    """
    return [_in_unit(name, part) for part in _drawn(name, counts, seed)]


def split(name: str, n: int, n_validation: int, seed: int) -> list[tuple[FloatMatrix, np.ndarray]]:
    """Training, validation and test rows, as they are stored.

    Parameters
    ----------
    name : str
        See ``load``.
    n : int
        Training rows; 0 for all that are not for validation.
    n_validation : int
        Drawn from the training part, as are as many test rows of a data set without a test part.
    seed : int
    """
    data = load(name)
    test = [] if data.X_test is None or data.y_test is None else [(data.X_test, data.y_test)]
    held_out = (n_validation,) * (2 - len(test))
    return _drawn(name, (n or len(data.X) - sum(held_out), *held_out), seed) + test


def parts(name: str, n: int, n_validation: int, seed: int) -> list[tuple[Float, np.ndarray]]:
    """The rows of ``split`` as grey values in [0, 1]."""
    return [_in_unit(name, part) for part in split(name, n, n_validation, seed)]


def _drawn(name: str, counts: tuple[int, ...], seed: int) -> list[tuple[FloatMatrix, np.ndarray]]:
    data = load(name)
    order = np.random.default_rng(seed).permutation(len(data.X))
    if sum(counts) > len(order):
        raise ValueError(f"{name} has {len(order)} training rows, fewer than {sum(counts)}.")
    assert data.y is not None
    pieces = np.split(order[: sum(counts)], np.cumsum(counts)[:-1])
    return [(data.X[part], data.y[part]) for part in pieces]


def _in_unit(name: str, part: tuple[FloatMatrix, np.ndarray]) -> tuple[Float, np.ndarray]:
    return part[0] / _LARGEST[name], part[1]


def leading(energies: Float) -> tuple[int, float]:
    """Number of leading directions that count as such, 50 or a sixth of few, and their share of the energy."""
    top = min(50, len(energies) // 6)
    return top, float(energies[:top].sum() / energies.sum())


def planted(n: int, d: int, seed: int, neurons: int = 10, outputs: int = 1) -> tuple[Float, Float]:
    """Correlated normal data, and the noisy outputs of a random batch-normalised ReLU network on it.

    Parameters
    ----------
    n, d : int
        Rows and features.
    seed : int
    neurons, outputs : int
        Of the network.

    Returns
    -------
    X : ndarray (n, d)
    Y : ndarray (n, outputs)
        Of unit variance; a tenth of the network's deviation is noise.

    Examples
    --------
    >>> X, Y = planted(60, 2, seed=0)
    >>> X.shape, Y.shape, round(float(Y.std()), 12)
    ((60, 2), (60, 1), 1.0)
    """
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)) @ (np.eye(d) + 0.3 * rng.standard_normal((d, d)) / np.sqrt(d))
    Z = X @ rng.standard_normal((d, neurons))
    Z = (Z - Z.mean(axis=0)) / Z.std(axis=0)
    scale, shift = rng.standard_normal((2, neurons))
    F = np.maximum(scale * Z + shift, 0) @ rng.standard_normal((neurons, outputs))
    Y = F / F.std(axis=0) + 0.1 * rng.standard_normal((n, outputs))
    return X, Y / Y.std(axis=0)
