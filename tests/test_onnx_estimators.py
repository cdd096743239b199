"""ONNX files of estimators and pipelines against onnxruntime: labels, probabilities and outputs of the model."""

import sys

import numpy as np
import onnxruntime
import pandas as pd
import pytest
from convexbn.onnx import export
from sklearn.datasets import load_diabetes, load_iris, load_wine
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, PolynomialFeatures, RobustScaler, StandardScaler

import convexbn
from convexbn import ConvexBNClassifier, ConvexBNClassifierCV, ConvexBNRegressor, ConvexBNRegressorCV, Convolution

TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
SCALERS = [
    (StandardScaler(),), (StandardScaler(with_mean=False),), (StandardScaler(with_std=False),),
    (MinMaxScaler((-2, 3)),), (MaxAbsScaler(),), (RobustScaler(),), (RobustScaler(with_centering=False),),
    (RobustScaler(with_scaling=False),), ("passthrough",),
    (StandardScaler(), "passthrough", MinMaxScaler(), RobustScaler()),
]  # fmt: skip


def classifier(**changes):
    return ConvexBNClassifier(**{"n_gates": 20, "random_state": 0, **changes})


def run(path, X, dtype):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"X": np.asarray(X, dtype)}), strict=True))


def check_classes(path, model, X, dtype):
    found, tol = run(path, X, dtype), TOLERANCE[dtype]
    outputs = model.decision_function(X).reshape(len(X), -1)
    scale = max(1.0, np.abs(outputs).max())
    assert list(found) == ["outputs", "label", "probabilities"]
    assert found["outputs"].dtype == found["probabilities"].dtype == dtype
    assert np.abs(found["outputs"] - outputs).max() <= 3 * tol * scale
    assert np.abs(found["probabilities"] - model.predict_proba(X)).max() <= 3 * tol * scale
    assert np.array_equal(found["label"], model.predict(X))
    return found


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("n_classes", "settings"),
    [
        (2, {}),
        (3, {"gates": "trained"}),
        (2, {"loss": "cross_entropy"}),
        (3, {"loss": "cross_entropy"}),
        (2, {"loss": "squared_hinge", "weight_decay": 0.02}),
        (3, {"activation": "relu", "max_iter": 1, "time_limit": 5}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_classifiers(n_classes, settings, dtype, tmp_path):
    X, y = load_iris(return_X_y=True)
    X, y = X[y < n_classes], y[y < n_classes]
    model = classifier(**settings).fit(X, y)
    export(model, tmp_path / "m.onnx", dtype=dtype, X=X)
    found = check_classes(tmp_path / "m.onnx", model, X, dtype)
    assert found["label"].dtype == np.int64 and found["label"].shape == (len(X),)
    empty = run(tmp_path / "m.onnx", X[:0], dtype)
    assert empty["label"].shape == (0,) and empty["probabilities"].shape == (0, n_classes)


@pytest.mark.parametrize("names", [["x", "y,z", "ü"], [10, -3, 7], [True, False], [1.0, 2.0, 5.0]], ids=str)
def test_labels_are_strings_or_integers(names, tmp_path):
    X, y = load_iris(return_X_y=True)
    kept = y < len(names)
    X, y = X[kept], np.array(names)[y[kept]]
    model = classifier().fit(X, y)
    export(model, tmp_path / "m.onnx", X=X)
    found = check_classes(tmp_path / "m.onnx", model, X, "float32")
    assert found["label"].dtype == (object if isinstance(names[0], str) else np.int64)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scalers", SCALERS, ids=str)
def test_scalers_become_part_of_the_first_layer(scalers, dtype, tmp_path):
    X, y = load_wine(return_X_y=True)
    model = make_pipeline(*scalers, classifier(gates="trained")).fit(X, y)
    export(model, tmp_path / "m.onnx", dtype=dtype, X=X)
    check_classes(tmp_path / "m.onnx", model, X, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_regressors_and_frames(dtype, tmp_path):
    X, y = load_diabetes(return_X_y=True, as_frame=True)
    for target in (y - y.mean(), pd.DataFrame({"a": y - y.mean(), "b": np.sqrt(y)})):
        model = make_pipeline(StandardScaler(), ConvexBNRegressor(n_gates=20, random_state=0)).fit(X, target)
        export(model, tmp_path / "m.onnx", dtype=dtype, X=X)
        found = run(tmp_path / "m.onnx", X, dtype)
        expected = model.predict(X).reshape(len(X), -1)
        assert list(found) == ["outputs"] and found["outputs"].shape == expected.shape
        assert np.abs(found["outputs"] - expected).max() <= 3 * TOLERANCE[dtype] * np.abs(expected).max()


def test_the_best_of_a_search_and_nested_pipelines(tmp_path):
    X, y = load_iris(return_X_y=True)
    chosen = ConvexBNClassifierCV(weight_decays=[1.0, 0.1], n_gates=10, cv=2, random_state=0)
    grid = GridSearchCV(classifier(), {"n_gates": [5, 10]}, cv=2)
    inner = Pipeline([("scale", MaxAbsScaler()), ("model", classifier())])
    for model in (chosen, grid, make_pipeline(StandardScaler(), chosen), make_pipeline(StandardScaler(), inner)):
        model.fit(X, y)
        export(model, tmp_path / "m.onnx", X=X)
        check_classes(tmp_path / "m.onnx", model, X, "float32")
    model = ConvexBNRegressorCV(weight_decays=[1.0], n_gates=10, cv=2, random_state=0).fit(X, X[:, 0] ** 2)
    export(model, tmp_path / "m.onnx", X=X)
    assert np.allclose(run(tmp_path / "m.onnx", X, "float32")["outputs"][:, 0], model.predict(X), rtol=1e-4)


def test_a_network_has_outputs_alone(tmp_path):
    X, y = load_iris(return_X_y=True)
    network = classifier().fit(X, y).network_
    export(network, tmp_path / "m.onnx", X=X)
    assert list(run(tmp_path / "m.onnx", X, "float32")) == ["outputs"]


def test_the_evaluator_of_onnx_checks_where_there_is_no_runtime(tmp_path, monkeypatch):
    X, y = load_iris(return_X_y=True)
    model = classifier().fit(X, np.array(["a", "b", "c"])[y])
    export(model, tmp_path / "m.onnx", X=X)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    export(model, tmp_path / "n.onnx", X=X)
    assert (tmp_path / "m.onnx").read_bytes() == (tmp_path / "n.onnx").read_bytes()


def test_rows_are_compared_as_they_are_and_not_rounded_first(tmp_path):
    """A gate between two rows that float32 does not tell apart: outputs of the rounded rows are others."""
    X = np.random.default_rng(0).standard_normal((40, 2))
    model = ConvexBNRegressor(n_gates=10, random_state=0, weight_decay=0.01).fit(X, np.sign(X[:, 0]))
    network = model.network_
    direction, offset = network.gates[:, 0], network.gate_offsets[0]
    row = X[:1] - direction * ((X[0] - network.mean) @ direction + offset - 1e-12) / (direction @ direction)
    path = tmp_path / "m.onnx"
    for near in (row, row - 2e-12 * direction / (direction @ direction)):
        if np.abs(network.predict(near) - network.predict(near.astype(np.float32))).max() > 1e-3:
            with pytest.raises(ValueError, match="the outputs on the rows of X differ by"):
                export(model, path, X=near)
            break
    else:
        raise AssertionError("rounding crosses no gate")
    assert not path.exists()


def test_what_is_not_exported(tmp_path):
    X, y = load_iris(return_X_y=True)
    layer = Convolution(2, input_shape=(4, 1))
    for model, error, words in [
        (classifier(), NotFittedError, "not fitted"),
        (StandardScaler().fit(X), TypeError, "got StandardScaler"),
        (
            make_pipeline(PolynomialFeatures(), classifier()).fit(X, y),
            TypeError,
            "PolynomialFeatures cannot become part",
        ),
        (make_pipeline(MinMaxScaler(clip=True), classifier()).fit(X, y), TypeError, "MinMaxScaler without clip"),
        (classifier(convolution=layer).fit(X, y), TypeError, "convolutional networks are not exported"),
    ]:
        with pytest.raises(error, match=words):
            export(model, tmp_path / "m.onnx", X=X)
    assert convexbn.onnx.export is export and not (tmp_path / "m.onnx").exists()
