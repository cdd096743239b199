"""One fold of a cross-validation: whitened once, with warm-started paths, and scores on the rows that are held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from convexbn.data.warn import collected
from convexbn.estimators.path import RegularisationPath
from convexbn.estimators.path_data import PathData
from convexbn.estimators.path_grid import unfitted

#: Errors of data and numbers, by which a fold or a candidate fails; all others end the search.
FAILURES = (ValueError, FloatingPointError)


class Score(NamedTuple):
    """Score of a candidate on a fold, its certified relative gap, and why there is none; both are NaN then."""

    value: float
    gap: float
    failure: str = ""


@dataclass(eq=False)
class Fold:
    """Training and test rows of a fold, and what is fitted on them.

    Parameters
    ----------
    model : estimator
    grid : dict of str to list
        All values of the parameters to choose.
    train, test : tuple
        ``X``, ``y`` and ``sample_weight``, and ``X`` and ``y``.
    scorer, score_options : callable, dict
        ``scorer(fitted, *test, **score_options)`` is the score.
    """

    model: Any
    grid: dict[str, list[Any]]
    train: tuple[Any, Any, Any]
    test: tuple[Any, Any]
    scorer: Callable[..., float]
    score_options: dict[str, Any]
    _data: PathData | None = field(default=None, init=False)
    _paths: dict[Any, RegularisationPath] = field(default_factory=dict, init=False)
    _failure: str = field(default="", init=False)

    def scores(self, candidates: Sequence[dict[str, Any]], tick: Callable[[], object] = lambda: None) -> list[Score]:
        """Scores of candidates; ``tick`` is called after each. What is fitted serves as starts of the next ones."""
        found = []
        with collected():  # data warn in the fit on all rows
            for candidate in candidates:
                found.append(self._score(candidate))
                tick()
        return found

    def forget(self) -> None:
        """Free the memory of what is fitted."""
        self._data, self._paths = None, {}

    def _score(self, candidate: dict[str, Any]) -> Score:
        try:
            if self._data is None and not self._failure:
                self._data = self._prepare()
            if self._data is None:
                return Score(np.nan, np.nan, self._failure)
            fitted = self._path(candidate, self._data).follow(candidate["weight_decay"], candidate["rank"]).model
            value = float(self.scorer(fitted, *self.test, **self.score_options))
        except FAILURES as error:
            return Score(np.nan, np.nan, str(error))
        return Score(value, fitted.certificate_.relative_gap)

    def _prepare(self) -> PathData:
        try:
            return PathData.prepare(self.model, self.grid["rank"], *self.train, self.grid["spectral_filter"])
        except FAILURES as error:
            self._failure = str(error)
            raise

    def _path(self, candidate: dict[str, Any], data: PathData) -> RegularisationPath:
        """Path of a number of gates and a filter."""
        changes = {name: candidate[name] for name in ("n_gates", "spectral_filter")}
        key = tuple(changes.values())
        if key not in self._paths:
            self._paths[key] = RegularisationPath(unfitted(self.model, **changes), data, [], [])
        return self._paths[key]
