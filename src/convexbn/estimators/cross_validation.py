"""Cross-validated weight decay, rank, filter and number of gates: a whitening and paths on each fold, and a refit."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, ClassVar, Self

import numpy as np
import scipy.stats
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.metrics import check_scoring, get_scorer_names
from sklearn.model_selection import check_cv
from sklearn.utils import _safe_indexing, indexable
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from convexbn._types import Float
from convexbn.certificate.certificate import Certificate
from convexbn.estimators.classifier import ConvexBNClassifier
from convexbn.estimators.parameters import NetworkParameters, RegressionParameters, parameters
from convexbn.estimators.path import RegularisationPath
from convexbn.estimators.path_data import PathData
from convexbn.estimators.path_grid import Ranks, checked_decays, checked_values, default_decays, unfitted, with_seed
from convexbn.estimators.regressor import ConvexBNRegressor

#: Fitted attributes of the best estimator that the selection shows as its own.
_SHOWN = ["weight_decay_", "rank_", "certificate_", "network_", "n_iter_"]
_SHOWN += ["classes_", "n_features_in_", "feature_names_in_"]


@parameters
class _SelectionCV(NetworkParameters):
    """Base of the cross-validated estimators: candidates, folds, scores, and a fit of the best on all rows."""

    weight_decays: Sequence[float] | None = None
    ranks: Ranks | None = None
    spectral_filters: Sequence[float | None] | None = None
    n_gates: int | Sequence[int] = 100
    cv: Any = None
    scoring: str | Callable[..., float] | None = None
    n_jobs: int | None = None

    _estimator: ClassVar[Any]
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **NetworkParameters._parameter_constraints,
        "weight_decays": ["array-like", None],
        "ranks": ["array-like", None],
        "spectral_filters": ["array-like", None],
        "n_gates": [Interval(Integral, 1, None, closed="left"), "array-like"],
        "cv": ["cv_object"],
        "scoring": [StrOptions(set(get_scorer_names())), callable, None],
        "n_jobs": [Integral, None],
    }

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Score every candidate on every fold, and train the best on all rows.

        Parameters
        ----------
        X, y : array-like (n, d), (n,) or (n, K)
            Features, and labels or targets.
        sample_weight : array-like (n,), optional
            Weights of the rows, in training and in the scores.
        """
        from joblib import Parallel, delayed

        self._validate_params()
        settings, own = self._estimator().get_params(), self.get_params(deep=False)
        model = with_seed(self._estimator(**{name: own[name] for name in settings if name in own}))
        if not np.size(self.n_gates):
            raise ValueError("n_gates is empty: give a number, or several to choose from.")
        grid = {"n_gates": checked_values(model, "n_gates", np.atleast_1d(self.n_gates).tolist())}
        model.n_gates = max(grid["n_gates"])
        grid["spectral_filter"] = checked_values(model, "spectral_filter", self.spectral_filters)
        grid["rank"] = checked_values(model, "rank", self.ranks)
        if self.weight_decays is None:
            data = PathData.prepare(model, grid["rank"], X, y, sample_weight, grid["spectral_filter"])
            grid["weight_decay"] = default_decays(data.model, data.largest)
        else:
            model._checked_data(X, y, sample_weight, reset=True)
            grid["weight_decay"] = checked_decays(self.weight_decays)
        candidates = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        rows = indexable(X, y, sample_weight)
        folds = check_cv(self.cv, rows[1], classifier=isinstance(self, ClassifierMixin)).split(*rows[:2])
        scorer = check_scoring(model, self.scoring)
        found = Parallel(n_jobs=self.n_jobs)(delayed(_fold)(model, grid, rows, fold, scorer) for fold in folds)
        scores, gaps = np.array(found).transpose(2, 1, 0)  # (n_candidates, n_splits) each
        results = _results(candidates, scores, gaps)
        best = int(np.argmin(results["rank_test_score"]))
        fitted = model.set_params(**candidates[best]).fit(X, y, sample_weight)
        self.__dict__ |= {name: value for name, value in vars(fitted).items() if name in _SHOWN} | {
            "cv_results_": results, "best_index_": best, "best_params_": candidates[best], "best_estimator_": fitted,
            "best_score_": float(results["mean_test_score"][best]), "n_gates_": candidates[best]["n_gates"],
            "n_splits_": scores.shape[1],
        }  # fmt: skip
        return self

    def transform(self, X: Any) -> Float:
        """Hidden activations of the best estimator."""
        return self._best.transform(X)

    def predict(self, X: Any) -> Any:
        """Predictions of the best estimator."""
        return self._best.predict(X)

    def certify(self, X: Any, y: Any, sample_weight: Any = None) -> Certificate:
        """Judge the best estimator's network on its training rows or others, in the form that ``fit`` takes."""
        return self._best.certify(X, y, sample_weight)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the best estimator to a safetensors file; ``convexbn.load`` returns that estimator."""
        self._best.save(path)

    @property
    def _best(self) -> Any:
        check_is_fitted(self)
        return self.best_estimator_

    @property
    def _n_features_out(self) -> int:
        return int(self._best._n_features_out)


@parameters
class ConvexBNClassifierCV(ClassifierMixin, _SelectionCV):
    """``ConvexBNClassifier`` with weight decay, rank, filter and number of gates chosen by cross-validation.

    Each training fold is whitened once, and warm-started paths go over all candidates. The scores equal those of
    separate fits up to the certified gaps. The best candidate is fitted on all rows.

    Parameters
    ----------
    weight_decays : array-like or None, default=None
        Candidates. None: 20 in geometric steps from the largest useful weight decay on all rows to 0.01 of it.
    ranks : array-like or None, default=None
        Candidates of ``rank``, such as ``[25, 50, 100, None]``. None: all directions.
    spectral_filters : array-like or None, default=None
        Candidates of ``spectral_filter``, such as ``[None, 0.03, 0.1, 0.3]``. None: no filter.
    n_gates : int or array-like of int, default=100
        Number of gates, or candidates.
    activation, loss, gates, width, n_starts, convolution, solver, tol, max_iter, time_limit, proof_time, random_state
        As in :class:`ConvexBNClassifier`; ``time_limit`` is for each fit. The draws are the same in all folds.
    cv : int, splitter, iterable of (train, test) or None, default=None
        As in scikit-learn; None is 5 folds. ``ShuffleSplit(1)`` or ``PredefinedSplit`` hold one set of rows out.
    scoring : str, callable or None, default=None
        As in scikit-learn; None is the estimator's ``score``.
    n_jobs : int or None, default=None
        Number of folds to run at once, by joblib.

    Attributes
    ----------
    cv_results_ : dict of arrays
        As in ``GridSearchCV``: ``params``, ``param_*``, ``split*_test_score``, ``mean_test_score``,
        ``std_test_score``, ``rank_test_score``; and ``max_relative_gap``, the largest certified gap over the folds.
    best_estimator_ : ConvexBNClassifier
        Fitted on all rows; the methods of this class call its methods.
    best_params_, best_score_, best_index_, n_splits_
        The first candidate of the best mean score, and the number of folds.
    weight_decay_, rank_, n_gates_, certificate_, network_, n_iter_, classes_
        Of ``best_estimator_``.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> model = ConvexBNClassifierCV(weight_decays=[10, 1, 0.1], ranks=[2, 4], n_gates=20, random_state=0).fit(X, y)
    >>> model.best_score_ > 0.95, model.certificate_.status.value
    (True, 'CERTIFIED')
    """

    _estimator = ConvexBNClassifier
    _task: ClassVar[str] = "classification"

    def decision_function(self, X: Any) -> Float:
        """Raw outputs of the best estimator: (n,) for two classes, else (n, n_classes)."""
        return self._best.decision_function(X)

    def predict_proba(self, X: Any) -> Float:
        """Class probabilities of the best estimator (n, n_classes)."""
        return self._best.predict_proba(X)


@parameters
class ConvexBNRegressorCV(RegressorMixin, RegressionParameters, _SelectionCV):
    """``ConvexBNRegressor`` with weight decay, rank, filter and number of gates chosen by cross-validation.

    Parameters
    ----------
    weight_decays, ranks, spectral_filters, n_gates, activation, gates, width, n_starts, convolution, solver
        As in :class:`ConvexBNClassifierCV`.
    loss, huber_delta
        As in :class:`ConvexBNRegressor`.
    tol, max_iter, time_limit, proof_time, random_state, cv, scoring, n_jobs
        As in :class:`ConvexBNClassifierCV`.

    Attributes
    ----------
    cv_results_, best_estimator_, best_params_, best_score_, best_index_, n_splits_
        As in :class:`ConvexBNClassifierCV`.
    weight_decay_, rank_, n_gates_, certificate_, network_, n_iter_
        Of ``best_estimator_``.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = ConvexBNRegressorCV(weight_decays=[500, 200], n_gates=[10, 20], random_state=0).fit(X, y - y.mean())
    >>> model.cv_results_["mean_test_score"].shape, model.best_score_ > 0.4
    ((4,), True)
    """

    _estimator = ConvexBNRegressor


def _fold(
    model: Any, grid: dict[str, list[Any]], rows: Sequence[Any], fold: Sequence[Any], scorer: Callable[..., float]
) -> list[tuple[float | None, float]]:
    """Score on the test rows and certified gap on the training rows, for every candidate."""
    parts = ([None if a is None else _safe_indexing(a, part) for a in rows] for part in fold)
    (X, y, sample_weight), (X_test, y_test, test_weight) = parts
    weighted = {} if test_weight is None else {"sample_weight": test_weight}
    data = PathData.prepare(model, grid["rank"], X, y, sample_weight, grid["spectral_filter"])
    found = []
    for n_gates, spectral_filter in itertools.product(grid["n_gates"], grid["spectral_filter"]):
        path = RegularisationPath(
            unfitted(model, n_gates=n_gates, spectral_filter=spectral_filter),
            data, grid["weight_decay"], grid["rank"],
            score=lambda fitted: float(scorer(fitted, X_test, y_test, **weighted)),
        )  # fmt: skip
        for _ in path:
            pass
        found += [(point.score, point.certificate.relative_gap) for point in path.in_grid_order()]
    return found


def _results(candidates: list[dict[str, Any]], scores: Float, gaps: Float) -> dict[str, Any]:
    """Results as in ``GridSearchCV``; NaN ranks last."""
    mean = scores.mean(axis=1)
    return {
        **{f"param_{name}": _column([candidate[name] for candidate in candidates]) for name in candidates[0]},
        "params": candidates,
        **{f"split{i}_test_score": column for i, column in enumerate(scores.T)},
        "mean_test_score": mean,
        "std_test_score": scores.std(axis=1),
        "rank_test_score": scipy.stats.rankdata(-np.nan_to_num(mean, nan=-np.inf), method="min").astype(int),
        "max_relative_gap": gaps.max(axis=1),
    }


def _column(values: list[Any]) -> np.ma.MaskedArray:
    """Values of one parameter as a masked array, of objects if there are several types."""
    kinds = {type(value) for value in values}
    return np.ma.MaskedArray(np.array(values, dtype=kinds.pop() if len(kinds) == 1 else object))
