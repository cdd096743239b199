"""From a torch module of Linear, BatchNorm1d, ReLU, Linear to a network."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from convexbn.nn.convolution import is_convolutional, read_convolutional
from convexbn.nn.last_layers import LastLayers, as_tensor, read_last_layers
from convexbn.program.network import BatchNormNetwork
from convexbn.program.output_check import probe_rows

#: Factor by which far probes are farther from the mean than near ones: activations that saturate show there.
_FAR = 30.0


def from_module(
    module: nn.Module, X: Any = None, *, n_effective: float | None = None, statistics: str = "stored"
) -> BatchNormNetwork:
    """Network of a torch module made of Linear, BatchNorm1d, ReLU, Linear, in any nesting.

    A module of Conv, BatchNorm, ReLU, pooling, Linear takes images (n, channels, height, width) for ``X``, and becomes
    a network with a convolution, channels first.

    ReLU may be a call in ``forward``; Identity, Flatten and Dropout, which change nothing in eval mode, are skipped.
    Parameters of any floating type are read in float64. Neurons keep their order and their norms. The module is not
    changed.

    Parameters
    ----------
    module : torch.nn.Module
        In train or eval mode, on any device.
    X : ndarray or Tensor (n, ...), optional
        The rows that it was trained on: gamma and shift refer to their statistics.
    n_effective : float, optional
        Without ``X``, the number of those rows, whose statistics are then taken to be the stored ones.
    statistics : {"stored", "batch"}
        Whether the network has the function of eval mode, with the stored statistics, or that of train mode on all rows
        of ``X`` at once.

    Raises
    ------
    TypeError, ValueError
        For a layer of another type or that cannot be read, by its name: batch norm untrained or without statistics,
        scale and shift, numbers that are not finite. For a forward that does something else.

    Examples
    --------
    >>> import torch, convexbn.nn
    >>> layers = torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 1, bias=False)
    >>> module, X = torch.nn.Sequential(*layers), torch.randn(50, 3)
    >>> outputs = module(X)  # a pass in train mode gives the batch norm statistics
    >>> network = convexbn.nn.from_module(module, X, statistics="batch")
    >>> bool(abs(network.predict(X.double().numpy()) - outputs.detach().numpy()).max() < 1e-5)
    True
    """
    if statistics not in ("stored", "batch"):
        raise ValueError(f"statistics must be 'stored' or 'batch', got {statistics!r}.")
    if is_convolutional(module):
        if X is None:
            raise ValueError("a convolutional module does not hold the shape of its images: give X.")
        images = as_tensor(X)
        return read_convolutional(module, images).network(images, statistics)
    last = read_last_layers(module)
    _check_two_layer(last)
    layers, d = last.layers, len(last.layers.weight)
    if X is None:
        if n_effective is None or statistics == "batch":
            raise ValueError("a module does not hold its training rows: give X, or n_effective for their number.")
        if not 0 < n_effective < np.inf:
            raise ValueError(f"n_effective must be a positive number of rows, got {n_effective}.")
        _check_inputs(last, torch.empty(0, d, dtype=torch.float64, device="cpu"))
        return layers.network_without_rows(float(n_effective))
    if n_effective is not None:
        raise ValueError("give X or n_effective, not both: n_effective is the number of rows of X.")
    tensor = as_tensor(X)
    if tensor.ndim < 2 or len(tensor) < 2 or tensor[0].numel() != d:
        raise ValueError(f"X must have two rows or more, of {d} features; got shape {tuple(tensor.shape)}.")
    _check_inputs(last, tensor)
    rows = tensor.flatten(1).numpy()
    return (layers.with_statistics_of(rows) if statistics == "batch" else layers).network(rows)


def _check_two_layer(last: LastLayers) -> None:
    """Raise ``ValueError`` for layers before these two."""
    if last.before:
        first = type(last.module.get_submodule(last.before[0])).__name__
        raise ValueError(
            f"{first} '{last.before[0]}' comes before Linear '{last.linear}', and a network of this package has two "
            "layers: give the module from there on, and its inputs as data."
        )


def _check_inputs(last: LastLayers, X: torch.Tensor) -> None:
    """Run the module on random rows and on the first of ``X`` (n, ...), which gives their shape: Linear takes them."""
    mean = last.layers.implied_mean()
    near = probe_rows(last.layers.weight * last.layers.gain, mean)
    far = mean + _FAR * (near - mean)
    rows = torch.cat([torch.from_numpy(np.vstack([near, far])).reshape(-1, *X.shape[1:]), X[: len(near)]])
    expected, features = rows.flatten(1).numpy(), last.features(rows)
    if not np.array_equal(features, expected):
        raise ValueError(
            f"the forward of the {type(last.module).__name__} changes its inputs before Linear '{last.linear}': give "
            "the layers in a Sequential, and changed inputs as data."
        )
