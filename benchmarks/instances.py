"""The programs that the benchmarks solve, rebuilt from a seed.

A gated program is the data (whitened, with a constant column), the targets, fixed activation patterns
``D_i = diag(1[A g_i >= 0])`` and a weight decay:

    min over S_1, ..., S_P   1/2 ||sum_i D_i A S_i - Y||_F^2 + weight_decay * sum_i ||S_i||_F

The ReLU program has no fixed patterns; its neurons choose them:

    min over m, s_1, ..., s_m, c_1, ..., c_m   1/2 ||sum_j (A s_j)_+ c_j - Y||^2 + weight_decay * sum_j ||s_j|| |c_j|
"""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convexbn import bounds
from convexbn_studies.data import planted

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist

# n, d, number of gates, weight decay as a fraction of the smallest one whose solution is zero
SHAPES = {
    "G1": (500, 20, 500, 0.05),
    "G2a": (2000, 100, 1000, 0.05),
    "G2b": (2000, 100, 1000, 0.01),
    "G3": (5000, 100, 200, 0.01),
}

# n, d, neurons of the planted network
RELU_SHAPES = {"E1": (60, 2, 5), "E2": (200, 5, 10), "E3": (500, 20, 10)}

STARTS = 3000  # of the local search for the largest weight decay


@dataclass(frozen=True)
class GatedInstance:
    """One gated program.

    Attributes
    ----------
    X : ndarray of shape (n, d)
        Data before whitening.
    Y : ndarray of shape (n, K)
        Targets.
    A : ndarray of shape (n, q)
        Whitened data and the constant column ``1 / sqrt(n)``: orthonormal columns.
    patterns : ndarray of bool, shape (n, P)
        The diagonal of each ``D_i``; no two are equal.
    gates : ndarray of shape (q, P)
        Directions whose sign on A makes the patterns.
    weight_decay : float
        The factor of the penalty.
    """

    X: np.ndarray
    Y: np.ndarray
    A: np.ndarray
    patterns: np.ndarray
    gates: np.ndarray
    weight_decay: float


def gated_instance(name, seed=0, folder=FASHION_MNIST):
    """Build one of the instances of ``SHAPES``.

    Parameters
    ----------
    name : {"G1", "G2a", "G2b", "G3"}
        G1 and G2 are planted networks, G3 is the beginning of Fashion-MNIST.
    seed : int
        Seed of the data (planted ones) and of the gates.
    folder : path-like
        Where the idx files of Fashion-MNIST are; read by G3 only.

    Returns
    -------
    GatedInstance
    """
    n, d, count, fraction = SHAPES[name]
    X, Y = fashion_mnist(n, folder) if name == "G3" else planted(n, d, seed)
    A = whiten(X, d)
    patterns, gates = sample_patterns(A, count, np.random.default_rng([seed, 1]))
    return GatedInstance(X, Y, A, patterns, gates, fraction * largest_weight_decay(A, patterns, Y))


@dataclass(frozen=True)
class ReluInstance:
    """One ReLU program with one output.

    Attributes
    ----------
    X : ndarray of shape (n, d)
        Data before whitening.
    Y : ndarray of shape (n, 1)
        Targets.
    A : ndarray of shape (n, q)
        Whitened data and the constant column ``1 / sqrt(n)``: orthonormal columns.
    weight_decay : float
        The factor of the penalty.
    """

    X: np.ndarray
    Y: np.ndarray
    A: np.ndarray
    weight_decay: float


def relu_instance(name, fraction, seed=0):
    """Build one of the instances of ``RELU_SHAPES``.

    Parameters
    ----------
    name : {"E1", "E2", "E3"}
        Shape of the planted network.
    fraction : float
        Weight decay as a fraction of the largest ``|Y'(A u)_+|`` over unit vectors u that a local search finds.
    seed : int
        Seed of the data.

    Returns
    -------
    ReluInstance
    """
    n, d, neurons = RELU_SHAPES[name]
    X, Y = planted(n, d, seed, neurons)
    A = whiten(X, d)
    largest = bounds.local_maxima(Y, A, STARTS, np.random.default_rng([seed, 1]))[0][0]
    return ReluInstance(X, Y, A, fraction * largest)


def fashion_mnist(n, folder=FASHION_MNIST):
    """Return the first n training images of Fashion-MNIST as rows in [0, 1], and one-hot labels."""
    folder = Path(folder)
    X = read_idx(folder / "train-images-idx3-ubyte.gz")[:n].reshape(n, -1) / 255
    labels = read_idx(folder / "train-labels-idx1-ubyte.gz")[:n]
    return X, np.eye(10)[labels]


def read_idx(path):
    """Read a gzipped idx file of bytes: two zeros, the type, the number of axes, their lengths, the data."""
    with gzip.open(path) as file:
        content = file.read()
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def whiten(X, rank):
    """Return ``[U, 1/sqrt(n)]``, U the leading left singular vectors of the centred data."""
    n = len(X)
    U = np.linalg.svd(X - X.mean(0), full_matrices=False)[0][:, :rank]
    return np.hstack([U, np.full((n, 1), n**-0.5)])


def sample_patterns(A, count, rng):
    """Draw normal gates on A; return the patterns ``A g >= 0`` and the gates, the first of equals kept."""
    gates = rng.standard_normal((A.shape[1], count))
    patterns = gates_to_patterns(A, gates)
    first = np.sort(np.unique(patterns, axis=1, return_index=True)[1])
    return patterns[:, first], gates[:, first]


def gates_to_patterns(A, gates):
    """Return the activation patterns of gates, one a column."""
    return A @ gates >= 0


def largest_weight_decay(A, patterns, Y):
    """Return ``max_i ||A' D_i Y||_F``, from which on the solution of the gated program is zero."""
    return np.sqrt(sum((A.T @ (patterns * y[:, None])) ** 2 for y in Y.T).sum(0)).max()
