"""ONNX files of networks and their classes, written without torch: Gemm, BatchNormalization, Relu, Gemm."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from convexbn._types import Float, FloatMatrix
from convexbn._version import __version__
from convexbn.files.atomic import write_atomically
from convexbn.program.layers import Layers, convertible
from convexbn.program.network import BatchNormNetwork
from convexbn.program.output_check import check_conversion

#: Batch norm adds this to the variance; a float32, as ONNX stores it.
_EPS = float(np.float32(1e-5))
#: Old enough for the runtimes in use; later versions do not change the operators.
_OPSET, _IR_VERSION = 17, 8


@dataclass(frozen=True, eq=False)
class Classes:
    """What a classifier makes of its outputs.

    Attributes
    ----------
    labels : ndarray (n_classes,) of int64 or object
        Integers or strings; a network with one output has two.
    logit_scale : float
        Factor of the outputs in the softmax; of one output its logit against 0.
    """

    labels: np.ndarray
    logit_scale: float


def write(
    network: BatchNormNetwork, path: str | os.PathLike[str], *, dtype: str, X: FloatMatrix | None, tol: float | None,
    classes: Classes | None = None, expected: Callable[[Float], Float] | None = None,
) -> None:  # fmt: skip
    """Check a file of a network, run by onnxruntime if it is installed, and write it in one step.

    Parameters
    ----------
    network, path, dtype, X, tol
        As in ``convexbn.onnx.export``. A gated network has five nodes in place of Relu, and gates in float64.
    classes : Classes, optional
        Adds the outputs ``label`` (rows,) and ``probabilities`` (rows, n_classes).
    expected : callable, optional
        Gives the outputs, and beside them the probabilities, that rows (n, d) should have; by default the network's.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("convexbn.onnx needs the onnx package: pip install 'convexbn[onnx]'.") from error
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}.")
    if network.convolution is not None:
        raise TypeError("convolutional networks are not exported to ONNX here: use convexbn.nn.to_module.")
    network = convertible(network)
    model = _model(network, dtype, classes)
    onnx.checker.check_model(model, full_check=True)
    run = _runner(model)

    def converted(rows: FloatMatrix) -> FloatMatrix:
        outputs, *others = run(rows)
        if classes is None:
            return outputs
        label, probabilities = others
        places = outputs[:, 0] > 0 if outputs.shape[1] == 1 else outputs.argmax(axis=1)
        if not np.array_equal(label, classes.labels[places.astype(np.intp)]):
            raise ValueError("the file would give labels that are not those of its largest outputs.")
        return np.hstack([outputs, probabilities])

    rows = None if X is None else np.asarray(X, dtype=np.float64)
    check_conversion(network, converted, dtype, rows, tol, expected=expected)
    write_atomically(path, model.SerializeToString(deterministic=True))


def _runner(model: Any) -> Callable[[FloatMatrix], list[Any]]:
    """Function from rows to all outputs of a model: by onnxruntime, or without it by the evaluator of onnx."""
    try:
        from onnxruntime import InferenceSession
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        evaluator: Any = ReferenceEvaluator(model)
    else:
        evaluator = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda rows: evaluator.run(None, {"X": rows})


def _model(network: BatchNormNetwork, dtype: str, classes: Classes | None) -> Any:
    """Build the ONNX ModelProto of a network with at least one neuron."""
    from onnx import TensorProto, helper, numpy_helper

    d, K = len(network.mean), network.output.shape[1]
    numbers = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    gated = network.gates is not None
    nodes, arrays = _nodes(gated), _arrays(network, dtype)
    outputs = [helper.make_tensor_value_info("outputs", numbers, ["rows", K])]
    if classes is not None:
        nodes += _class_nodes(K)
        arrays |= _class_arrays(classes, K, dtype)
        kind = TensorProto.INT64 if classes.labels.dtype == np.int64 else TensorProto.STRING
        outputs += [
            helper.make_tensor_value_info("label", kind, ["rows"]),
            helper.make_tensor_value_info("probabilities", numbers, ["rows", len(classes.labels)]),
        ]
    graph = helper.make_graph(
        [helper.make_node(*node, **attributes) for *node, attributes in nodes],
        "BatchNormNetwork",
        [helper.make_tensor_value_info("X", numbers, ["rows", d])],
        outputs,
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
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


def _class_nodes(n_outputs: int) -> list[tuple[Any, ...]]:
    """List the nodes from outputs to labels and probabilities."""
    from onnx import TensorProto

    if n_outputs == 1:
        places: list[tuple[Any, ...]] = [
            ("Greater", ["outputs", "logit_zero"], ["positive"], {}),
            ("Cast", ["positive"], ["column"], {"to": TensorProto.INT64}),
            ("Squeeze", ["column", "second_axis"], ["place"], {}),
        ]
    else:
        places = [("ArgMax", ["outputs"], ["place"], {"axis": 1, "keepdims": 0})]
    return [
        *places,
        ("Gather", ["labels", "place"], ["label"], {}),
        ("Mul", ["outputs", "logit_scales"], ["logits"], {}),  # of one output (0, scale): two columns
        ("Softmax", ["logits"], ["probabilities"], {"axis": 1}),
    ]


def _class_arrays(classes: Classes, n_outputs: int, dtype: str) -> dict[str, np.ndarray]:
    """Return the arrays of these nodes by name."""
    scales = [0.0, classes.logit_scale] if n_outputs == 1 else [classes.logit_scale]
    arrays = {"labels": classes.labels, "logit_scales": np.array([scales], dtype)}
    return arrays | ({"logit_zero": np.zeros((), dtype), "second_axis": np.array([1])} if n_outputs == 1 else {})
