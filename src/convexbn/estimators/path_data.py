"""Training rows of a path, whitened once for all ranks and filters."""

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
        The estimator of ``largest``.
    alone : dict of (rank, spectral filter) to TrainingSet
        Training sets that do not take their directions from ``largest``.
    labels : dict
        Fitted attributes that all points share.
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

        Twice if whitened gates are drawn for all directions without a filter, which do not depend on the units of the
        columns, and also for fewer directions.

        Parameters
        ----------
        model : estimator
            Not fitted.
        ranks, spectral_filters : sequence
            All values of these parameters; without filters the estimator's own.
        X, y, sample_weight : array-like
        """
        filters = list(spectral_filters) or [model.spectral_filter]
        one_filter = filters[0] if len(filters) == 1 else None
        single = len(ranks) * len(filters) == 1
        rank = ranks[0] if single else _largest(ranks, int(np.prod(np.shape(X)[1:])))
        model = unfitted(model, rank=rank, spectral_filter=one_filter)
        largest, labels = model._prepared(X, y, sample_weight)
        alone = {(rank, one_filter): largest} if single else {}
        if not single and None in ranks and None in filters and draws_whitened(model):
            alone[None, None] = unfitted(model, rank=None, spectral_filter=None)._prepared(X, y, sample_weight)[0]
        columns = ("n_features_in_", "feature_names_in_")
        labels |= {name: value for name, value in vars(model).items() if name in columns}
        vars(model).update(labels, convolution=largest.convolution)  # to check validation rows against
        return cls(largest, model, alone, labels)

    def at(self, model: Any) -> TrainingSet:
        """Training set at the rank and the spectral filter of an estimator."""
        if (key := (model.rank, model.spectral_filter)) in self.alone:
            return self.alone[key]
        known = model.spectral_filter == self.model.spectral_filter
        return self.largest.leading(model.rank, None if known else model.spectral_filter)


def _largest(ranks: Sequence[int | float | None], d: int) -> int | float | None:
    """A rank whose directions, in order, include those of all ranks."""
    for kind in (int, float):
        if all(isinstance(rank, kind) for rank in ranks):
            return max(rank for rank in ranks if rank is not None)
    return d
