"""What a saved model means: estimators to arrays and a header, and back after an audit of every field.

The certificate in a file is what was claimed when it was written; ``certify`` recomputes it from data.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from typing import Any

import numpy as np

from convexbn import container
from convexbn.certificate import STOPPED_BY, Certificate, Status
from convexbn.container import JSON, FormatError
from convexbn.network import BatchNormNetwork
from convexbn.solvers.solution import Progress

_NETWORK = ("weight", "gamma", "shift", "output", "mean")
_GATED = ("gates", "gate_offsets", "gate_index")
_CLASS_TYPES = re.compile(r"[<>|=]?[biufUO]\d*")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_UNSAVED = ("callback", "gates")


def save(model: Any, path: str | os.PathLike[str]) -> None:
    """Write a fitted estimator to a safetensors file, atomically.

    Parameters
    ----------
    model : ConvexBNClassifier or ConvexBNRegressor
        A fitted estimator. A ``callback`` is not saved, nor a ``random_state`` that is not an integer.
    path : path-like
        File to write; an existing one is replaced in one step.
    """
    from sklearn.utils.validation import check_is_fitted

    check_is_fitted(model)
    network = model.network_
    arrays = {name: getattr(network, name) for name in _NETWORK}
    if model.gates_ is not None:
        arrays |= {
            "gates": model.gates_,
            "gate_offsets": model.gate_offsets_,
            "gate_index": network.gate_index.astype(np.int64),
        }
    if not isinstance(model.gates, str):
        arrays["given_gates"] = np.asarray(model.gates, dtype=np.float64)
    arrays["history"] = np.array(model.history_, dtype=np.float64).reshape(-1, 4)
    container.write(path, arrays, _header(model))


def load(path: str | os.PathLike[str]) -> Any:
    """Read an estimator that ``save`` wrote; nothing in the file is executed.

    Parameters
    ----------
    path : path-like
        A file written by ``save``.

    Returns
    -------
    ConvexBNClassifier or ConvexBNRegressor
        Fitted; predictions equal those of the saved one bit for bit.

    Raises
    ------
    FormatError
        When the file is damaged, foreign, or its fields do not belong together.
    """
    arrays, header = container.read(path)
    try:
        return _restore(arrays, header)
    except FormatError as error:
        raise FormatError(f"{os.fspath(path)!r} {error}; use a file that save wrote, unchanged.") from None


def _header(model: Any) -> dict[str, JSON]:
    from convexbn import __version__

    certificate = asdict(model.certificate_) | {"status": model.certificate_.status.value}
    return {
        "version": __version__,
        "estimator": type(model).__name__,
        "parameters": _parameters(model),
        "n_effective": float(model.network_.n_effective),
        "weight_decay": float(model.weight_decay_),
        "rank": int(model.rank_),
        "n_iter": int(model.n_iter_),
        "fingerprint": model.fingerprint_,
        "feature_names": list(model.feature_names_in_) if hasattr(model, "feature_names_in_") else None,
        "classes": _classes_to_json(model),
        "single_output": getattr(model, "_single_output", None),
        "certificate": {name: _finite_or_none(value) for name, value in certificate.items()},
        "source": getattr(model, "source_", None),
    }


def _parameters(model: Any) -> dict[str, JSON]:
    parameters = {k: v for k, v in model.get_params().items() if k not in _UNSAVED}
    if isinstance(model.gates, str):
        parameters["gates"] = model.gates
    if not isinstance(parameters["random_state"], (int, np.integer)):
        parameters["random_state"] = None
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in parameters.items()}


def _classes_to_json(model: Any) -> JSON:
    if not hasattr(model, "classes_"):
        return None
    return {"dtype": model.classes_.dtype.str, "labels": model.classes_.tolist()}


def _finite_or_none(value: Any) -> JSON:
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _restore(arrays: dict[str, np.ndarray], header: dict[str, JSON]) -> Any:
    model = _estimator(header, arrays)
    network = _network(arrays, header)
    classes = _classes(header)
    _require((header["estimator"] == "ConvexBNClassifier") == (classes is not None), "classes")
    K = 1 if classes is not None and len(classes) == 2 else None if classes is None else len(classes)
    _require(K in (None, network.output.shape[1]), "classes")
    certificate = _certificate(header, network)
    _require(arrays["history"].ndim == 2 and arrays["history"].shape[1] == 4, "history")
    history = [Progress(int(i), o, b, int(w)) for i, o, b, w in arrays["history"].tolist()]
    names = header["feature_names"]
    if names is not None:
        _require(isinstance(names, list) and all(isinstance(name, str) for name in names), "feature_names")
        _require(isinstance(names, list) and len(names) == len(network.mean), "feature_names")
        model.feature_names_in_ = np.array(names, dtype=object)
    if classes is not None:
        model.classes_ = classes
    else:
        _require(isinstance(header["single_output"], bool), "single_output")
        _require(not header["single_output"] or network.output.shape[1] == 1, "single_output")
        model._single_output = header["single_output"]
    if header["source"] is not None:
        _require(isinstance(header["source"], dict), "source")
        model.source_ = header["source"]
    model.__dict__.update(
        network_=network,
        gates_=arrays.get("gates"),
        gate_offsets_=arrays.get("gate_offsets"),
        certificate_=certificate,
        history_=history,
        n_features_in_=len(network.mean),
        n_iter_=_integer(header, "n_iter"),
        rank_=_integer(header, "rank"),
        weight_decay_=_positive(header, "weight_decay"),
        fingerprint_=header["fingerprint"],
    )
    return model


def _estimator(header: dict[str, JSON], arrays: dict[str, np.ndarray]) -> Any:
    """Unfitted estimator with the saved parameters, each checked by the estimator's own constraints."""
    from sklearn.utils._param_validation import InvalidParameterError

    from convexbn.estimators import ConvexBNClassifier, ConvexBNRegressor

    wanted = {"version", "estimator", "parameters", "n_effective", "weight_decay", "rank", "n_iter"}
    wanted |= {"fingerprint", "feature_names", "classes", "single_output", "certificate", "source"}
    _require(set(header) == wanted, "header")
    kinds: dict[JSON, Any] = {
        "ConvexBNClassifier": ConvexBNClassifier,
        "ConvexBNRegressor": ConvexBNRegressor,
    }
    _require(isinstance(header["estimator"], str) and header["estimator"] in kinds, "estimator")
    kind = kinds[header["estimator"]]
    parameters = header["parameters"]
    _require(isinstance(parameters, dict), "parameters")
    assert isinstance(parameters, dict)
    given = dict(parameters) | ({"gates": arrays["given_gates"]} if "given_gates" in arrays else {})
    _require(set(given) == set(kind().get_params()) - {"callback"}, "parameters")
    model = kind(**given)
    try:
        model._validate_params()
    except InvalidParameterError:
        _require(False, "parameters")
    fingerprint = header["fingerprint"]
    _require(isinstance(fingerprint, str) and bool(_FINGERPRINT.fullmatch(fingerprint)), "fingerprint")
    gated = model.activation == "gated"
    names = {*_NETWORK, "history", *(_GATED if gated else ()), *({"given_gates"} & set(arrays))}
    _require(set(arrays) == names, "list of tensors")
    return model


