"""The checkpoint of a path: what it depends on, and the file that is replaced after each point."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from convexbn._version import __version__
from convexbn.storage import header, paths


class Checkpoint:
    """The file of a path: what it holds of this question, and how it is replaced."""

    def __init__(self, file: str | os.PathLike[str], question: dict[str, Any]) -> None:
        self.file, self.question = file, question
        self.points: list[tuple[Any, float | None]] = []
        self.weight_decays: list[float] | None = None
        if os.path.lexists(file):
            stored = paths.read(file)
            paths.check_question(file, stored.question, question)
            self.points, self.weight_decays = stored.points, stored.weight_decays

    def write(self, points: list[tuple[Any, float | None]], weight_decays: Sequence[float]) -> None:
        """Replace the file in one step by models and scores."""
        paths.write(self.file, paths.StoredPath(self.question, list(weight_decays), points))


def question_of(
    model: Any, weight_decays: list[float] | None, ranks: list[int | float | None], rows: dict[str, Any]
) -> dict[str, Any]:
    """What a path depends on, part by part: a resumed one must agree in all of them."""
    settings = {name: value for name, value in header.parameters(model).items() if name not in ("weight_decay", "rank")}
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
