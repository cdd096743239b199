"""One fold of a cross-validation: whitened once, with warm-started paths, and scores on the rows that are held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from sklearn.utils import _safe_indexing

from convexbn.data.warn import collected
from convexbn.estimators.path import RegularisationPath
from convexbn.estimators.path_data import PathData
from convexbn.estimators.path_grid import unfitted

#: Errors of data and numbers, by which a fold or a candidate fails; all others end the search.
FAILURES = (ValueError, FloatingPointError)


class Score(NamedTuple):
    """Score of a candidate on a fold and its certified relative gap; both NaN if it, or the whole fold, failed."""

    value: float
    gap: float
    failure: str = ""
    of_fold: bool = False


@dataclass(eq=False)
class Fold:
    """Training and test rows of a fold, and what is fitted on them.

    Parameters
    ----------
    model : estimator
    grid : dict of str to list
        All values of the parameters to choose.
    rows, train, test : tuple, array-like, array-like
        ``X``, ``y`` and ``sample_weight``, and the indices of the rows to fit and to score on.
    scorer, score_options : callable, dict
        ``scorer(fitted, X, y, **score_options)`` is the score.
    """

    model: Any
    grid: dict[str, list[Any]]
    rows: tuple[Any, Any, Any]
    train: Any
    test: Any
    scorer: Callable[..., float]
    score_options: dict[str, Any]
    _data: PathData | None = field(default=None, init=False)
    _paths: dict[Any, RegularisationPath] = field(default_factory=dict, init=False)
    _failure: str = field(default="", init=False)

    def scores(self, candidates: Sequence[dict[str, Any]]) -> Iterator[Score]:
        """Scores of candidates, one by one. What is fitted serves as starts of the next ones."""
        test = self._part(self.test)[:2]
        for candidate in candidates:
            with collected():  # data warn in the fit on all rows
                score = self._score(candidate, test)
            yield score

    def forget(self) -> None:
        """Free the memory of what is fitted."""
        self._data, self._paths = None, {}

    def _part(self, index: Any) -> tuple[Any, Any, Any]:
        X, y, sample_weight = (None if array is None else _safe_indexing(array, index) for array in self.rows)
        return X, y, sample_weight

    def _score(self, candidate: dict[str, Any], test: tuple[Any, Any]) -> Score:
        try:
            if self._failure:
                raise ValueError(self._failure)
            path = self._path(candidate, self._data or self._prepare())
            fitted = path.follow(candidate["weight_decay"], candidate["rank"]).model
            value = float(self.scorer(fitted, *test, **self.score_options))
        except FAILURES as error:
            return Score(np.nan, np.nan, str(error), of_fold=bool(self._failure))
        return Score(value, fitted.certificate_.relative_gap)

    def _prepare(self) -> PathData:
        X, y, sample_weight = self._part(self.train)
        filters = self.grid["spectral_filter"]
        try:
            self._data = PathData.prepare(self.model, self.grid["rank"], X, y, sample_weight, filters)
        except FAILURES as error:
            self._failure = str(error)
            raise
        return self._data

    def _path(self, candidate: dict[str, Any], data: PathData) -> RegularisationPath:
        """Path of a number of gates and a filter."""
        changes = {name: candidate[name] for name in ("n_gates", "spectral_filter")}
        key = tuple(changes.values())
        if key not in self._paths:
            self._paths[key] = RegularisationPath(unfitted(self.model, **changes), data, [], [])
        return self._paths[key]
