"""Rows of the studies: public data sets, loaded once, and planted networks."""

from __future__ import annotations

import functools

import numpy as np

from convexbn import datasets
from convexbn._typing import Float
from convexbn.datasets import Dataset

_LOADERS = {"digits": datasets.digits, "fashion-mnist": datasets.fashion_mnist, "cifar-10": datasets.cifar10}


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
    data = load(name)
    order = np.random.default_rng(seed).permutation(len(data.X))
    if sum(counts) > len(order):
        raise ValueError(f"{name} has {len(order)} training rows, fewer than {sum(counts)}.")
    parts = np.split(order[: sum(counts)], np.cumsum(counts)[:-1])
    largest = 16.0 if name == "digits" else 255.0
    return [(data.X[part] / largest, data.y[part]) for part in parts]


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