def _network(arrays: dict[str, np.ndarray], header: dict[str, JSON]) -> BatchNormNetwork:
    """Network whose shapes agree and whose neurons sit on gates that exist."""
    d, m = _shape(arrays, "weight", 2)
    K = _shape(arrays, "output", 2)[1]
    shapes = {"weight": (d, m), "gamma": (m,), "shift": (m,), "output": (m, K), "mean": (d,)}
    gated = "gates" in arrays
    if gated:
        P = _shape(arrays, "gates", 2)[1]
        shapes |= {"gates": (d, P), "gate_offsets": (P,), "gate_index": (m,)}
        index = arrays["gate_index"]
        _require(index.dtype == np.int64 and np.all((index >= 0) & (index < P)), "gate_index")
    for name, shape in shapes.items():
        _require(arrays[name].shape == shape, name)
        _require(name == "gate_index" or arrays[name].dtype == np.float64, name)
    _require(K > 0 and d > 0, "output")
    parts: dict[str, Any] = {name: arrays[name] for name in _NETWORK}
    if gated:
        index = index.astype(np.intp)
        parts |= {"gates": arrays["gates"][:, index], "gate_offsets": arrays["gate_offsets"][index]}
        parts["gate_index"] = index
    return BatchNormNetwork(n_effective=_positive(header, "n_effective"), **parts)


