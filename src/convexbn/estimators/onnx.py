"""ONNX files of networks, estimators, and pipelines of scalers before an estimator."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.base import is_classifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler
from sklearn.utils.validation import check_is_fitted

from convexbn._types import Float, FloatMatrix
from convexbn.estimators import KINDS
from convexbn.files import onnx as files
from convexbn.program.network import BatchNormNetwork


def export(
    model: Any,
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    X: Any = None,
    tol: float | None = None,
) -> None:
    """Write a network, an estimator or a pipeline as an ONNX file, in one step: input ``X`` (rows, d).

    Networks and regressors have the output ``outputs`` (rows, K). Classifiers have two more: ``label`` (rows,),
    integers or strings as ``predict`` gives them, and ``probabilities`` (rows, n_classes) as ``predict_proba``. Before
    the file is written it is run, by onnxruntime if that is installed, and compared with the model in float64.

    Gates are computed in float64, whatever the type of the file. Scalers become part of the first layer.

    Parameters
    ----------
    model : BatchNormNetwork, ConvexBNClassifier, ConvexBNRegressor, or one that holds one
        Fitted. Of ``ConvexBNClassifierCV``, ``ConvexBNRegressorCV`` and ``GridSearchCV`` the best estimator; a
        ``Pipeline`` may scale the columns before: ``StandardScaler``, ``MinMaxScaler`` (without ``clip``),
        ``MaxAbsScaler``, ``RobustScaler``, ``"passthrough"``.
    path : str or os.PathLike
    dtype : {"float32", "float64"}
        Type of the weights, the input and the outputs.
    X : array-like (n, d), optional
        Rows to compare on, besides random ones; the training rows are best.
    tol : float, optional
        Largest difference, relative to the largest output; by default 1e-12 in float64, 1e-5 in float32.

    Raises
    ------
    ImportError
        When onnx is not installed.
    TypeError
        When the model is another one, or has a convolution.
    ValueError
        When ``dtype`` is another type, or the outputs differ by more than ``tol``; the message has the measured error.
    OSError
        When the file cannot be written; a former file is then intact.

    Examples
    --------
    >>> import pathlib, tempfile, convexbn
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> X, y = load_iris(return_X_y=True)
    >>> model = make_pipeline(StandardScaler(), convexbn.ConvexBNClassifier(random_state=0)).fit(X, y)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     convexbn.onnx.export(model, pathlib.Path(folder, "iris.onnx"), X=X)
    """
    if isinstance(model, BatchNormNetwork):
        files.write(model, path, dtype=dtype, X=X, tol=tol)
        return
    steps, estimator = _parts(model)
    network = estimator.network_
    for step in reversed(steps):
        network = _before(step, network)
    classes = _classes(estimator) if is_classifier(estimator) else None
    expected = _expected(steps, estimator)
    files.write(network, path, dtype=dtype, X=X, tol=tol, classes=classes, expected=expected)


def _parts(model: Any) -> tuple[list[Any], Any]:
    """Steps before the estimator of a model, and the estimator, which is fitted."""
    check_is_fitted(model)
    if hasattr(model, "best_estimator_"):
        return _parts(model.best_estimator_)
    if isinstance(model, Pipeline):
        steps, estimator = _parts(model[-1])
        return [step for _, step in model.steps[:-1] if step not in (None, "passthrough")] + steps, estimator
    if not isinstance(model, KINDS):
        raise TypeError(f"model must be a network, an estimator of convexbn or a pipeline; got {type(model).__name__}.")
    return [], model


def _before(step: Any, network: BatchNormNetwork) -> BatchNormNetwork:
    """Network on the columns that a fitted scaler takes, of the same outputs as that on those that it gives."""
    if network.convolution is not None:
        raise TypeError("convolutional networks are not exported to ONNX here: use convexbn.nn.to_module.")
    d = len(network.mean)
    if isinstance(step, MinMaxScaler) and not step.clip:
        factor, shift = step.scale_, step.min_
    elif isinstance(step, (StandardScaler, RobustScaler, MaxAbsScaler)) and not getattr(step, "clip", False):
        centre = getattr(step, "mean_" if isinstance(step, StandardScaler) else "center_", None)
        factor = np.ones(d) if step.scale_ is None else 1 / step.scale_
        shift = np.zeros(d) if centre is None or not getattr(step, "with_mean", True) else -centre * factor
    else:
        raise TypeError(
            f"{type(step).__name__} cannot become part of the first layer: export the estimator after it, or scale by "
            "StandardScaler, MinMaxScaler without clip, MaxAbsScaler or RobustScaler."
        )
    gates = None if network.gates is None else factor[:, None] * network.gates
    return replace(network, weight=factor[:, None] * network.weight, mean=(network.mean - shift) / factor, gates=gates)


def _classes(estimator: Any) -> files.Classes:
    """Labels of a classifier as the types of ONNX hold them."""
    labels = estimator.classes_.tolist()
    scale = 1 / estimator._temperature
    if all(isinstance(label, str) for label in labels):
        return files.Classes(np.array(labels, dtype=object), scale)
    return files.Classes(np.array([int(label) for label in labels], dtype=np.int64), scale)


def _expected(steps: list[Any], estimator: Any) -> Callable[[FloatMatrix], Float]:
    """Function from rows to outputs, and of classifiers to probabilities beside them, as the steps compute them."""

    def outputs(rows: FloatMatrix) -> Float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # rows without names of features
            for step in steps:
                rows = step.transform(rows)
            if not is_classifier(estimator):
                return np.asarray(estimator.predict(rows)).reshape(len(rows), -1)
            found = estimator.decision_function(rows).reshape(len(rows), -1)
            return np.hstack([found, estimator.predict_proba(rows)])

    return outputs
