"""Header of a saved model: one table of its fields, with their rules and how each is written and read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from typing import Any, NamedTuple

import numpy as np

from convexbn._version import __version__
from convexbn.certificate.certificate import Certificate
from convexbn.certificate.status import STOPPED_BY, Status
from convexbn.data.convolution import Convolution
from convexbn.estimators import table_columns
from convexbn.files import schema
from convexbn.files.model_file import JSON, FormatError
from convexbn.files.schema import NOT_FINITE, none_or, require

#: Scope of the certificate, by activation; what rounding cut follows.
SCOPES = {"gated": "these gates", "relu": "all patterns"}

#: Fields that files of former versions do not have.
FORMER_FIELDS = {"temperature": None, "columns": None}
#: Parameters that they do not have, with the values that these had in effect; with them they are not written.
FORMERLY: dict[str, Any] = {"linear": False, "fit_intercept": False, "standardize": False, "proof_time": None}

#: Rules of the certificate's fields by their declared type, and narrower ones of some fields.
_OF_TYPE: dict[Any, schema.Rule] = {
    "float": schema.real,
    "float | None": none_or(schema.real),
    "str": schema.text,
    "Status": schema.one_of(*(status.value for status in Status)),
}
_NARROWER: dict[str, schema.Rule] = {
    "tolerance": schema.not_negative,
    "scope": schema.matching(f"({'|'.join(SCOPES.values())})(, except along .+)?"),
    "stopped_by": schema.one_of(*STOPPED_BY),
    "estimated_gap": none_or(schema.not_negative),
}
_CERTIFICATE = schema.record(**{field.name: _OF_TYPE[field.type] for field in fields(Certificate)} | _NARROWER)

#: The command line's note of where the training rows are.
_SOURCE = schema.record(
    data=schema.text, target=none_or(schema.text), feature_names=none_or(schema.names), test_size=schema.share,
    seed=schema.count, task=schema.one_of("classification", "regression"),
)  # fmt: skip

_LABELS = (str, int, float, bool)
_CLASSES = schema.record(
    dtype=schema.matching(r"[<>|=]?([biufUO]\d*|[mM]8\[\w+\])"), labels=schema.list_of(*_LABELS, least=2)
)
_LABEL = schema.list_of(*_LABELS, least=1)
_MAX_CLASS_BYTES = 1 << 28


def _plain(value: Any) -> Any:
    """Convert NumPy scalars, enumerations and tuples to types of JSON."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value.value if isinstance(value, Status) else value


def _certificate_to_json(proof: Certificate) -> dict[str, Any]:
    """Fields of a certificate; numbers that JSON cannot hold become their names."""
    values = _plain(asdict(proof))
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _certificate_from_json(block: Mapping[str, Any]) -> Certificate:
    numbers = {field.name for field in fields(Certificate) if "float" in str(field.type)}
    values: dict[str, Any] = {k: float(v) if k in numbers and v in NOT_FINITE else v for k, v in block.items()}
    return Certificate(**values | {"status": Status(block["status"])})


def _classes_from_json(block: Mapping[str, Any]) -> Any:
    """Class labels in order, each exactly as its type holds it."""
    labels: Any = None
    dates = False
    with suppress(TypeError, ValueError, OverflowError), np.errstate(over="ignore"):
        if np.dtype(block["dtype"]).itemsize * len(block["labels"]) <= _MAX_CLASS_BYTES:
            dates = np.dtype(block["dtype"]).kind in "mM"
            array = np.array(block["labels"], dtype=np.int64 if dates else block["dtype"])
            labels = array if np.array_equal(np.unique(array), array) else None
    # compared as text: 1, 1.0 and True are three labels
    require(labels is not None and repr(labels.tolist()) == repr(block["labels"]), "classes")
    return labels.view(block["dtype"]) if dates else labels


def _classes_to_json(labels: Any) -> dict[str, Any]:
    """Class labels and their type; dates and durations as numbers of their unit."""
    values = labels.astype(np.int64) if labels.dtype.kind in "mM" else labels
    return {"dtype": labels.dtype.str, "labels": values.tolist()}


