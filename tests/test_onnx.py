"""ONNX files against onnxruntime: the outputs of the network, four plain nodes, whole files or none."""

import contextlib

import numpy as np
import onnx
import onnxruntime
import pytest
from convexbn.onnx import export
from sklearn.linear_model import LinearRegression

import convexbn
from convexbn.data.whitening import whiten
from convexbn.program.gated import GateBlocks
from convexbn.program.gates import sample_gates
from convexbn.program.network import BatchNormNetwork
from convexbn.program.neurons import Neurons
from instances import conditioned, neuron_arrays

TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


def draw(kind, seed=0, n=60, d=6, K=3, condition=10.0, offset=1.0):
    """Raw rows, exact in float32, and a random network on them."""
    rng = np.random.default_rng(seed)
    X = (conditioned(n, d, condition, rng) * np.sqrt(n) + offset).astype(np.float32).astype(np.float64)
    whitening = whiten(X)
    if kind == "relu":
        first, output = rng.standard_normal((whitening.rank + 1, 7)), rng.standard_normal((7, K))
        return X, BatchNormNetwork.from_neurons(whitening, Neurons(first, output))
    gates, offsets = sample_gates("whitened", 9, whitening, np.random.RandomState(seed))
    blocks = rng.standard_normal((9, whitening.rank + 1, K))
    return X, BatchNormNetwork.from_blocks(whitening, GateBlocks(np.arange(9), blocks), gates, offsets)


def run(path, X, dtype="float32"):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"X": X.astype(dtype)})[0]
    assert outputs.dtype == dtype
    return outputs.astype(np.float64)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["relu", "gated"])
@pytest.mark.parametrize("seed", range(5))
def test_onnxruntime_gives_the_outputs_of_the_network(tmp_path, kind, dtype, seed):
    X, network = draw(kind, seed)
    export(network, tmp_path / "m.onnx", dtype=dtype, X=X)
    new = np.random.default_rng(seed).standard_normal((3000, 6)).astype(np.float32).astype(np.float64)
    for rows in (X, X[:1], new):
        expected = network.predict(rows)
        error = np.abs(run(tmp_path / "m.onnx", rows, dtype) - expected).max() / np.abs(network.predict(X)).max()
        assert error < TOLERANCE[dtype] * max(1, np.abs(expected).max() / np.abs(network.predict(X)).max())
    assert run(tmp_path / "m.onnx", X[:0], dtype).shape == (0, 3)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("condition", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0])
def test_ill_conditioned_data_are_exported_or_refused(tmp_path, dtype, condition, offset):
    X, network = draw("relu", condition=condition, offset=offset)
    path = tmp_path / "m.onnx"
    with contextlib.suppress(ValueError):
        export(network, path, dtype=dtype, X=X)
    if path.exists():
        error = np.abs(run(path, X, dtype) - network.predict(X)).max() / np.abs(network.predict(X)).max()
        assert error < 3 * TOLERANCE[dtype]  # onnxruntime sums in another order than the evaluator that measured
    else:
        assert condition * (1 + offset) >= 100 and not list(tmp_path.iterdir())


def test_the_file_is_plain_and_says_what_it_is(tmp_path):
    _, network = draw("relu")
    export(network, tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Gemm", "BatchNormalization", "Relu", "Gemm"]
    assert {tensor.data_type for tensor in model.graph.initializer} == {onnx.TensorProto.FLOAT}
    assert (model.producer_name, model.producer_version) == ("convexbn", convexbn.__version__)
    assert {p.key: p.value for p in model.metadata_props} == {"activation": "relu", "n_effective": "60.0"}
    export(network, tmp_path / "wide.onnx", dtype="float64")
    model = onnx.load(tmp_path / "wide.onnx")
    scale = next(onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "scale")
    eps = model.graph.node[1].attribute[0].f  # in float32, whatever the type of the tensors
    assert np.allclose(scale / np.sqrt(1 + eps), network.gamma / np.sqrt(60), rtol=1e-14, atol=0)
    first = (tmp_path / "m.onnx").read_bytes()
    export(network, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == first
    export(draw("gated")[1], tmp_path / "g.onnx")
    assert len(onnx.load(tmp_path / "g.onnx").graph.node) == 8


@pytest.mark.parametrize("kind", ["relu", "gated"])
def test_a_network_without_neurons(tmp_path, kind):
    X, network = draw(kind)
    neurons = {name: array[..., :0] for name, array in neuron_arrays(network).items() if name != "output"}
    empty = BatchNormNetwork(**neurons, output=network.output[:0], mean=network.mean, n_effective=60.0)
    export(empty, tmp_path / "m.onnx")
    assert run(tmp_path / "m.onnx", X).shape == (60, 3) and not run(tmp_path / "m.onnx", X).any()


def test_a_fitted_estimator(tmp_path):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((40, 5))
    model = convexbn.ConvexBNClassifier(n_gates=20, random_state=0).fit(X, X[:, 0] * X[:, 1] > 0)
    export(model.network_, tmp_path / "m.onnx", dtype="float64", X=X)
    assert np.allclose(run(tmp_path / "m.onnx", X, "float64")[:, 0], model.decision_function(X), rtol=0, atol=1e-12)


def test_what_cannot_be_exported_leaves_the_former_file(tmp_path):
    X, network = draw("relu")
    path = tmp_path / "m.onnx"
    path.write_text("former")
    for given, settings, error, words in [
        (network, {"dtype": "float16"}, ValueError, "dtype must be 'float32' or 'float64', got 'float16'"),
        (network, {"tol": 0.0}, ValueError, "in float32 the outputs on probe rows differ by"),
        (network, {"X": X[:, :2]}, ValueError, r"X must have shape \(n, 6\), got \(60, 2\)"),
        (
            LinearRegression().fit(X, X),
            {},
            TypeError,
            "must be a network, an estimator of convexbn or",
        ),
    ]:
        with pytest.raises(error, match=words):
            export(given, path, **settings)
    assert path.read_text() == "former" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError, match="missing"):
        export(network, tmp_path / "missing" / "m.onnx")
