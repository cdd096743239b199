"""Training rows of a path, whitened once for all ranks and filters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convexbn._threads import blas_threads
from convexbn.estimators.path_grid import Ranks, unfitted
from convexbn.training.training_set import TrainingSet
from convexbn.training.warm_start import draws_whitened


@dataclass(frozen=True, eq=False)
class PathData:
    """Training rows of paths, at several ranks and spectral filters.

    Attributes
    ----------
    largest, model : TrainingSet, estimator
        Rows at the largest of the ranks, with the filter if there is only one, and the estimator of both.
    alone : dict of (rank, spectral filter) to TrainingSet
        Training sets that do not take their directions from ``largest``.
    labels : dict
        Fitted attributes that all points share.
    """

    largest: TrainingSet
    model: Any
    alone: dict[Any, TrainingSet]
    labels: dict[str, Any]
    _drawn: dict[Any, tuple[TrainingSet, Any]] = field(default_factory=dict, init=False)  # the last alone

    @classmethod
    def prepare(
        cls, model: Any, ranks: Ranks, X: Any, y: Any, sample_weight: Any, spectral_filters: Sequence[float | None] = ()
    ) -> PathData:
        """Check the rows and whiten them once.

        Whitened gates for all directions without a filter do not depend on the units of the columns. If they are drawn,
        and gates for fewer directions as well, the rows are whitened twice.

        Parameters
        ----------
        model : estimator
        ranks, spectral_filters : sequence
            All values of these parameters; without filters the estimator's own.
        X, y, sample_weight : array-like
        """
        given = list(spectral_filters) or [model.spectral_filter]
        filters = [unfitted(model, spectral_filter=value)._tau for value in given]
        one_filter = filters[0] if len(filters) == 1 else None
        single = len(ranks) * len(filters) == 1
        rank = ranks[0] if single else int(np.prod(np.shape(X)[1:]))
        if not single and {type(r) for r in ranks} in ({int}, {float}):
            rank = max(r for r in ranks if r is not None)
        model = unfitted(model, rank=rank, spectral_filter=one_filter)
        largest, labels = model._prepare(X, y, sample_weight)
        alone = {(rank, one_filter): largest} if single else {}
        if not single and None in ranks and None in filters and draws_whitened(model):
            alone[None, None] = unfitted(model, rank=None, spectral_filter=None)._prepare(X, y, sample_weight)[0]
        labels |= {k: value for k, value in vars(model).items() if k in ("n_features_in_", "feature_names_in_")}
        vars(model).update(labels, convolution=largest.convolution)  # to check validation rows against
        return cls(largest, model, alone, labels)

    def drawn(self, model: Any) -> tuple[TrainingSet, Any]:
        """Training set and gates of an estimator, drawn once as long as its rank, filter and number of gates stay."""
        key = type(model.rank), model.rank, model.spectral_filter, model.n_gates  # 1 is a direction, 1.0 all variance
        if key not in self._drawn:
            data = self.at(model)
            self._drawn.clear()
            self._drawn[key] = data, None if model.activation == "relu" else model._draw_gates(data)
        return self._drawn[key]

    def max_weight_decay(self) -> float:
        """Largest useful weight decay at the largest rank, of ReLU networks an estimate."""
        data, drawn = self.drawn(self.model)
        with blas_threads(len(data.X)):
            return float(data.max_weight_decay_relu(proved=False)[0] if drawn is None else drawn[2].max_weight_decay())

    def at(self, model: Any) -> TrainingSet:
        """Training set at the rank and the spectral filter of an estimator."""
        if (key := (model.rank, model._tau)) in self.alone:
            return self.alone[key]
        known = model._tau == self.model._tau
        return self.largest.leading(model.rank, None if known else model._tau)
