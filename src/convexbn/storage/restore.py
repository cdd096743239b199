"""From tensors and a header to a fitted estimator, refused where fields do not belong together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from convexbn.certificate.certificate import Certificate
from convexbn.certificate.status import Status
from convexbn.data.convolution import Convolution
from convexbn.estimators import ConvexBNClassifier, ConvexBNRegressor
from convexbn.files.schema import require, same_names
from convexbn.program.convolutional_network import ConvolutionalNetwork
from convexbn.program.network import BatchNormNetwork
from convexbn.storage import header as headers
from convexbn.storage import tensors

_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (ConvexBNClassifier, ConvexBNRegressor)}
_PROVED = (Status.CERTIFIED, Status.TRIVIAL)
_ROUNDING = 1e-9


def restore(arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> Any:
    """The estimator that tensors and header describe.

    Raises
    ------
    FormatError
        With the name of the first field that breaks a rule or does not belong to the others.
    """
    headers.check(header)
    model = _unfitted(header, arrays)
    tensors.check(arrays, gated=model.activation == "gated")
    layer = model.convolution
    require(layer is None or layer.input_shape is not None, "convolution")
    require(layer is None or layer.geometry.patch_size == len(arrays["mean"]), "convolution")
    require(layer is None or arrays["output"].shape[1] % layer.pool.n_regions == 0, "convolution")
    fitted = _fitted(arrays, header, layer)
    for field, holds in _agreements(model, fitted):
        require(holds, field)
    model.__dict__.update(fitted)
    return model


def _unfitted(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Any:
    """Estimator with the saved parameters, each checked by the estimator's own constraints."""
    kind, parameters = _KINDS[header["estimator"]], dict(header["parameters"])
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
    dense = tensors.network(arrays, header["n_effective"])
    return {
        "network_": dense if layer is None else ConvolutionalNetwork.of(dense, layer),
        "gates_": arrays.get("gates"),
        "gate_offsets_": arrays.get("gate_offsets"),
        "certificate_": headers.certificate(header["certificate"]),
        "history_": tensors.history(arrays["history"]),
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
    is_classifier = isinstance(model, ConvexBNClassifier)
    yield "classes", is_classifier == (n_classes > 0)
    yield "classes", not is_classifier or (1 if n_classes == 2 else n_classes) == K
    yield "single_output", is_classifier != ("_single_output" in fitted)
    yield "single_output", K == 1 or not fitted.get("_single_output")
    yield "parameters", K == 1 or model.loss != "logistic"
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


@np.errstate(over="ignore")
def _plain_penalty(network: BatchNormNetwork) -> float:
    return 0.5 * sum(float(np.sum(part**2)) for part in (network.gamma, network.shift, network.output))


def _claims(proof: Certificate, model: Any, network: BatchNormNetwork, weight_decay: float) -> Iterator[bool]:
    """Whether a certificate contradicts neither itself nor the weights."""
    numbers = (proof.objective, proof.lower_bound, proof.weight_decay_objective)
    largest = proof.weight_decay_objective * (1 + _ROUNDING) + float(np.finfo(np.float64).tiny)
    yield proof.scope == headers.SCOPES[model.activation]
    yield proof.status is Status.NUMERICAL or all(map(math.isfinite, numbers))
    yield proof.status is Status.NUMERICAL or proof.lower_bound <= proof.objective
    # under a spectral filter the penalty is larger than that of the plain weights
    yield proof.status is Status.NUMERICAL or model.spectral_filter is not None or proof.objective <= largest
    yield proof.status not in _PROVED or 0 <= proof.relative_gap <= proof.tolerance
    yield proof.status is not Status.TRIVIAL or network.n_neurons == 0
    yield not weight_decay * _plain_penalty(network) > largest  # the loss is not negative; NaN claims nothing
