"""From a network to a plain torch module with the same outputs, in train mode on the training rows and in eval mode."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from convexbn._types import Float, FloatMatrix
from convexbn.nn.convolution import images_of, layers_of, probe_images
from convexbn.program.layers import Layers, convertible, folded
from convexbn.program.network import BatchNormNetwork
from convexbn.program.output_check import check_conversion

_NUMBERS: dict[torch.dtype, type[np.floating[Any]]] = {torch.float32: np.float32, torch.float64: np.float64}


def to_module(
    network: BatchNormNetwork,
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    fold: bool = False,
    X: FloatMatrix | None = None,
    tol: float | None = None,
) -> nn.Module:
    """Plain torch module of a network, in eval mode and on the CPU.

    The module is ``Sequential(Linear, BatchNorm1d, ReLU, Linear)``, a ``GatedModule`` for gated networks, and of a
    convolutional ReLU network ``Sequential(Conv2d, BatchNorm2d, ReLU, pooling, Flatten, Linear)``, or of signals
    ``Conv1d`` and so on, which takes images (n, channels, height, width). The
    scale of batch norm holds ``eps`` exactly (mathematics, section 1d), and its buffers hold the biased variance: in
    train mode the whole training set gives the same outputs as eval mode and ``network.predict``. Its momentum is 0, so
    that a pass in train mode leaves the buffers; set it before training further. A network without neurons becomes
    one neuron of weight 0.

    Parameters
    ----------
    network : BatchNormNetwork
        ``network_`` of a fitted estimator.
    eps : float, default=1e-5
        What batch norm adds to the variance; any positive number gives the same function.
    dtype : torch.float32 or torch.float64, optional
        Type of the parameters; by default torch's own.
    fold : bool, default=False
        Fold batch norm into the first layer: ``Sequential(Linear, ReLU, Linear)``, for inference.
    X : ndarray (n, d), optional
        Rows on which the outputs are compared, besides random ones: the training rows show what those miss where some
        features vary far more than others.
    tol : float, optional
        Largest difference of the outputs, relative to the largest; by default 1e-12 in float64, 1e-5 in float32.

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    TypeError
        For another type of parameters.
    ValueError
        For an ``eps`` that is not positive, and where the outputs differ by more than ``tol``: with the measured error.

    Examples
    --------
    >>> import numpy as np, convexbn, convexbn.nn
    >>> X = np.random.default_rng(0).standard_normal((20, 30))
    >>> model = convexbn.ConvexBNRegressor(activation="relu").fit(X, X[:, 0])
    >>> convexbn.nn.to_module(model.network_, fold=True)
    Sequential(
      (0): Linear(in_features=30, out_features=2, bias=True)
      (1): ReLU()
      (2): Linear(in_features=2, out_features=1, bias=False)
    )
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in _NUMBERS:
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}: convert the module afterwards.")
    if not 0 < eps < np.inf:
        raise ValueError(f"eps must be positive, got {eps}: torch refuses to train with others.")
    network = convertible(network)
    image_network = network if network.convolution is not None else None
    if image_network is not None and network.gates is not None:
        raise TypeError("a gated convolutional network is no plain torch module: train with activation='relu'.")
    hidden = _folded_layers(network, dtype) if fold else _normalised_layers(network, dtype, eps)
    module = (_assembled if image_network is None else _convolutional)(network, hidden, dtype).eval()

    def converted(rows: FloatMatrix) -> FloatMatrix:
        with torch.no_grad():
            inputs = torch.tensor(rows, device="cpu") if image_network is None else images_of(image_network, rows)
            outputs: FloatMatrix = module(inputs).numpy()
        return outputs

    flat = X if X is None or image_network is None else image_network.layer.rows(X)
    rows = None if flat is None else np.asarray(flat, dtype=np.float64)
    probes = None if image_network is None else probe_images(image_network)
    check_conversion(network, converted, _NUMBERS[dtype], rows, tol, probes)
    return module


