"""The header of a saved model: its fields and their rules, written from an estimator and read back in parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from convexbn._version import __version__
from convexbn.certificate.certificate import Certificate
from convexbn.certificate.status import STOPPED_BY, Status
from convexbn.data.convolution import Convolution
from convexbn.files import schema
from convexbn.files.model_file import JSON, FormatError
from convexbn.files.schema import NOT_FINITE, none_or, require

#: Scope of the certificate, by activation.
SCOPES = {"gated": "these gates", "relu": "all patterns"}

#: Rules of the certificate's fields, by their declared type; some have a narrower one.
_OF_TYPE: dict[Any, schema.Rule] = {
    "float": schema.real,
    "float | None": none_or(schema.real),
    "str": schema.text,
    "Status": schema.one_of(*(status.value for status in Status)),
}
_NARROWER: dict[str, schema.Rule] = {
    "tolerance": schema.not_negative,
    "scope": schema.one_of(*SCOPES.values()),
    "stopped_by": schema.one_of(*STOPPED_BY),
    "estimated_gap": none_or(schema.not_negative),
}
_CERTIFICATE = schema.record(**{field.name: _OF_TYPE[field.type] for field in fields(Certificate)} | _NARROWER)

#: What the command line writes down to find the training rows again.
_SOURCE = schema.record(
    data=schema.text,
    target=none_or(schema.text),
    feature_names=none_or(schema.names),
    test_size=schema.share,
    seed=schema.count,
    task=schema.one_of("classification", "regression"),
)

_CLASSES = schema.record(
    dtype=schema.matching(r"[<>|=]?[biufUO]\d*"),
    labels=schema.list_of(str, int, float, bool, least=2),
)

_SIZES = schema.either(schema.count, schema.list_of(int, least=1))
_CONVOLUTION = schema.record(
    kernel_size=_SIZES,
    stride=_SIZES,
    padding=_SIZES,
    pooling=schema.one_of("average", "max"),
    regions=schema.either(_SIZES, schema.one_of("all")),
    input_shape=schema.none_or(schema.list_of(int, least=2)),
    channels=schema.one_of("last", "first"),
)

_FIELDS: dict[str, schema.Rule] = {
    "version": schema.text,
    "estimator": schema.one_of("ConvexBNClassifier", "ConvexBNRegressor"),
    "parameters": schema.mapping,
    "n_effective": schema.positive,
    "weight_decay": schema.positive,
    "rank": schema.count,
    "n_iter": schema.count,
    "fingerprint": schema.matching(r"[0-9a-f]{64}"),
    "feature_names": none_or(schema.names),
    "classes": none_or(_CLASSES),
    "single_output": none_or(schema.flag),
    "certificate": _CERTIFICATE,
    "source": none_or(_SOURCE),
}

_MAX_CLASS_BYTES = 1 << 28


def of_model(model: Any) -> dict[str, JSON]:
    """The header of a fitted estimator, in plain Python values."""
    header = {
        "version": __version__,
        "estimator": type(model).__name__,
        "parameters": parameters(model),
        "n_effective": float(model.network_.n_effective),
        "weight_decay": float(model.weight_decay_),
        "rank": int(model.rank_),
        "n_iter": int(model.n_iter_),
        "fingerprint": model.fingerprint_,
        "feature_names": list(model.feature_names_in_) if hasattr(model, "feature_names_in_") else None,
        "classes": _classes_to_json(model.classes_) if hasattr(model, "classes_") else None,
        "single_output": getattr(model, "_single_output", None),
        "certificate": _certificate_to_json(model.certificate_),
        "source": getattr(model, "source_", None),
    }
    return _plain(header)


def check(header: Mapping[str, JSON]) -> None:
    """Refuse a header with a field too few or too many, or one that breaks its own rule."""
    require(schema.same_names(header, _FIELDS), "header")
    for name, rule in _FIELDS.items():
        require(rule(header[name]), name)


def classes(block: Mapping[str, Any] | None) -> np.ndarray | None:
    """Class labels, sorted and each exactly what its type can hold."""
    if block is None:
        return None
    labels = _typed(**block)
    # compared as text: 1, 1.0 and True are three labels
    require(labels is not None and repr(labels.tolist()) == repr(block["labels"]), "classes")
    return labels


def certificate(block: Mapping[str, Any]) -> Certificate:
    """The certificate as it was claimed."""
    values: dict[str, Any] = {**block, "status": Status(block["status"])}
    for field in fields(Certificate):
        if "float" in str(field.type) and values[field.name] in NOT_FINITE:
            values[field.name] = float(values[field.name])
    return Certificate(**values)


def parameters(model: Any) -> dict[str, Any]:
    """Parameters that JSON can hold; given gates are a tensor."""
    kept = {name: value for name, value in model.get_params().items() if name != "callback"}
    if kept["convolution"] is not None:  # with the shape of its inputs, where it was fitted
        layer = getattr(model, "network_", model).convolution
        kept["convolution"] = {name: _listed(value) for name, value in asdict(layer).items()}
    if not isinstance(model.gates, str):
        del kept["gates"]
    if not isinstance(model.random_state, (int, np.integer)):
        kept["random_state"] = None
    return _plain(kept)


def convolution(block: Any) -> Convolution | None:
    """The convolutional layer of a saved estimator."""
    if block is None:
        return None
    require(_CONVOLUTION(block), "convolution")
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in block.items()}
    try:
        return Convolution(**values)
    except ValueError:
        raise FormatError("the field 'convolution' does not fit the rest") from None


def _listed(value: Any) -> Any:
    return [int(item) for item in value] if isinstance(value, tuple) else value


def _certificate_to_json(proof: Certificate) -> dict[str, Any]:
    """Fields of a certificate; numbers that JSON cannot hold by name."""
    values = _plain(asdict(proof))
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _classes_to_json(labels: np.ndarray) -> dict[str, Any]:
    return {"dtype": labels.dtype.str, "labels": labels.tolist()}


def _typed(dtype: str, labels: list[Any]) -> np.ndarray | None:
    """Labels as an array of a type, or None where there is none, or it is not in order without repetition."""
    try:
        if np.dtype(dtype).itemsize * len(labels) > _MAX_CLASS_BYTES:
            return None
        with np.errstate(over="ignore"):
            array = np.array(labels, dtype=dtype)
        return array if np.array_equal(np.unique(array), array) else None
    except (TypeError, ValueError, OverflowError):
        return None


def _plain(value: Any) -> Any:
    """The same value without NumPy scalars and enumerations."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    return value.value if isinstance(value, Status) else value
