"""Saved models: an estimator becomes tensors and a header in one file, and a file an estimator.

Nothing in a file is executed, and what ``save`` writes is first restored in memory, so that ``load`` reads it.
The certificate in a file is what was claimed when it was written; ``certify`` recomputes it from data.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from sklearn.base import is_classifier
from sklearn.utils.validation import check_is_fitted

from convexbn._types import Float
from convexbn.certificate.certificate import Certificate
from convexbn.certificate.status import Status
from convexbn.data.convolution import Convolution
from convexbn.estimators import persistence_header as headers
from convexbn.files import model_file
from convexbn.files.model_file import JSON, FormatError
from convexbn.files.schema import require, same_names
from convexbn.program.losses import class_loss
from convexbn.program.network import BatchNormNetwork
from convexbn.solvers.base import Progress

#: Axes by letter; the first tensor to name an axis sets its size: d features, m neurons, K outputs,
#: h iterations with 4 numbers each, P gates of the program.
_AXES = {"output": "mK", "weight": "dm", "gamma": "m", "shift": "m", "mean": "d", "history": "h4"}
_GATE_AXES = {"gate_offsets": "P", "gates": "dP", "gate_index": "m"}
_MAY_BE_EMPTY = "mh"
_NETWORK = ("weight", "gamma", "shift", "output", "mean")

#: Stand-ins in a file, which holds finite numbers alone; a history has others where a solver broke down.
_INFINITY = np.finfo(np.float64).max
_NAN = np.nextafter(_INFINITY, 0)

_PROVED = (Status.CERTIFIED, Status.TRIVIAL)
_ROUNDING = 1e-9

#: Classes of estimators that a file may hold.
Kinds: TypeAlias = Sequence[type]


def save(model: Any, path: str | os.PathLike[str]) -> None:
    """Write a fitted estimator to a safetensors file, atomically.

    Parameters
    ----------
    model : ConvexBNClassifier or ConvexBNRegressor
        A fitted estimator. A ``callback`` is not saved, nor a ``random_state`` that is not an integer.
    path : path-like
        File to write; an existing one is replaced in one step.

    Raises
    ------
    ValueError
        When the estimator is not fitted, or was changed after the fit to one that `load` would refuse; nothing
        has been written.
    """
    check_is_fitted(model)
    model._validate_params()
    arrays, header = tensors_of(model), headers.of_model(model)
    _restored(arrays, header, (type(model),), f"{os.fspath(path)!r} is not written", "fit the model again and save it")
    model_file.write(path, arrays, header)


def load(path: str | os.PathLike[str], kinds: Kinds) -> Any:
    """Read an estimator that ``save`` wrote; nothing in the file is executed.

    Parameters
    ----------
    path : path-like
        A file written by ``save``.
    kinds : sequence of estimator classes
        Those that a file may hold.

    Returns
    -------
    ConvexBNClassifier or ConvexBNRegressor
        Fitted; predictions equal those of the saved one bit for bit.

    Raises
    ------
    FormatError
        When the file is damaged, foreign, or its fields do not belong together.
    """
    arrays, header = model_file.read(path)
    return _restored(arrays, header, kinds, f"{os.fspath(path)!r} is not read", "use a file that save wrote, unchanged")


def _restored(
    arrays: Mapping[str, np.ndarray], header: Mapping[str, JSON], kinds: Kinds, refused: str, remedy: str
) -> Any:
    """Restore; a refusal says in one sentence what of which file was refused, why, and what to do."""
    try:
        return restore(arrays, header, kinds)
    except FormatError as error:
        raise FormatError(f"{refused}: {error}; {remedy}.") from None


def restore(arrays: Mapping[str, np.ndarray], header: Mapping[str, Any], kinds: Kinds) -> Any:
    """The estimator that tensors and header describe.

    Raises
    ------
    FormatError
        With the name of the first field that breaks a rule or does not belong to the others.
    """
    headers.check(header)
    model = _unfitted(header, arrays, kinds)
    _check_tensors(arrays, gated=model.activation == "gated")
    layer = model.convolution
    require(layer is None or layer.input_shape is not None, "convolution")
    require(layer is None or layer.geometry.patch_size == len(arrays["mean"]), "convolution")
    require(layer is None or arrays["output"].shape[1] % layer.pool.n_regions == 0, "convolution")
    fitted = _fitted(arrays, header, layer)
    for field, holds in _agreements(model, fitted):
        require(holds, field)
    model.__dict__.update(fitted)
    return model


def _unfitted(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray], kinds: Kinds) -> Any:
    """Estimator with the saved parameters, each checked by the estimator's own constraints."""
    known = {kind.__name__: kind for kind in kinds}
    require(header["estimator"] in known, "estimator")
    kind, parameters = known[header["estimator"]], dict(header["parameters"])
    given = {"gates": arrays["given_gates"]} if "given_gates" in arrays else {}
    require(same_names(parameters, set(kind().get_params()) - {"callback", *given}), "parameters")
    require(given or isinstance(parameters["gates"], str), "parameters")
    parameters["convolution"] = headers.convolution(parameters["convolution"])
    model = kind(**parameters, **given)
    try:
        model._validate_params()
    except (TypeError, ValueError):
        require(False, "parameters")
    return model


