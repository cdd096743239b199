"""Training rows of a path: whitened once, at every rank and with every filter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convexbn.estimators.path_grid import unfitted
from convexbn.training.training_set import TrainingSet
from convexbn.training.warm_start import draws_whitened


@dataclass(frozen=True, eq=False)
class PathData:
    """Training rows of paths, at several ranks and spectral filters.

    Attributes
    ----------
    largest : TrainingSet
        At the largest of the ranks, and with the filter if there is only one.
    model : estimator
        What ``largest`` was made for.
    alone : dict of (rank, spectral filter) to TrainingSet
        Those that do not take their directions from the largest.
    labels : dict
        Fitted attributes that are the same for every point.
    """

    largest: TrainingSet
    model: Any
    alone: dict[Any, TrainingSet]
    labels: dict[str, Any]

    @classmethod
    def prepare(
        cls,
        model: Any,
        ranks: Sequence[int | float | None],
        X: Any,
        y: Any,
        sample_weight: Any,
        spectral_filters: Sequence[float | None] = (),
    ) -> PathData:
        """Check the rows and whiten them once.

        Twice where whitened gates are drawn for all directions without a filter, and for fewer besides: those do not
        depend on the units of the columns.
        """
        filters = list(spectral_filters) or [model.spectral_filter]
        one_filter = filters[0] if len(filters) == 1 else None
        single = len(ranks) * len(filters) == 1
        rank = _largest(ranks, int(np.prod(np.shape(X)[1:]))) if not single else ranks[0]
        model = unfitted(model, rank=rank, spectral_filter=one_filter)
        largest, labels = model._prepared(X, y, sample_weight)
        alone = {(rank, one_filter): largest} if single else {}
        if not single and None in ranks and None in filters and draws_whitened(model):
            plain = unfitted(model, rank=None, spectral_filter=None)
            alone[None, None] = plain._prepared(X, y, sample_weight)[0]
        columns = ("n_features_in_", "feature_names_in_")
        labels |= {name: value for name, value in vars(model).items() if name in columns}
        vars(model).update(labels, convolution=largest.convolution)  # what validation rows are checked against
        return cls(largest, model, alone, labels)

    def at(self, model: Any) -> TrainingSet:
        """The rows at the rank and the spectral filter of an estimator."""
        key = (model.rank, model.spectral_filter)
        if key in self.alone:
            return self.alone[key]
        known = model.spectral_filter == self.model.spectral_filter
        return self.largest.leading(model.rank, None if known else model.spectral_filter)


def _largest(ranks: Sequence[int | float | None], d: int) -> int | float | None:
    """A rank that holds all others, with directions in order."""
    for kind in (int, float):
        if all(isinstance(rank, kind) for rank in ranks):
            return max(rank for rank in ranks if rank is not None)
    return d
