"""Regularisation paths of an estimator, as iterators over certified points."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from convexbn.certificate.certificate import Certificate
from convexbn.data.warn import one_warning
from convexbn.estimators import KINDS, path_checkpoint
from convexbn.estimators.path_checkpoint import PathCheckpoint, question_of
from convexbn.estimators.path_data import PathData
from convexbn.estimators.path_grid import Ranks, checked_decays, checked_values, default_decays, unfitted, with_seed
from convexbn.program.network import BatchNormNetwork
from convexbn.solvers.base import Budget
from convexbn.training.warm_start import start_of


@dataclass(frozen=True, eq=False)
class PathPoint:
    """One point of a path.

    Attributes
    ----------
    model : ConvexBNClassifier or ConvexBNRegressor
        Fitted at ``weight_decay`` and ``rank``, which are among its parameters.
    score : float or None
        ``model.score`` on the validation rows, if there are any.
    """

    model: Any
    score: float | None

    @property
    def weight_decay(self) -> float:
        """Weight decay of the point."""
        return float(self.model.weight_decay)

    @property
    def rank(self) -> int | float | None:
        """Rank of the point as given; ``model.rank_`` is the number of directions."""
        return self.model.rank

    @property
    def network(self) -> BatchNormNetwork:
        """Network of the point, as ordinary weights."""
        return self.model.network_

    @property
    def certificate(self) -> Certificate:
        """Objective, lower bound, gap and status of the point."""
        return self.model.certificate_


def fit_path(
    estimator: Any,
    X: Any,
    y: Any,
    *,
    weight_decays: Sequence[float] | None = None,
    ranks: Ranks | None = None,
    sample_weight: Any = None,
    validation: tuple[Any, Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> RegularisationPath:
    """Regularisation path of an estimator over weight decay and rank.

    The data are whitened once; a smaller rank takes the first directions. Points are solved lazily, each from the one
    before it: over the weight decays as given for the first rank, backwards for the second, and so on, so that
    neighbours follow one another. Each point equals a ``fit`` with its weight decay and rank within the gap of its
    certificate (except for ReLU networks without a formula: each is a solution of its own).

    Parameters
    ----------
    estimator : ConvexBNClassifier or ConvexBNRegressor
        Not changed. Its ``weight_decay`` is not used; its ``time_limit`` is for each point.
    X, y : array-like
        Training rows.
    weight_decays : sequence of float, optional
        From large to small is fastest. By default 20 in geometric steps from the largest useful one of the largest rank
        (``max_weight_decay``; of ReLU networks its first value) to 0.01 of it.
    ranks : sequence of int, float or None, optional
        Values of the parameter ``rank``; the estimator's own by default.
    sample_weight : array-like (n,), optional
        Of the training rows.
    validation : (array-like, array-like), optional
        Rows to score each point on.
    checkpoint : path-like, optional
        File to replace in one step after each point. If it exists, the path resumes from it and ends with the same
        points, bit for bit with equal BLAS threads. ``random_state`` must be an integer.

    Returns
    -------
    RegularisationPath
        Iterator over ``PathPoint``; its ``points`` are the finished ones, whatever happens. A point that is not
        certified says so in its ``certificate``; there is no warning.

    Raises
    ------
    ValueError
        For parameters and data that the estimator refuses, and for a checkpoint of other data or settings.
    OSError
        Where the checkpoint cannot be written; at the start, before any work.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from convexbn import ConvexBNClassifier, fit_path
    >>> X, y = load_iris(return_X_y=True)
    >>> model = ConvexBNClassifier(n_gates=20, random_state=0)
    >>> path = fit_path(model, X[::2], y[::2], ranks=[2, 4], validation=(X[1::2], y[1::2]))
    >>> statuses = {point.certificate.status.value for point in path}
    >>> sorted(statuses), len(path.points), path.best.score > 0.9
    (['CERTIFIED', 'TRIVIAL'], 40, True)
    """
    model = with_seed(estimator)
    model._validate_params()
    if checkpoint is not None and not isinstance(estimator.random_state, (int, np.integer)):
        raise ValueError("a path with a checkpoint needs an integer random_state: the same draws when it is resumed.")
    grid_of_ranks = checked_values(model, "rank", ranks)
    with one_warning():
        data = PathData.prepare(model, grid_of_ranks, X, y, sample_weight)
    if validation is not None:
        if not (isinstance(validation, (tuple, list)) and len(validation) == 2):
            raise ValueError("validation must be a pair (X, y) of rows and targets.")
        data.model._encode_known(data.model._checked_data(*validation, None, reset=False)[1])
    given = None if weight_decays is None else checked_decays(weight_decays)
    file = None
    if checkpoint is not None:
        rows = {"X": X, "y": y, "sample_weight": sample_weight, "validation rows": validation}
        rows["feature names"] = data.labels.get("feature_names_in_")
        file = PathCheckpoint(checkpoint, question_of(model, given, grid_of_ranks, rows), KINDS)
    decays = given or (file and file.weight_decays) or default_decays(data.max_weight_decay())
    score = None if validation is None else (lambda fitted: float(fitted.score(*validation)))
    return RegularisationPath(model, data, decays, grid_of_ranks, score=score, checkpoint=file)


def load_path(file: str | os.PathLike[str]) -> list[PathPoint]:
    """Finished points of a checkpoint that ``fit_path`` wrote, in order.

    Raises
    ------
    FormatError
        When the file is damaged or not the checkpoint of a path.
    """
    return [PathPoint(model, score) for model, score in path_checkpoint.read(file, KINDS).points]


class RegularisationPath(Iterator[PathPoint]):
    """Iterator over the points of a path, solved lazily; made by ``fit_path``.

    Attributes
    ----------
    points : list of PathPoint
        The finished points. They survive exceptions, also Ctrl-C; ``next`` goes on from there.
    grid : list of (float, rank)
        Weight decay and rank of every point, in order.
    """

    def __init__(
        self,
        model: Any,
        data: PathData,
        weight_decays: Sequence[float],
        ranks: Ranks,
        *,
        score: Callable[[Any], float] | None = None,
        checkpoint: PathCheckpoint | None = None,
    ) -> None:
        self.grid = [
            (float(weight_decay), rank)
            for turn, rank in enumerate(ranks)
            for weight_decay in (weight_decays if turn % 2 == 0 else weight_decays[::-1])
        ]
        self._model, self._data, self._score, self._checkpoint = model, data, score, checkpoint
        self._weight_decays, self._given, self._written = weight_decays, 0, -1
        self.points = [PathPoint(*point) for point in checkpoint.points] if checkpoint is not None else []
        self._keep()

    def __len__(self) -> int:
        return len(self.grid)

    def __next__(self) -> PathPoint:
        if self._given == len(self.grid):
            raise StopIteration
        if self._given == len(self.points):
            self.points.append(self._solve(*self.grid[self._given]))
        self._keep()
        self._given += 1
        return self.points[self._given - 1]

    def follow(self, weight_decay: float, rank: int | float | None) -> PathPoint:
        """Solve one more point, at the end of the grid; an error leaves the path as it was."""
        self.grid.append((weight_decay, rank))
        try:
            return next(self)
        except BaseException:
            self.grid.pop()
            raise

    def _keep(self) -> None:
        """Write the finished points, if some are not written yet."""
        if self._checkpoint is not None and self._written < len(self.points):
            self._checkpoint.write([(point.model, point.score) for point in self.points], self._weight_decays)
            self._written = len(self.points)

    @property
    def best(self) -> PathPoint:
        """First finished point with the highest score; raises ValueError if no point has a score."""
        scores = np.array([point.score for point in self.points], dtype=np.float64)  # None becomes nan
        if np.isnan(scores).all():
            raise ValueError("no point has a score: give validation rows, and ask for at least one point.")
        return self.points[int(np.nanargmax(scores))]

    def in_grid_order(self) -> list[PathPoint]:
        """Finished points rank by rank, each over the weight decays in the given order."""
        n = len(self._weight_decays)
        lines = [self.points[start : start + n] for start in range(0, len(self.points), n)]
        return [point for turn, line in enumerate(lines) for point in (line if turn % 2 == 0 else line[::-1])]

    def _solve(self, weight_decay: float, rank: int | float | None) -> PathPoint:
        """Solve a point from those near it; training rows and gates are kept while the rank stays."""
        model = unfitted(self._model, weight_decay=weight_decay, rank=rank)
        data, drawn = self._data.drawn(model)
        start = None
        with suppress(np.linalg.LinAlgError):  # a start that cannot be computed is none
            start = start_of(data, model, self._former(model))
        fitted = model._train(data, Budget(model.time_limit, model.callback), start, drawn)
        model.__dict__ |= fitted | self._data.labels
        return PathPoint(model, None if self._score is None else self._score(model))

    def _former(self, model: Any) -> list[Any]:
        """The two models of nearest weight decay at this rank, the nearest last, or one of another rank."""
        models = [point.model for point in self.points]
        models.sort(key=lambda other: -abs(np.log(other.weight_decay / model.weight_decay)))
        same = [other for other in models if (type(other.rank), other.rank) == (type(model.rank), model.rank)]
        return same[-2:] or models[-1:]
