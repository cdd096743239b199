"""The float64 judge of every method: objectives and duality gaps, from the data alone."""

import time
from dataclasses import dataclass

import numpy as np


def fitted(instance, blocks):
    """Return ``sum_i D_i A S_i``, shape (n, K).

    Parameters
    ----------
    instance : GatedInstance
        The program.
    blocks : ndarray of shape (P, q, K)
        The coefficients ``S_i``.
    """
    M = instance.patterns.astype(float)
    outputs = np.moveaxis(np.asarray(blocks, dtype=float), 2, 0)
    return np.stack([((M @ S) * instance.A).sum(1) for S in outputs], axis=1)


def objective(instance, blocks):
    """Return ``1/2 ||sum_i D_i A S_i - Y||_F^2 + weight_decay sum_i ||S_i||_F`` in float64."""
    norms = np.linalg.norm(np.asarray(blocks, dtype=float), axis=(1, 2))
    return 0.5 * np.sum((fitted(instance, blocks) - instance.Y) ** 2) + instance.weight_decay * norms.sum()


def lower_bound(instance, blocks):
    """Return the dual value of the residual V, scaled to be the best feasible multiple of itself.

    Notes
    -----
    The dual is ``max <Y, V> - 1/2 ||V||_F^2`` subject to ``||A' D_i V||_F <= weight_decay`` for every i.
    """
    Y = instance.Y
    V = Y - fitted(instance, blocks)
    correlations = sum((instance.A.T @ (instance.patterns * v[:, None])) ** 2 for v in V.T)
    limit = instance.weight_decay / np.sqrt(correlations.sum(0).max())
    V = min(limit, np.sum(Y * V) / np.sum(V**2)) * V
    return np.sum(Y * V) - 0.5 * np.sum(V**2)


def relative_gap(instance, blocks, bound=-np.inf):
    """Return ``(objective - lower bound) / objective``, with a better bound if one is known."""
    value = objective(instance, blocks)
    return (value - max(bound, lower_bound(instance, blocks))) / value


class Certifier:
    """Callback that ends a method at a certified relative gap and counts the method's own CPU seconds.

    Parameters
    ----------
    instance : GatedInstance
        The program.
    gap : float
        Relative gap at which to stop.
    every : int
        Iterations between two looks at the gap.

    Attributes
    ----------
    seconds : float
        CPU seconds since this object was made, without those spent judging.
    iterations : int
        Number of calls.
    relative_gap : float
        At the last look, with the best lower bound of all looks.
    """

    def __init__(self, instance, gap, every=5):
        self.instance, self.gap, self.every = instance, gap, every
        self.iterations, self.bound, self.relative_gap, self.seconds = 0, -np.inf, np.inf, 0.0
        self.resumed = time.process_time()

    def __call__(self, blocks):
        """Return whether the gap has been reached."""
        self.seconds += time.process_time() - self.resumed
        self.iterations += 1
        if self.iterations % self.every == 0:
            self.bound = max(self.bound, lower_bound(self.instance, blocks))
            self.relative_gap = relative_gap(self.instance, blocks, self.bound)
        self.resumed = time.process_time()
        return self.relative_gap <= self.gap


def network_objective(instance, network):
    """Return the objective of a batch-normalised ReLU network: loss plus balanced weight decay, from raw data.

    Parameters
    ----------
    instance : ReluInstance
        The program.
    network : Network
        Weights on the raw features; batch norm takes its statistics from the instance's data.
    """
    response = instance.X @ network.weight
    response -= response.mean(0)
    norms = np.linalg.norm(response, axis=0)
    normalised = response / np.where(norms > 0, norms, 1)
    hidden = np.maximum(network.gamma * normalised + network.shift / np.sqrt(len(response)), 0)
    masses = np.hypot(network.gamma, network.shift) * np.linalg.norm(network.output, axis=1)
    return 0.5 * np.sum((hidden @ network.output - instance.Y) ** 2) + instance.weight_decay * masses.sum()


@dataclass(frozen=True)
class Network:
    """Neurons ``(gamma BN(x'w) + shift / sqrt(n))_+ output`` on the raw features; BN has norm 1, not variance 1.

    Attributes
    ----------
    weight : ndarray of shape (d, m)
    gamma, shift : ndarray of shape (m,)
    output : ndarray of shape (m, 1)
    """

    weight: np.ndarray
    gamma: np.ndarray
    shift: np.ndarray
    output: np.ndarray


def from_whitened(instance, first, output):
    """Return neurons ``(A first)_+ output`` on the whitened data as a Network on the raw features."""
    centred = instance.X - instance.X.mean(0)
    back = np.linalg.lstsq(centred, instance.A[:, :-1])[0]
    return Network(back @ first[:-1], np.linalg.norm(first[:-1], axis=0), first[-1], output)
