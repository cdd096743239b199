"""Checkpoint of a path: its question, grid and finished points in one file, replaced after each point."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from convexbn._version import __version__
from convexbn.estimators import persistence_header as headers
from convexbn.estimators.persistence import refusing, restore, tensors_of
from convexbn.files import model_file, schema
from convexbn.files.model_file import JSON
from convexbn.files.schema import require

_POINT = schema.record(header=schema.mapping, tensors=schema.mapping, score=schema.none_or(schema.real))
_PLACE = schema.list_of(int, least=1)
_RULES: dict[str, schema.Rule] = {
    "question": schema.mapping,
    "weight_decays": schema.list_of(float, least=1),
    "points": schema.list_of(dict, least=0),
}

#: Text by which parts of a question are compared: 1 and 1.0 differ.
_text = partial(json.dumps, sort_keys=True)

#: Parts of a question that are hashes, which mean nothing to a reader.
_HASHES = ("X", "y", "sample_weight", "validation rows", "feature names", "gates")


class StoredPath(NamedTuple):
    """Contents of a checkpoint: everything that the path depends on, its grid, and its finished points with scores."""

    question: dict[str, Any]
    weight_decays: list[float]
    points: list[tuple[Any, float | None]]


class PathCheckpoint:
    """File of a path, with the points that it holds of a question; refused if it holds another question's."""

    def __init__(self, file: str | os.PathLike[str], question: dict[str, Any], kinds: Sequence[type]) -> None:
        self.file, self.question = file, question
        stored = read(file, kinds) if os.path.lexists(file) else StoredPath(question, [], [])
        self.points, self.weight_decays = stored.points, stored.weight_decays
        changes = [
            name if name in _HASHES else f"{name} (it was {before!r} and is {now!r})"
            for name in {**stored.question, **question}
            if _text(before := stored.question.get(name, headers.FORMERLY.get(name)))
            != _text(now := question.get(name))
        ]
        if changes:
            raise ValueError(
                f"{os.fspath(file)!r} is the checkpoint of another path, which differs in {', '.join(changes)}. "
                "Ask for the same again to go on, or name another file."
            )

    def write(self, points: list[tuple[Any, float | None]], weight_decays: Sequence[float]) -> None:
        """Replace the file in one step by models and scores."""
        write(self.file, StoredPath(self.question, list(weight_decays), points))


def question_of(
    model: Any, weight_decays: list[float] | None, ranks: list[int | float | None], rows: dict[str, Any]
) -> dict[str, Any]:
    """Everything that a path depends on, part by part: a resumed path must agree in all parts.

    Parameters
    ----------
    model : estimator
    weight_decays, ranks : list as given
    rows : dict of name to arrays
    """
    settings = {k: value for k, value in headers.parameters(model).items() if k not in ("weight_decay", "rank")}
    hashes = {name: None if part is None else _digest(part) for name, part in rows.items()}
    if not isinstance(model.gates, str):
        hashes["gates"] = _digest(model.gates)
    grid = {"weight_decays": weight_decays, "ranks": ranks}
    return {"version": __version__, "estimator": type(model).__name__, **hashes, **grid, **settings}


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
    """Write a checkpoint; at every instant the former file or the new one is in place, complete.

    One flat tensor of the file holds all tensors of a name, one after another; a point has the place of each and its
    shape. Tensors that several points have in common, such as gates, are stored once.
    """
    flat: dict[str, list[np.ndarray]] = defaultdict(list)
    sizes, places = Counter[str](), dict[tuple[str, bytes], int]()
    points: list[JSON] = []
    for model, score in stored.points:
        tensors: dict[str, JSON] = {}
        for name, array in tensors_of(model).items():
            key = name, hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
            if key not in places:
                places[key] = sizes[name]
                flat[name].append(array.ravel())
                sizes[name] += array.size
            tensors[name] = [places[key], *array.shape]
        shown = score if score is None or np.isfinite(score) else str(score)
        points.append({"header": headers.of_model(model), "tensors": tensors, "score": shown})
    header: dict[str, JSON] = {"question": stored.question, "weight_decays": [*stored.weight_decays], "points": points}
    model_file.write(path, {name: np.concatenate(parts) for name, parts in flat.items()}, header)


def read(path: str | os.PathLike[str], kinds: Sequence[type]) -> StoredPath:
    """Read a checkpoint with estimators of the given classes; nothing in the file is executed."""
    header: Any
    arrays, header = model_file.read(path)
    points = []
    with refusing(f"{os.fspath(path)!r} is not read", "use a checkpoint of a path, unchanged, or another file name"):
        headers.check(header, _RULES)
        for point in header["points"]:
            require(_POINT(point) and set(point["tensors"]) <= set(arrays), "points")
            own = {name: _part(arrays[name], place) for name, place in point["tensors"].items()}
            score = None if point["score"] is None else float(point["score"])
            points.append((restore(own, point["header"], kinds), score))
    return StoredPath(header["question"], header["weight_decays"], points)


def _part(array: np.ndarray, place: Any) -> np.ndarray:
    """Cut an array out of a flat tensor."""
    require(_PLACE(place) and min(place) >= 0 and array.ndim == 1, "points")
    start, *shape = place
    require(start + math.prod(shape) <= len(array), "points")
    return array[start : start + math.prod(shape)].reshape(shape)
