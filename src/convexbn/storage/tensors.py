"""The tensors of a saved model: their axes, written from an estimator and read back as network and history."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from convexbn._types import Float
from convexbn.files.schema import require, same_names
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


def of_model(model: Any) -> dict[str, np.ndarray]:
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


def check(arrays: Mapping[str, np.ndarray], *, gated: bool) -> None:
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


def network(arrays: Mapping[str, np.ndarray], n_effective: float) -> BatchNormNetwork:
    """The network; a gated neuron has the gate of the program that it sits on."""
    parts: dict[str, Any] = {name: arrays[name] for name in _NETWORK}
    if "gates" in arrays:
        index = arrays["gate_index"].astype(np.intp)
        parts |= {"gates": arrays["gates"][:, index], "gate_offsets": arrays["gate_offsets"][index]}
        parts["gate_index"] = index
    return BatchNormNetwork(n_effective=n_effective, **parts)


def history(stored: Float) -> list[Progress]:
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
