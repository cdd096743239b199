"""ONNX files of networks, written without torch: Gemm, BatchNormalization, Relu, Gemm."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from convexbn._types import FloatMatrix
from convexbn._version import __version__
from convexbn.files.atomic import write_atomically
from convexbn.program.layers import Layers, convertible
from convexbn.program.network import BatchNormNetwork
from convexbn.program.output_check import check_conversion

#: Batch norm adds this to the variance; a float32, as ONNX stores it.
_EPS = float(np.float32(1e-5))
#: Old enough for the runtimes in use; later versions do not change the operators.
_OPSET, _IR_VERSION = 17, 8


def export(
    network: BatchNormNetwork,
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    X: FloatMatrix | None = None,
    tol: float | None = None,
) -> None:
    """Write a network as an ONNX file, in one step: input ``X`` (rows, d), output ``outputs`` (rows, K).

    A gated network has five nodes in place of Relu; its gates are computed in float64.

    Parameters
    ----------
    network : BatchNormNetwork
        ``network_`` of a fitted estimator.
    path : str or os.PathLike
    dtype : {"float32", "float64"}
        Type of the weights, the input and the output.
    X : ndarray (n, d), optional
        Rows on which the outputs are compared before the file is written, besides random ones. Training rows show
        errors that random rows miss if some features vary far more than others.
    tol : float, optional
        Largest difference of the outputs, relative to the largest output; by default 1e-12 in float64, 1e-5 in float32.

    Raises
    ------
    ImportError
        When onnx is not installed.
    TypeError
        When ``network`` is not a fully connected network.
    ValueError
        When ``dtype`` is another type, or the outputs differ by more than ``tol``; the message has the measured error.
    OSError
        When the file cannot be written; a former file is then intact.

    Examples
    --------
    >>> import pathlib, tempfile, numpy as np, convexbn
    >>> X = np.random.default_rng(0).standard_normal((20, 30))
    >>> model = convexbn.ConvexBNRegressor(activation="relu").fit(X, X[:, 0])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     convexbn.onnx.export(model.network_, pathlib.Path(folder, "model.onnx"))
    """
    try:
        import onnx
        from onnx.reference import ReferenceEvaluator
    except ImportError as error:
        raise ImportError("convexbn.onnx needs the onnx package: pip install 'convexbn[onnx]'.") from error
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}.")
    if network.convolution is not None:
        raise TypeError("convolutional networks are not exported to ONNX here: use convexbn.nn.to_module.")
    network = convertible(network)
    model = _model(network, dtype)
    onnx.checker.check_model(model, full_check=True)
    evaluator: Any = ReferenceEvaluator(model)
    rows = None if X is None else np.asarray(X, dtype=np.float64)
    check_conversion(network, lambda points: evaluator.run(None, {"X": points})[0], dtype, rows, tol)
    write_atomically(path, model.SerializeToString(deterministic=True))


def _model(network: BatchNormNetwork, dtype: str) -> Any:
    """Build the ONNX ModelProto of a network with at least one neuron."""
    from onnx import helper, numpy_helper

    d, K = len(network.mean), network.output.shape[1]
    numbers = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    gated = network.gates is not None
    graph = helper.make_graph(
        [helper.make_node(*node, **attributes) for *node, attributes in _nodes(gated)],
        "BatchNormNetwork",
        [helper.make_tensor_value_info("X", numbers, ["rows", d])],
        [helper.make_tensor_value_info("outputs", numbers, ["rows", K])],
        [numpy_helper.from_array(array, name) for name, array in _arrays(network, dtype).items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION,
        producer_name="convexbn", producer_version=__version__,
    )  # fmt: skip
    activation = "gated" if gated else "relu"
    helper.set_model_props(model, {"activation": activation, "n_effective": repr(network.n_effective)})
    return model


def _nodes(gated: bool) -> list[tuple[Any, ...]]:
    """List operator, inputs, outputs and attributes of every node."""
    from onnx import TensorProto

    statistics = ["scale", "offset", "running_mean", "running_var"]
    relu: list[tuple[Any, ...]] = [("Relu", ["normalised"], ["hidden"], {})]
    gates = [  # in float64: rounding must not open or close a gate
        ("Cast", ["X"], ["wide"], {"to": TensorProto.DOUBLE}),
        ("Sub", ["wide", "mean"], ["centred"], {}),
        ("Gemm", ["centred", "gates", "gate_offsets"], ["openings"], {}),
        ("GreaterOrEqual", ["openings", "wide_zero"], ["opened"], {}),
        ("Where", ["opened", "normalised", "zero"], ["hidden"], {}),
    ]
    return [
        ("Gemm", ["X", "weight", "bias"], ["responses"], {}),
        ("BatchNormalization", ["responses", *statistics], ["normalised"], {"epsilon": _EPS}),
        *(gates if gated else relu),
        ("Gemm", ["hidden", "output", "output_bias"], ["outputs"], {}),
    ]


def _arrays(network: BatchNormNetwork, dtype: str) -> dict[str, np.ndarray]:
    """Return the arrays of the graph by name."""
    layers = Layers.from_network(network, dtype, _EPS)
    names = ("weight", "bias", "scale", "offset", "running_mean", "running_var", "output", "output_bias")
    arrays: dict[str, np.ndarray] = {name: getattr(layers, name).astype(dtype) for name in names}
    if network.gates is not None and network.gate_offsets is not None:
        arrays |= {"mean": network.mean, "gates": network.gates, "gate_offsets": network.gate_offsets}
        arrays |= {"wide_zero": np.zeros(()), "zero": np.zeros((), dtype)}
    return arrays