def _fitted(arrays: Mapping[str, np.ndarray], header: Mapping[str, Any], layer: Convolution | None) -> dict[str, Any]:
    """Attributes of the fitted estimator; those that not every one has are left out where they are None."""
    names = header["feature_names"]
    sometimes = {
        "classes_": headers.classes(header["classes"]),
        "feature_names_in_": None if names is None else np.array(names, dtype=object),
        "source_": header["source"],
        "_single_output": header["single_output"],
    }
    return {
        "network_": _network(arrays, header["n_effective"], layer),
        "gates_": arrays.get("gates"),
        "gate_offsets_": arrays.get("gate_offsets"),
        "certificate_": headers.certificate(header["certificate"]),
        "history_": _history(arrays["history"]),
        "n_features_in_": len(arrays["mean"]) if layer is None else layer.geometry.n_features,
        "n_iter_": header["n_iter"],
        "rank_": header["rank"],
        "weight_decay_": header["weight_decay"],
        "fingerprint_": header["fingerprint"],
        **{name: value for name, value in sometimes.items() if value is not None},
    }


def _agreements(model: Any, fitted: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Names of fields, and whether they belong to the others."""
    network, history, n_classes = fitted["network_"], fitted["history_"], len(fitted.get("classes_", ()))
    regions = 1 if model.convolution is None else model.convolution.pool.n_regions
    d, K = fitted["n_features_in_"], network.output.shape[1] // regions
    has_classes = is_classifier(model)
    yield "classes", has_classes == (n_classes > 0)
    yield "classes", not has_classes or (1 if n_classes == 2 else n_classes) == K
    yield "single_output", has_classes != ("_single_output" in fitted)
    yield "single_output", K == 1 or not fitted.get("_single_output")
    yield "parameters", class_loss(model.loss, K).takes_outputs(K)
    yield "feature_names", len(fitted.get("feature_names_in_", range(d))) == d
    yield "rank", fitted["rank_"] <= len(network.mean)
    yield "n_iter", fitted["n_iter_"] == (history[-1].iteration if history else 0)
    yield "output", _is_balanced(network)
    for holds in _claims(fitted["certificate_"], model, network, fitted["weight_decay_"]):
        yield "certificate", holds


@np.errstate(over="ignore")
def _is_balanced(network: BatchNormNetwork) -> bool:
    """Whether the two layers of every neuron have equal norms, as ``from_neurons`` makes them."""
    inner, outer = np.hypot(network.gamma, network.shift), np.hypot.reduce(network.output, axis=1)
    return np.allclose(inner, outer, rtol=_ROUNDING, atol=0)


def _claims(proof: Certificate, model: Any, network: BatchNormNetwork, weight_decay: float) -> Iterator[bool]:
    """Whether a certificate contradicts neither itself nor the weights."""
    numbers = (proof.objective, proof.lower_bound, proof.weight_decay_objective)
    with np.errstate(over="ignore"):
        penalty = weight_decay * network.weight_decay_penalty
    largest = proof.weight_decay_objective * (1 + _ROUNDING) + float(np.finfo(np.float64).tiny)
    yield proof.scope == headers.SCOPES[model.activation]
    yield proof.status is Status.NUMERICAL or all(map(math.isfinite, numbers))
    yield proof.status is Status.NUMERICAL or proof.lower_bound <= proof.objective
    # under a spectral filter the penalty is larger than that of the plain weights
    yield proof.status is Status.NUMERICAL or model.spectral_filter is not None or proof.objective <= largest
    yield proof.status not in _PROVED or 0 <= proof.relative_gap <= proof.tolerance
    yield proof.status is not Status.TRIVIAL or network.n_neurons == 0
    yield not penalty > largest  # the loss is not negative; NaN claims nothing


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """The tensors of a fitted estimator."""
    network = model.network_
    arrays = {name: getattr(network, name) for name in _NETWORK}
    if model.gates_ is not None:
        arrays |= {"gates": model.gates_, "gate_offsets": model.gate_offsets_}
        arrays["gate_index"] = network.gate_index.astype(np.int64)
    if not isinstance(model.gates, str):
        arrays["given_gates"] = np.asarray(model.gates, dtype=np.float64)
    history = np.array(model.history_, dtype=np.float64).reshape(-1, 4)
    arrays["history"] = np.nan_to_num(history, nan=_NAN, posinf=_INFINITY, neginf=-_INFINITY)
    return arrays


def _check_tensors(arrays: Mapping[str, np.ndarray], *, gated: bool) -> None:
    """Refuse tensors too few or too many, of other types or shapes, or with values that cannot be."""
    axes = _AXES | (_GATE_AXES if gated else {})
    require(same_names(arrays, {*axes, *({"given_gates"} & set(arrays))}), "list of tensors")
    sizes = {"4": 4}
    for name, letters in axes.items():
        require(arrays[name].dtype == (np.int64 if name == "gate_index" else np.float64), name)
        require(arrays[name].ndim == len(letters), name)
        for letter, size in zip(letters, arrays[name].shape, strict=True):
            require(sizes.setdefault(letter, size) == size, name)
            require(size > 0 or letter in _MAY_BE_EMPTY, name)
    for name, holds in _possible_values(arrays, gated):
        require(holds, name)


def _network(arrays: Mapping[str, np.ndarray], n_effective: float, layer: Convolution | None) -> BatchNormNetwork:
    """The network; a gated neuron has the gate of the program that it sits on."""
    parts: dict[str, Any] = {name: arrays[name] for name in _NETWORK}
    if "gates" in arrays:
        index = arrays["gate_index"].astype(np.intp)
        parts |= {"gates": arrays["gates"][:, index], "gate_offsets": arrays["gate_offsets"][index]}
        parts["gate_index"] = index
    return BatchNormNetwork(n_effective=n_effective, convolution=layer, **parts)


def _history(stored: Float) -> list[Progress]:
    """Iterations with the numbers that a solver reported, whether finite or not."""
    values = np.where(np.abs(stored) == _INFINITY, np.copysign(np.inf, stored), stored)
    values[stored == _NAN] = np.nan
    return [Progress(int(i), objective, bound, int(size)) for i, objective, bound, size in values.tolist()]


def _possible_values(arrays: Mapping[str, np.ndarray], gated: bool) -> Iterator[tuple[str, object]]:
    """Names of tensors, and whether their values can be."""
    counts = arrays["history"][:, [0, 3]]
    yield "history", np.all((counts >= 0) & (counts <= 2**53) & (counts == np.round(counts)))
    yield "history", np.all(np.diff(counts[:, 0]) > 0)
    yield "gamma", np.all(arrays["gamma"] >= 0)
    if gated:
        index = arrays["gate_index"]
        yield "gate_index", np.all((index >= 0) & (index < len(arrays["gate_offsets"])))
    if gated and "given_gates" in arrays:
        given, d = arrays["given_gates"], len(arrays["mean"])
        yield "given_gates", given.dtype == np.float64 and given.ndim == 2
        yield "given_gates", given.shape[0] in (d, d + 1) and given.shape[1] > 0
