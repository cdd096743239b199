"""Saved models: an estimator becomes tensors and a header in one file, and a file becomes an estimator.

Nothing in a file is executed. ``save`` first restores in memory what it will write, so that ``load`` reads it.
The certificate in a file is what was claimed when it was written; ``certify`` recomputes it from data.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from sklearn.base import is_classifier
from sklearn.utils.validation import check_is_fitted

from convexbn.certificate.status import Status
from convexbn.data.convolution import Convolution
from convexbn.estimators import persistence_header as headers
from convexbn.estimators.parameters import trained_loss
from convexbn.files import model_file
from convexbn.files.model_file import FormatError
from convexbn.files.schema import require, same_names
from convexbn.program.losses import class_loss
from convexbn.program.network import BatchNormNetwork
from convexbn.solvers.base import Progress

#: Axes by letter; the first tensor to name an axis sets its size: d features, m neurons, K outputs, C columns of the
#: output layer, h iterations with 5 numbers each (4 with gates: no estimated bounds), P gates of the program.
_AXES = {
    "output": "mC",
    "output_bias": "K",
    "weight": "dm",
    "gamma": "m",
    "shift": "m",
    "mean": "d",
    "deviations": "d",
    "history": "h5",
}
#: Tensors that files of former versions, or of some models, do not have.
_OPTIONAL = {"given_gates", "output_bias", "deviations"}
_GATE_AXES = {"history": "h4", "gate_offsets": "P", "gates": "dP", "gate_index": "m"}
_MAY_BE_EMPTY = "mh"
_NETWORK = ("weight", "gamma", "shift", "output", "output_bias", "mean")

#: Stand-ins for infinity and NaN: a file holds finite numbers alone, and a solver that broke down reports others.
_INFINITY = np.finfo(np.float64).max
_NAN = np.nextafter(_INFINITY, 0)

_ROUNDING = 1e-9

#: Endings of files of other kinds, which a reader would take by their name.
_OTHER_ENDINGS = {
    ".pkl", ".pickle", ".joblib", ".pt", ".pth", ".pt2", ".onnx", ".h5", ".npy", ".npz", ".csv", ".parquet", ".json",
    ".html", ".zip",
}  # fmt: skip


def check_name(path: str | os.PathLike[str]) -> None:
    """Refuse a name that says another kind of file."""
    ending = os.path.splitext(path)[1].lower()
    if ending in _OTHER_ENDINGS:
        raise ValueError(
            f"{os.fspath(path)!r} is not written: models are safetensors files, and {ending} says another kind; "
            "let the name end in .safetensors."
        )


def save(model: Any, path: str | os.PathLike[str]) -> None:
    """Write a fitted estimator to a safetensors file, atomically."""
    check_is_fitted(model)
    model._validate_params()
    check_name(path)
    arrays, header = tensors_of(model), headers.of_model(model)
    with refusing(f"{os.fspath(path)!r} is not written", "fit the model again and save it"):
        restore(arrays, header, (type(model),))
    model_file.write(path, arrays, header)


def load(path: str | os.PathLike[str], kinds: Sequence[type]) -> Any:
    """Read an estimator of the given classes that ``save`` wrote; nothing in the file is executed."""
    arrays, header = model_file.read(path)
    with refusing(f"{os.fspath(path)!r} is not read", "use a file that save wrote, unchanged"):
        return restore(arrays, header, kinds)


@contextmanager
def refusing(refused: str, remedy: str) -> Iterator[None]:
    """Complete a refusal to one sentence: what was refused, why, and the remedy."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{refused}: {error}; {remedy}.") from None


def restore(arrays: Mapping[str, np.ndarray], header: Mapping[str, Any], kinds: Sequence[type]) -> Any:
    """Restore the estimator that tensors and a header describe; a refusal names the first wrong field.

    Parameters
    ----------
    arrays, header, kinds : mapping, mapping, sequence of estimator classes that are allowed
    """
    header = {**headers.FORMER_FIELDS, **header}
    headers.check(header, headers.RULES)
    model = _unfitted(header, arrays, kinds)
    if model.activation == "relu":
        arrays = _with_estimates(arrays)
    _check_tensors(arrays, gated=model.activation == "gated")
    layer = model.convolution
    if layer is not None:
        require(layer.input_shape is not None and layer.geometry.patch_size == len(arrays["mean"]), "convolution")
        require(arrays["output"].shape[1] % layer.pool.n_regions == 0, "convolution")
    fitted = _fitted(arrays, header, layer)
    _check_agreement(model, fitted)
    model.__dict__.update(fitted)
    return model