class _Field(NamedTuple):
    """A field that holds an attribute of the fitted estimator, or null if there is none."""

    attribute: str
    rule: schema.Rule
    write: Callable[[Any], Any] = _plain
    read: Callable[[Any], Any] = lambda value: value


_FITTED = {
    "weight_decay": _Field("weight_decay_", schema.positive, float),
    "rank": _Field("rank_", schema.count, int),
    "temperature": _Field("temperature_", none_or(schema.positive)),
    "n_iter": _Field("n_iter_", schema.count, int),
    "fingerprint": _Field("fingerprint_", schema.matching(r"[0-9a-f]{64}")),
    "feature_names": _Field("feature_names_in_", none_or(schema.names), list, lambda names: np.array(names, object)),
    "classes": _Field("classes_", none_or(_CLASSES), _classes_to_json, _classes_from_json),
    "single_output": _Field("_single_output", none_or(schema.flag)),
    "certificate": _Field("certificate_", _CERTIFICATE, _certificate_to_json, _certificate_from_json),
    "source": _Field("source_", none_or(_SOURCE)),
    "columns": _Field("columns_", none_or(table_columns.RULE), table_columns.to_json, table_columns.from_json),
}

#: Rules of all fields.
RULES: dict[str, schema.Rule] = {
    "version": schema.text,
    "estimator": schema.one_of("ConvexBNClassifier", "ConvexBNRegressor"),
    "parameters": schema.mapping,
    "n_effective": schema.positive,
    **{name: field.rule for name, field in _FITTED.items()},
}


def of_model(model: Any) -> dict[str, JSON]:
    """Header of a fitted estimator, in plain Python values."""
    values = {name: getattr(model, field.attribute, None) for name, field in _FITTED.items()}
    if values["columns"] is None:  # as in files from before there were columns
        del values["columns"]
    return {
        "version": __version__,
        "estimator": type(model).__name__,
        "parameters": parameters(model),
        "n_effective": float(model.network_.n_effective),
        **{name: None if value is None else _FITTED[name].write(value) for name, value in values.items()},
    }


def attributes(header: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of the fitted estimator that a header holds."""
    return {field.attribute: field.read(header[k]) for k, field in _FITTED.items() if header[k] is not None}


def check(header: Mapping[str, JSON], rules: Mapping[str, schema.Rule]) -> None:
    """Refuse a header with missing or unknown fields, or with a field that breaks its rule."""
    require(schema.same_names(header, rules), "header")
    for name, rule in rules.items():
        require(rule(header[name]), name)


def parameters(model: Any) -> dict[str, Any]:
    """Parameters of an estimator that JSON can hold; given gates are a tensor."""
    unwritten = {"callback": model.callback, **FORMERLY}
    values = model.get_params().items()
    kept = {name: value for name, value in values if name not in unwritten or value != unwritten[name]}
    if kept["convolution"] is not None:  # with the shape of its inputs after a fit
        kept["convolution"] = asdict(getattr(model, "network_", model).convolution)
    if not isinstance(model.gates, str):
        del kept["gates"]
    if kept.get("class_weight") is None:  # as in files from before there were weights of classes
        kept.pop("class_weight", None)
    elif not isinstance(model.class_weight, str):
        kept["class_weight"] = [[_plain(label), float(weight)] for label, weight in model.class_weight.items()]
    if not isinstance(model.random_state, (int, np.integer)):
        kept["random_state"] = None
    return _plain(kept)


def class_weight(block: Any) -> Any:
    """Weights of classes as the estimator takes them."""
    if not isinstance(block, list):
        return block
    require(all(type(pair) is list and len(pair) == 2 and _LABEL(pair[:1]) for pair in block), "class_weight")
    return dict(block)


def convolution(block: Any) -> Convolution | None:
    """Convolutional layer of a saved estimator, if it has one; the layer checks its own values."""
    if block is None:
        return None
    names = {field.name for field in fields(Convolution)}
    require(type(block) is dict and schema.same_names(block, names), "convolution")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in block.items()}
    try:
        return Convolution(**values)
    except ValueError:
        raise FormatError("the field 'convolution' does not fit the rest") from None