def _normalised_layers(network: BatchNormNetwork, dtype: torch.dtype, eps: float) -> list[nn.Module]:
    layers = Layers.from_network(network, _NUMBERS[dtype], eps)
    images = network.convolution is not None and network.convolution.dimensions == 2
    batch_norm = _filled(
        (nn.BatchNorm2d if images else nn.BatchNorm1d)(network.n_neurons, eps=eps, momentum=0.0, device="meta"),
        weight=_tensor(layers.scale, dtype),
        bias=_tensor(layers.offset, dtype),
        running_mean=_tensor(layers.running_mean, dtype),
        running_var=_tensor(layers.running_var, dtype),
        num_batches_tracked=torch.tensor(1, device="cpu"),
    )
    return [_linear(layers.weight, layers.bias, dtype), batch_norm]


def _folded_layers(network: BatchNormNetwork, dtype: torch.dtype) -> list[nn.Module]:
    return [_linear(*folded(network, _NUMBERS[dtype]), dtype)]


def _convolutional(network: BatchNormNetwork, hidden: list[nn.Module], dtype: torch.dtype) -> nn.Module:
    output = network.output.reshape(-1, network.n_outputs)
    return nn.Sequential(*layers_of(network, hidden), _linear(output, None, dtype))


def _assembled(network: BatchNormNetwork, hidden: list[nn.Module], dtype: torch.dtype) -> nn.Module:
    output = _linear(network.output, None, dtype)
    if network.gates is None or network.gate_offsets is None:
        return nn.Sequential(*hidden, nn.ReLU(), output)
    gates = [_tensor(array, torch.float64) for array in (network.mean, network.gates, network.gate_offsets)]
    return GatedModule(nn.Sequential(*hidden), output, *gates)


def _linear(weight: Float, bias: Float | None, dtype: torch.dtype) -> nn.Module:
    layer = nn.Linear(weight.shape[0], weight.shape[1], bias=bias is not None, device="meta")
    tensors = {"weight": _tensor(weight.T, dtype)}
    return _filled(layer, **tensors if bias is None else {**tensors, "bias": _tensor(bias, dtype)})


def _filled(layer: nn.Module, **tensors: torch.Tensor) -> nn.Module:
    """A layer made without memory or random numbers, with its tensors put in their places."""
    layer.load_state_dict(tensors, assign=True)
    return layer


def _tensor(array: Float, dtype: torch.dtype) -> torch.Tensor:
    """A copy: training the module must not change the network."""
    return torch.tensor(np.ascontiguousarray(array), dtype=dtype, device="cpu")


class GatedModule(nn.Module):
    """``output(opened(x) * hidden(x))``, open where ``(x - mean)'gates + gate_offsets >= 0``.

    The gates are buffers, not trained, and in float64 as ``to_module`` makes them: rounding must not open or close
    one. Rows exactly on a gate's hyperplane may fall on either side of it.

    Parameters
    ----------
    hidden, output : torch.nn.Module
        Linear and batch norm, or one folded Linear, d to m features; and the last Linear, m to K.
    mean, gates, gate_offsets : Tensor (d,), (d, m), (m,)
        A gate for each of the m neurons.

    Examples
    --------
    >>> hidden, output = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), nn.Linear(3, 1, bias=False)
    >>> GatedModule(hidden, output, torch.zeros(2), torch.ones(2, 3), torch.zeros(3))(torch.ones(4, 2)).shape
    torch.Size([4, 1])
    """

    mean: torch.Tensor
    gates: torch.Tensor
    gate_offsets: torch.Tensor

    def __init__(
        self,
        hidden: nn.Module,
        output: nn.Module,
        mean: torch.Tensor,
        gates: torch.Tensor,
        gate_offsets: torch.Tensor,
    ) -> None:
        super().__init__()
        self.hidden = hidden
        self.output = output
        self.register_buffer("mean", mean)
        self.register_buffer("gates", gates)
        self.register_buffer("gate_offsets", gate_offsets)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs: (n, d) -> (n, K)."""
        opened = (x.to(self.gates.dtype) - self.mean) @ self.gates + self.gate_offsets >= 0
        response = self.hidden(x)
        return self.output(torch.where(opened, response, torch.zeros_like(response)))