def _unfitted(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray], kinds: Sequence[type]) -> Any:
    """Estimator with the saved parameters, each checked by the estimator's own constraints."""
    known = {kind.__name__: kind for kind in kinds}
    require(header["estimator"] in known, "estimator")
    kind, parameters = known[header["estimator"]], headers.FORMERLY | header["parameters"]
    given = {"gates": arrays["given_gates"]} if "given_gates" in arrays else {}
    names = set(kind().get_params()) - {"callback", *given}
    require(same_names({*parameters, *(names & {"class_weight"})}, names), "parameters")
    require(given or isinstance(parameters["gates"], str), "parameters")
    parameters["convolution"] = headers.convolution(parameters["convolution"])
    if "class_weight" in parameters:
        parameters["class_weight"] = headers.class_weight(parameters["class_weight"])
    model = kind(**parameters, **given)
    try:
        model._validate_params()
    except (TypeError, ValueError):
        require(False, "parameters")
    return model


def _with_estimates(arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Tensors with 5 numbers an iteration; the bounds of earlier files were estimates."""
    history = arrays.get("history", np.zeros(0))
    if history.ndim != 2 or history.shape[1] != 4:
        return arrays
    return {**arrays, "history": np.insert(history, 2, 0.0, axis=1)[:, [0, 1, 2, 4, 3]]}  # no loss is negative


def _fitted(arrays: Mapping[str, np.ndarray], header: Mapping[str, Any], layer: Convolution | None) -> dict[str, Any]:
    """Attributes of the fitted estimator; a gated neuron has the gate of the program at its index."""
    network: dict[str, Any] = {name: arrays[name] for name in _NETWORK if name in arrays}
    if "gates" in arrays:
        index = arrays["gate_index"].astype(np.intp)
        network |= {"gates": arrays["gates"][:, index], "gate_offsets": arrays["gate_offsets"][index]}
        network["gate_index"] = index
    stored = arrays["history"]
    history = np.where(np.abs(stored) == _INFINITY, np.copysign(np.inf, stored), stored)
    history[stored == _NAN] = np.nan
    return ({"_deviations": arrays["deviations"]} if "deviations" in arrays else {}) | {
        "network_": BatchNormNetwork(n_effective=header["n_effective"], convolution=layer, **network),
        "gates_": arrays.get("gates"),
        "gate_offsets_": arrays.get("gate_offsets"),
        "history_": [_progress(*values) for values in history.tolist()],
        "n_features_in_": len(arrays["mean"]) if layer is None else layer.geometry.n_features,
        "temperature_": None,
        **headers.attributes(header),
    }


def _progress(iteration: float, objective: float, bound: float, size: float, estimate: float = math.nan) -> Progress:
    return Progress(int(iteration), objective, bound, int(size), None if math.isnan(estimate) else estimate)


def _check_agreement(model: Any, fitted: Mapping[str, Any]) -> None:
    """Refuse parameters and fitted attributes that do not belong together."""
    network, history, n_classes = fitted["network_"], fitted["history_"], len(fitted.get("classes_", ()))
    regions = 1 if model.convolution is None else model.convolution.pool.n_regions
    d, K = fitted["n_features_in_"], network.output.shape[1] // regions
    require(network.output_bias.shape == (K,), "output_bias")
    require(model.fit_intercept or not network.output_bias.any(), "output_bias")
    has_classes = is_classifier(model)
    require(has_classes == (n_classes > 0), "classes")
    require(not has_classes or (1 if n_classes == 2 else n_classes) == K, "classes")
    require(has_classes != ("_single_output" in fitted), "single_output")
    require(K == 1 or not fitted.get("_single_output"), "single_output")
    require(class_loss(trained_loss(vars(model) | dict(fitted)), K).takes_outputs(K), "parameters")
    require(len(fitted.get("feature_names_in_", range(d))) == d, "feature_names")
    require("columns_" not in fitted or len(fitted["columns_"].inputs) == d, "columns")
    require(fitted["rank_"] <= len(network.mean), "rank")
    require(fitted["n_iter_"] == (history[-1].iteration if history else 0), "n_iter")
    with np.errstate(over="ignore"):  # the two layers of every neuron have equal norms, as `from_neurons` makes them
        inner, outer = np.hypot(network.gamma, network.shift), np.hypot.reduce(network.output, axis=1)
        require(np.allclose(inner, outer, rtol=_ROUNDING, atol=0), "output")
        penalty = fitted["weight_decay_"] * network.weight_decay_penalty
    require(all(_claims(fitted["certificate_"], model, network.n_neurons, penalty)), "certificate")


def _claims(proof: Any, model: Any, n_neurons: int, penalty: float) -> Iterator[bool]:
    """Whether a certificate contradicts neither itself nor the weights."""
    numbers = (proof.objective, proof.lower_bound, proof.weight_decay_objective)
    largest = proof.weight_decay_objective * (1 + _ROUNDING) + float(np.finfo(np.float64).tiny)
    yield proof.scope.split(",")[0] == headers.SCOPES[model.activation]
    if proof.status is not Status.NUMERICAL:
        yield all(map(math.isfinite, numbers)) and proof.lower_bound <= proof.objective
        # under a spectral filter the penalty is larger than that of the plain weights
        yield model._tau is not None or proof.objective <= largest
    yield proof.status not in (Status.CERTIFIED, Status.TRIVIAL) or 0 <= proof.relative_gap <= proof.tolerance
    yield proof.status is not Status.TRIVIAL or n_neurons == 0
    yield not penalty > largest  # the loss is not negative; NaN claims nothing


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """Tensors of a fitted estimator."""
    network = model.network_
    arrays = {name: getattr(network, name) for name in _NETWORK}
    if model.gates_ is not None:
        arrays |= {"gates": model.gates_, "gate_offsets": model.gate_offsets_}
        arrays["gate_index"] = network.gate_index.astype(np.int64)
    if not isinstance(model.gates, str):
        arrays["given_gates"] = np.asarray(model.gates, dtype=np.float64)
    if hasattr(model, "_deviations"):
        arrays["deviations"] = model._deviations
    history = np.array(model.history_, dtype=np.float64).reshape(-1, 5)  # None becomes NaN
    if model.gates_ is not None:
        history = history[:, :4]
    arrays["history"] = np.nan_to_num(history, nan=_NAN, posinf=_INFINITY, neginf=-_INFINITY)
    return arrays


def _check_tensors(arrays: Mapping[str, np.ndarray], *, gated: bool) -> None:
    """Refuse missing and unknown tensors, other types and shapes, and impossible values."""
    axes = _AXES | (_GATE_AXES if gated else {})
    if "deviations" in arrays:
        require(np.all(arrays["deviations"] >= 0), "deviations")
    axes = {name: letters for name, letters in axes.items() if name in arrays or name not in _OPTIONAL}
    require(same_names(arrays, {*axes, *(_OPTIONAL & set(arrays))}), "list of tensors")
    sizes = {"4": 4, "5": 5}
    for name, letters in axes.items():
        require(arrays[name].dtype == (np.int64 if name == "gate_index" else np.float64), name)
        require(arrays[name].ndim == len(letters), name)
        for letter, size in zip(letters, arrays[name].shape, strict=True):
            require(sizes.setdefault(letter, size) == size, name)
            require(size > 0 or letter in _MAY_BE_EMPTY, name)
    counts = arrays["history"][:, [0, 3]]
    require(np.all((counts >= 0) & (counts <= 2**53) & (counts == np.round(counts))), "history")
    require(np.all(np.diff(counts[:, 0]) > 0), "history")
    require(np.all(arrays["gamma"] >= 0), "gamma")
    if gated:
        index = arrays["gate_index"]
        require(np.all((index >= 0) & (index < sizes["P"])), "gate_index")
    if gated and "given_gates" in arrays:
        given, d = arrays["given_gates"], sizes["d"]
        require(given.dtype == np.float64 and given.ndim == 2, "given_gates")
        require(given.shape[0] in (d, d + 1) and given.shape[1] > 0, "given_gates")
