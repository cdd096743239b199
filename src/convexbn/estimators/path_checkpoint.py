"""The checkpoint of a path: its question, grid and finished points in one file, replaced after each point."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convexbn._version import __version__
from convexbn.estimators import persistence_header as headers
from convexbn.estimators.persistence import Kinds, restore, tensors_of
from convexbn.files import model_file, schema
from convexbn.files.model_file import JSON, FormatError
from convexbn.files.schema import require

_POINT = schema.record(header=schema.mapping, tensors=schema.mapping, score=schema.none_or(schema.real))
_PLACE = schema.list_of(int, least=1)
_FIELDS: dict[str, schema.Rule] = {
    "question": schema.mapping,
    "weight_decays": schema.list_of(float, least=1),
    "points": schema.list_of(dict, least=0),
}

#: Parts of a question that are hashes, which say nothing to a reader.
_HASHES = ("X", "y", "sample_weight", "validation rows", "feature names", "gates")


@dataclass(frozen=True)
class StoredPath:
    """A path as its file holds it.

    Attributes
    ----------
    question : dict
        What the path depends on, part by part, in JSON's types.
    weight_decays : list of float
        The grid, which may have been computed from the data.
    points : list of (model, score)
        The finished points.
    """

    question: dict[str, Any]
    weight_decays: list[float]
    points: list[tuple[Any, float | None]]


class PathCheckpoint:
    """The file of a path: what it holds of this question, and how it is replaced."""

    def __init__(self, file: str | os.PathLike[str], question: dict[str, Any], kinds: Kinds) -> None:
        self.file, self.question = file, question
        self.points: list[tuple[Any, float | None]] = []
        self.weight_decays: list[float] | None = None
        if os.path.lexists(file):
            stored = read(file, kinds)
            check_question(file, stored.question, question)
            self.points, self.weight_decays = stored.points, stored.weight_decays

    def write(self, points: list[tuple[Any, float | None]], weight_decays: Sequence[float]) -> None:
        """Replace the file in one step by models and scores."""
        write(self.file, StoredPath(self.question, list(weight_decays), points))


def question_of(
    model: Any, weight_decays: list[float] | None, ranks: list[int | float | None], rows: dict[str, Any]
) -> dict[str, Any]:
    """What a path depends on, part by part: a resumed one must agree in all of them."""
    settings = {
        name: value for name, value in headers.parameters(model).items() if name not in ("weight_decay", "rank")
    }
    hashes = {name: None if part is None else _digest(part) for name, part in rows.items()}
    grid = {"weight_decays": weight_decays, "ranks": ranks}
    if not isinstance(model.gates, str):
        hashes["gates"] = _digest(model.gates)
    return {"version": __version__, "estimator": type(model).__name__} | hashes | grid | settings


def _digest(part: Any) -> str:
    """Hash of an array, or of several, with types and shapes."""
    digest = hashlib.sha256()
    for item in part if isinstance(part, tuple) else (part,):
        array = np.asarray(item)
        if array.dtype.kind not in "biuf":
            array = array.astype(str)
        digest.update(repr((array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def write(path: str | os.PathLike[str], stored: StoredPath) -> None:
    """Write a checkpoint; in its place there is at every instant the former one or the new one, complete.

    The tensors of one name follow one another, flat, in one tensor of the file; a point has the place of each and
    its shape. Those that several points have in common, such as gates, are stored once.
    """
    parts: dict[str, _Parts] = {}
    points: list[JSON] = []
    for model, score in stored.points:
        arrays = tensors_of(model).items()
        places: JSON = {name: parts.setdefault(name, _Parts()).place_of(array) for name, array in arrays}
        shown = score if score is None or np.isfinite(score) else str(score)
        points.append({"header": headers.of_model(model), "tensors": places, "score": shown})
    decays: list[JSON] = [*stored.weight_decays]
    header: dict[str, JSON] = {"question": stored.question, "weight_decays": decays, "points": points}
    model_file.write(path, {name: part.joined() for name, part in parts.items()}, header)


def read(path: str | os.PathLike[str], kinds: Kinds) -> StoredPath:
    """Read what `write` wrote; nothing in the file is executed.

    Parameters
    ----------
    path : path-like
    kinds : sequence of estimator classes
        Those that its points may be of.

    Raises
    ------
    FormatError
        When the file is damaged, no checkpoint of a path, or its fields do not belong together.
    """
    arrays, header = model_file.read(path)
    try:
        return _restored(arrays, header, kinds)
    except FormatError as error:
        raise FormatError(
            f"{os.fspath(path)!r} is not read: {error}; use a checkpoint of a path, unchanged, or another file name."
        ) from None


def check_question(path: str | os.PathLike[str], stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse to go on with a path whose data or settings were others, naming the parts that differ."""
    changes = []
    for name in {**stored, **asked}:
        before, now = stored.get(name), asked.get(name)
        if json.dumps(before, sort_keys=True) != json.dumps(now, sort_keys=True):
            changes.append(name if name in _HASHES else f"{name} (it was {before!r} and is {now!r})")
    if changes:
        raise ValueError(
            f"{os.fspath(path)!r} is the checkpoint of another path, which differs in {', '.join(changes)}. "
            "Ask for the same again to go on, or name another file."
        )


class _Parts:
    """Arrays of one name that become one flat tensor, equal ones once."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self.places: dict[bytes, int] = {}
        self.size = 0

    def place_of(self, array: np.ndarray) -> list[JSON]:
        """Where the array begins, and its shape."""
        key = hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
        if key not in self.places:
            self.places[key] = self.size
            self.arrays.append(array.ravel())
            self.size += array.size
        return [self.places[key], *array.shape]

    def joined(self) -> np.ndarray:
        """All of them, one after another."""
        return np.concatenate(self.arrays)


def _part(array: np.ndarray, place: Any) -> np.ndarray:
    """An array out of a flat tensor."""
    require(_PLACE(place) and min(place) >= 0 and array.ndim == 1, "points")
    start, *shape = place
    require(start + math.prod(shape) <= len(array), "points")
    return array[start : start + math.prod(shape)].reshape(shape)


def _restored(arrays: Mapping[str, np.ndarray], header: Mapping[str, Any], kinds: Kinds) -> StoredPath:
    require(schema.same_names(header, _FIELDS), "header")
    for name, rule in _FIELDS.items():
        require(rule(header[name]), name)
    points = []
    for point in header["points"]:
        require(_POINT(point), "points")
        require(set(point["tensors"]) <= set(arrays), "points")
        own = {name: _part(arrays[name], place) for name, place in point["tensors"].items()}
        model = restore(own, point["header"], kinds)
        points.append((model, None if point["score"] is None else float(point["score"])))
    return StoredPath(header["question"], header["weight_decays"], points)