def _certificate(header: dict[str, JSON], network: BatchNormNetwork) -> Certificate:
    """The certificate as claimed, refused where it contradicts itself or the weights."""
    block = header["certificate"]
    names = set(Certificate.__dataclass_fields__)
    _require(isinstance(block, dict) and set(block) == names, "certificate")
    assert isinstance(block, dict)
    statuses = {status.value for status in Status}
    _require(block["status"] in statuses and block["stopped_by"] in STOPPED_BY, "certificate")
    _require(isinstance(block["sentence"], str) and isinstance(block["scope"], str), "certificate")
    missing = {"objective": np.nan, "lower_bound": -np.inf, "weight_decay_objective": np.nan}
    numbers = {name: missing[name] if block[name] is None else block[name] for name in missing}
    numbers["tolerance"] = block["tolerance"]
    _require(all(isinstance(v, (int, float)) for v in numbers.values()), "certificate")
    fields: dict[str, Any] = {**block, **numbers, "status": Status(str(block["status"]))}
    certificate = Certificate(**fields)
    if certificate.status in (Status.CERTIFIED, Status.TRIVIAL):
        _require(0 <= certificate.relative_gap <= certificate.tolerance, "certificate")
    penalty = 0.5 * sum(float(np.sum(a**2)) for a in (network.gamma, network.shift, network.output))
    floor = _positive(header, "weight_decay") * penalty
    _require(not floor > certificate.weight_decay_objective * (1 + 1e-9), "certificate")
    return certificate


def _classes(header: dict[str, JSON]) -> np.ndarray | None:
    block = header["classes"]
    if block is None:
        return None
    _require(isinstance(block, dict) and set(block) == {"dtype", "labels"}, "classes")
    assert isinstance(block, dict)
    dtype, labels = block["dtype"], block["labels"]
    _require(isinstance(dtype, str) and bool(_CLASS_TYPES.fullmatch(dtype)), "classes")
    _require(isinstance(labels, list) and len(labels) >= 2, "classes")
    assert isinstance(labels, list)
    _require(all(isinstance(label, (str, int, float)) for label in labels), "classes")
    try:
        classes = np.array(labels, dtype=np.dtype(str(dtype)))
    except (TypeError, ValueError, OverflowError):
        raise FormatError("has a field 'classes' that does not fit the rest") from None
    _require(len(set(labels)) == len(labels), "classes")
    return classes


def _shape(arrays: dict[str, np.ndarray], name: str, ndim: int) -> tuple[int, ...]:
    _require(arrays[name].ndim == ndim, name)
    return arrays[name].shape


def _integer(header: dict[str, JSON], name: str) -> int:
    value = header[name]
    _require(isinstance(value, int) and not isinstance(value, bool) and value >= 0, name)
    return int(value)  # type: ignore[arg-type]


def _positive(header: dict[str, JSON], name: str) -> float:
    value = header[name]
    _require(isinstance(value, float) and 0 < value < np.inf, name)
    return float(value)  # type: ignore[arg-type]


def _require(condition: Any, field: str) -> None:
    if not condition:
        raise FormatError(f"has a field '{field}' that does not fit the rest")


__all__ = ["FormatError", "load", "save"]
