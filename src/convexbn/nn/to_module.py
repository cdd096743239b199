"""From a network to a plain torch module with the same outputs, in train mode on the training rows and in eval mode."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from convexbn._types import Float, FloatMatrix
from convexbn.nn.convolution import images_of, layers_of, probe_images
from convexbn.nn.last_layers import NUMBERS
from convexbn.program.layers import Layers, convertible, folded
from convexbn.program.network import BatchNormNetwork
from convexbn.program.output_check import check_conversion


def to_module(
    network: BatchNormNetwork, *, eps: float = 1e-5, dtype: torch.dtype | None = None, fold: bool = False,
    X: FloatMatrix | None = None, tol: float | None = None,
) -> nn.Module:  # fmt: skip
    """Plain torch module of a network, in eval mode and on the CPU.

    The module is ``Sequential(Linear, BatchNorm1d, ReLU, Linear)``, or a ``GatedModule`` for gated networks. A
    convolutional ReLU network becomes ``Sequential(Conv2d, BatchNorm2d, ReLU, pooling, Flatten, Linear)``, which takes
    images (n, channels, height, width), or its 1d counterpart for signals.

    The scale of batch norm contains ``eps`` exactly (mathematics, section 1d), and its buffers hold the biased
    variance: in train mode the whole training set gives the same outputs as eval mode and ``network.predict``. Its
    momentum is 0, so that a pass in train mode leaves the buffers; set it before training further. A network without
    neurons becomes one neuron of weight 0.

    Parameters
    ----------
    network : BatchNormNetwork
        ``network_`` of a fitted estimator.
    eps : float, default=1e-5
        Added to the variance by batch norm; any positive number gives the same function.
    dtype : torch.float32 or torch.float64, optional
        Type of the parameters; by default torch's own.
    fold : bool, default=False
        Fold batch norm into the first layer: ``Sequential(Linear, ReLU, Linear)``, for inference.
    X : ndarray (n, d), optional
        Rows on which the outputs are compared, besides random ones. The training rows show what random ones miss if
        some features vary far more than others.
    tol : float, optional
        Largest difference of the outputs, relative to the largest; by default 1e-12 in float64, 1e-5 in float32.

    Raises
    ------
    TypeError
        For another type of parameters, and for a gated convolutional network.
    ValueError
        For an ``eps`` that is not positive, and if the outputs differ by more than ``tol``: with the measured error.

    Examples
    --------
    >>> import numpy as np, convexbn, convexbn.nn
    >>> X = np.random.default_rng(0).standard_normal((20, 30))
    >>> model = convexbn.ConvexBNRegressor(activation="relu").fit(X, X[:, 0])
    >>> convexbn.nn.to_module(model.network_, fold=True)
    Sequential(
      (0): Linear(in_features=30, out_features=2, bias=True)
      (1): ReLU()
      (2): Linear(in_features=2, out_features=1, bias=True)
    )
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in NUMBERS:
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}: convert the module afterwards.")
    if not 0 < eps < np.inf:
        raise ValueError(f"eps must be positive, got {eps}: torch refuses to train with others.")
    network = convertible(network)
    convolutional = network.convolution is not None
    if convolutional and network.gates is not None:
        raise TypeError("a gated convolutional network is no plain torch module: train with activation='relu'.")
    module = _module(network, dtype, None if fold else eps).eval()

    def converted(rows: FloatMatrix) -> FloatMatrix:
        inputs = images_of(network, rows) if convolutional else torch.tensor(rows, device="cpu")
        with torch.no_grad():
            return module(inputs).numpy()

    rows = None if X is None else np.asarray(network.layer.rows(X) if convolutional else X, dtype=np.float64)
    check_conversion(network, converted, NUMBERS[dtype], rows, tol, probe_images(network) if convolutional else None)
    return module


def _module(network: BatchNormNetwork, dtype: torch.dtype, eps: float | None) -> nn.Module:
    """Module of a network, with batch norm folded in if ``eps`` is None."""
    if eps is None:
        hidden = [_linear(*folded(network, NUMBERS[dtype]), dtype)]
    else:
        layers = Layers.from_network(network, NUMBERS[dtype], eps)
        hidden = [_linear(layers.weight, layers.bias, dtype), _batch_norm(layers, network, dtype)]
    bias = network.output_bias if network.output_bias.any() else None
    output = _linear(network.output.reshape(-1, network.n_outputs), bias, dtype)
    if network.convolution is not None:
        return nn.Sequential(*layers_of(network, hidden), output)
    if network.gates is None or network.gate_offsets is None:
        return nn.Sequential(*hidden, nn.ReLU(), output)
    gates = [_tensor(array, torch.float64) for array in (network.mean, network.gates, network.gate_offsets)]
    return GatedModule(nn.Sequential(*hidden), output, *gates)


def _batch_norm(layers: Layers, network: BatchNormNetwork, dtype: torch.dtype) -> nn.Module:
    images = network.convolution is not None and network.convolution.dimensions == 2
    kind = nn.BatchNorm2d if images else nn.BatchNorm1d
    arrays = {"weight": layers.scale, "bias": layers.offset}
    arrays |= {"running_mean": layers.running_mean, "running_var": layers.running_var}
    tensors = {name: _tensor(array, dtype) for name, array in arrays.items()}
    tensors["num_batches_tracked"] = torch.tensor(1, device="cpu")
    return _fill(kind(network.n_neurons, eps=layers.eps, momentum=0.0, device="meta"), tensors)


def _linear(weight: Float, bias: Float | None, dtype: torch.dtype) -> nn.Module:
    tensors = {"weight": _tensor(weight.T, dtype)} | ({} if bias is None else {"bias": _tensor(bias, dtype)})
    d, m = weight.shape
    return _fill(nn.Linear(d, m, bias=bias is not None, device="meta"), tensors)


def _fill(layer: nn.Module, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Put tensors into a layer that was made without memory or random numbers."""
    layer.load_state_dict(tensors, assign=True)
    return layer


def _tensor(array: Float, dtype: torch.dtype) -> torch.Tensor:
    """Copy an array: training the module must not change the network."""
    return torch.tensor(np.ascontiguousarray(array), dtype=dtype, device="cpu")


class GatedModule(nn.Module):
    """Gated network ``output(opened(x) * hidden(x))``, open where ``(x - mean)'gates + gate_offsets >= 0``.

    The gates are buffers, not trained. ``to_module`` makes them in float64: rounding must not open or close one. Rows
    exactly on a gate's hyperplane may fall on either side of it.

    Parameters
    ----------
    hidden, output : torch.nn.Module
        Linear and batch norm, or one folded Linear, d to m features; and the last Linear, m to K.
    mean, gates, gate_offsets : Tensor (d,), (d, m), (m,)
        One gate for each of the m neurons.

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
        self, hidden: nn.Module, output: nn.Module, mean: torch.Tensor, gates: torch.Tensor, gate_offsets: torch.Tensor
    ) -> None:
        super().__init__()
        self.hidden, self.output = hidden, output
        for name, tensor in (("mean", mean), ("gates", gates), ("gate_offsets", gate_offsets)):
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs: (n, d) -> (n, K)."""
        opened = (x.to(self.gates.dtype) - self.mean) @ self.gates + self.gate_offsets >= 0
        response = self.hidden(x)
        return self.output(torch.where(opened, response, torch.zeros_like(response)))
