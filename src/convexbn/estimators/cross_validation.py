"""Cross-validated weight decay, rank, filter and number of gates: a whitening and paths on each fold, and a refit."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, ClassVar, Self

import numpy as np
import scipy.stats
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.exceptions import FitFailedWarning
from sklearn.metrics import check_scoring, get_scorer_names
from sklearn.model_selection import check_cv
from sklearn.utils import indexable
from sklearn.utils._metadata_requests import _routing_enabled
from sklearn.utils._param_validation import Interval
from sklearn.utils.metadata_routing import MetadataRouter, MethodMapping, process_routing
from sklearn.utils.validation import _check_method_params, check_is_fitted

from convexbn._types import Float
from convexbn.certificate.certificate import Certificate
from convexbn.data.warn import one_warning, warn
from convexbn.estimators.classifier import ConvexBNClassifier
from convexbn.estimators.fold import Fold
from convexbn.estimators.parameters import (
    Choices,
    ClassificationParameters,
    NetworkParameters,
    RegressionParameters,
    parameters,
)
from convexbn.estimators.path import RegularisationPath
from convexbn.estimators.path_data import PathData
from convexbn.estimators.path_grid import Ranks, checked_decays, checked_values, default_decays, unfitted, with_seed
from convexbn.estimators.plain_values import ScoreOfPlainTargets, plain_targets
from convexbn.estimators.regressor import ConvexBNRegressor
from convexbn.estimators.selection import FoldScores, SelectionProgress, reporter
from convexbn.estimators.validation import refuse_containers

#: Relative gap to which a search solves on the folds; the best candidate has the estimator's own.
_SEARCH_TOL = 1e-2

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
    verbose: int = 0
    callback: Callable[[SelectionProgress], object] | None = None

    _estimator: ClassVar[Any]
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **NetworkParameters._parameter_constraints,
        "weight_decays": ["array-like", None],
        "ranks": ["array-like", None],
        "spectral_filters": ["array-like", None],
        "n_gates": [Interval(Integral, 1, None, closed="left"), "array-like"],
        "cv": ["cv_object"],
        "scoring": [Choices(set(get_scorer_names())), callable, None],
        "n_jobs": [Integral, None],
        "verbose": ["verbose"],
        "callback": [callable, None],
    }

    def fit(self, X: Any, y: Any, sample_weight: Any = None, **params: Any) -> Self:
        """Score candidates on every fold, and train the best on all rows.

        A fold without any score that is a number is left out; a candidate that lacks one on another fold is not chosen.
        One warning names them with the reason.

        Parameters
        ----------
        X, y : array-like (n, d), (n,) or (n, K)
            Features, and labels or targets.
        sample_weight : array-like (n,), optional
            Weights of the rows, in training and in the scores, if the scorer takes weights.
        **params : array-like (n,)
            ``groups`` for the splitter; with scikit-learn's metadata routing whatever splitter and scorer request.

        Raises
        ------
        ValueError
            For parameters and data that are refused, and if no candidate has a score that is a number on any fold.
        """
        self._validate_params()
        refuse_containers("y", y)
        y = plain_targets(y, numeric=self._task == "regression")
        with one_warning():
            model, grid, data = self._candidates(X, y, sample_weight)
            candidates = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
            folds = self._folds(model, grid, (X, y, sample_weight), params)
            with reporter(self.callback, verbose=bool(self.verbose)) as report:
                found = FoldScores(candidates, folds, len(grid["weight_decay"]), self.n_jobs, report)
                found.run(search=self.weight_decays is None)
            _check_scores(found)
            results = _results(candidates, found)
            best = int(np.argmin(results["rank_test_score"]))
            fitted = unfitted(model, **candidates[best])
            if data is None or len(candidates) > len(grid["weight_decay"]):
                fitted.fit(X, y, sample_weight)
            else:  # whitened, and gates drawn, for the grid
                fitted = RegularisationPath(fitted, data, [], []).follow(fitted.weight_decay, fitted.rank).model
                fitted._warn_if_open()
        self.__dict__ |= {name: value for name, value in vars(fitted).items() if name in _SHOWN} | {
            "cv_results_": results, "best_index_": best, "best_params_": candidates[best], "best_estimator_": fitted,
            "best_score_": float(results["mean_test_score"][best]), "n_gates_": candidates[best]["n_gates"],
            "n_splits_": len(folds), "failures_": found.failures,
        }  # fmt: skip
        return self

    def _candidates(self, X: Any, y: Any, sample_weight: Any) -> tuple[Any, dict[str, list[Any]], PathData | None]:
        """An unfitted estimator, the values of the parameters to choose, and the rows if they were whitened for it."""
        settings, own = self._estimator().get_params(), self.get_params(deep=False)
        own["callback"] = None  # the selection's own
        model = with_seed(self._estimator(**{name: own[name] for name in settings if name in own}))
        if not np.size(self.n_gates):
            raise ValueError("n_gates is empty: give a number, or several to choose from.")
        grid = {"n_gates": checked_values(model, "n_gates", np.atleast_1d(self.n_gates).tolist())}
        model.n_gates = max(grid["n_gates"])
        grid["spectral_filter"] = checked_values(model, "spectral_filter", self.spectral_filters)
        grid["rank"] = checked_values(model, "rank", self.ranks)
        data = None
        if self.weight_decays is None:
            data = PathData.prepare(model, grid["rank"], X, y, sample_weight, grid["spectral_filter"])
            grid["weight_decay"] = default_decays(data.max_weight_decay())
        else:
            model._checked_data(X, y, sample_weight, reset=True)
            grid["weight_decay"] = checked_decays(self.weight_decays)
        return model, grid, data

    def _folds(
        self, model: Any, grid: dict[str, list[Any]], rows: tuple[Any, Any, Any], params: dict[str, Any]
    ) -> list[Fold]:
        """Folds of the splitter, with what it and the scorer request."""
        X, y, sample_weight = rows = tuple(indexable(*rows))
        scorer = self._scorer()
        if _routing_enabled():
            routed = process_routing(self, "fit", sample_weight=sample_weight, **params)
            split, score = routed.splitter.split, routed.scorer.score
        elif unknown := set(params) - {"groups"}:
            raise TypeError(
                f"fit() got an unexpected keyword argument {min(unknown)!r}: enable metadata routing for it."
            )
        else:
            split = {"groups": _plain(params.get("groups"))}
            score = {} if sample_weight is None or not _takes_weights(scorer) else {"sample_weight": sample_weight}
        if self.weight_decays is None:
            model = unfitted(model, tol=max(model.tol, _SEARCH_TOL))
        cv, classifier = self.cv, isinstance(self, ClassifierMixin)
        if cv is None and classifier:  # not more folds than rows of the largest class
            cv = min(5, int(np.unique(np.asarray(y), return_counts=True)[1].max()))
        splits = check_cv(cv, y, classifier=classifier).split(X, y, **split)
        return [
            Fold(model, grid, rows, train, test, scorer, _check_method_params(X, params=score, indices=test))
            for train, test in splits
        ]

    def _scorer(self) -> Callable[..., float]:
        """Scorer of the parameter ``scoring``; by default that of the estimator's ``score``."""
        default = "accuracy" if self._task == "classification" else "r2"
        return check_scoring(self._estimator(), self.scoring or default)

    def get_metadata_routing(self) -> Any:
        """Router of scikit-learn's metadata: ``fit`` passes to the splitter and to the scorer what they request."""
        router = MetadataRouter(owner=self).add_self_request(self)
        router.add(splitter=self.cv, method_mapping=MethodMapping().add(caller="fit", callee="split"))
        return router.add(scorer=self._scorer(), method_mapping=MethodMapping().add(caller="fit", callee="score"))

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
    def feature_importances_(self) -> Float:
        """Shares of the features in the outputs of the best estimator: (d,)."""
        return self._best.feature_importances_

    @property
    def _best(self) -> Any:
        check_is_fitted(self)
        return self.best_estimator_

    @property
    def _n_features_out(self) -> int:
        return int(self._best._n_features_out)


@parameters
class ConvexBNClassifierCV(ScoreOfPlainTargets, ClassifierMixin, ClassificationParameters, _SelectionCV):
    """``ConvexBNClassifier`` with weight decay, rank, filter and number of gates chosen by cross-validation.

    Each training fold is whitened once, and warm-started paths go over the candidates. The scores equal those of
    separate fits up to the certified gaps. The best candidate is fitted on all rows.

    Parameters
    ----------
    weight_decays : array-like or None, default=None
        Candidates, all scored. None: 20 in geometric steps from the largest useful weight decay on all rows to 0.01 of
        it, of which a search scores a few, on folds solved to a relative gap of 1e-2 (or ``tol``, if larger).
    ranks : array-like or None, default=None
        Candidates of ``rank``, such as ``[25, 50, 100, None]``. None: all directions.
    spectral_filters : array-like or None, default=None
        Candidates of ``spectral_filter``, such as ``[None, 0.03, 0.1, 0.3]``. None: no filter.
    n_gates : int or array-like of int, default=100
        Number of gates, or candidates.
    activation, loss, gates, width, n_starts, convolution, solver, class_weight
        As in :class:`ConvexBNClassifier`. The weights of classes do not enter the scores; see ``scoring``.
    tol, max_iter, time_limit, proof_time, random_state
        As in :class:`ConvexBNClassifier`; ``time_limit`` is for each fit. The draws are the same in all folds.
    cv : int, splitter, iterable of (train, test) or None, default=None
        As in scikit-learn; None is 5 folds, or fewer if no class has so many rows. ``ShuffleSplit(1)`` or
        ``PredefinedSplit`` hold one set of rows out.
    scoring : str, callable or None, default=None
        As in scikit-learn; None is the estimator's ``score``.
    n_jobs : int or None, default=None
        Number of folds to run at once, by joblib.
    verbose : int, default=0
        Whether to show the count of fits and the time left on standard error: a bar on a terminal, else a line a second
        at most. Workers of joblib are silent.
    callback : callable or None, default=None
        Called after each fit of a fold with a ``SelectionProgress``: ``finished``, ``total`` (at most), ``seconds``,
        ``seconds_left`` and ``best_score``.

    Attributes
    ----------
    cv_results_ : dict of arrays
        As in ``GridSearchCV``: ``params``, ``param_*``, ``split*_test_score``, ``mean_test_score``,
        ``std_test_score``, ``rank_test_score``; and ``max_relative_gap``, the largest certified gap over the folds.
        Of candidates without a score all are NaN, and they rank last.
    failures_ : list of str
        Folds and candidates that failed, and why. Means are over the folds that have scores.
    best_estimator_ : ConvexBNClassifier
        Fitted on all rows; the methods of this class call its methods.
    best_params_, best_score_, best_index_, n_splits_
        The first candidate of the best mean score, and the number of folds.
    weight_decay_, rank_, n_gates_, certificate_, network_, n_iter_, feature_importances_, classes_
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

    def decision_function(self, X: Any) -> Float:
        """Raw outputs of the best estimator: (n,) for two classes, else (n, n_classes)."""
        return self._best.decision_function(X)

    def predict_proba(self, X: Any) -> Float:
        """Class probabilities of the best estimator (n, n_classes)."""
        return self._best.predict_proba(X)


@parameters
class ConvexBNRegressorCV(ScoreOfPlainTargets, RegressorMixin, RegressionParameters, _SelectionCV):
    """``ConvexBNRegressor`` with weight decay, rank, filter and number of gates chosen by cross-validation.

    Parameters
    ----------
    weight_decays, ranks, spectral_filters, n_gates, activation, gates, width, n_starts, convolution, solver
        As in :class:`ConvexBNClassifierCV`.
    loss, huber_delta
        As in :class:`ConvexBNRegressor`.
    tol, max_iter, time_limit, proof_time, random_state, cv, scoring, n_jobs
        As in :class:`ConvexBNClassifierCV`.
    verbose, callback
        As in :class:`ConvexBNClassifierCV`.

    Attributes
    ----------
    cv_results_, failures_, best_estimator_, best_params_, best_score_, best_index_, n_splits_
        As in :class:`ConvexBNClassifierCV`.
    weight_decay_, rank_, n_gates_, certificate_, network_, n_iter_, feature_importances_
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


def _check_scores(found: FoldScores) -> None:
    """Warn of folds and candidates without a score; a ValueError if there is none at all."""
    if not found.scored.any():
        raise ValueError(
            f"no candidate has a score that is a number on any fold ({found.failures[0].rstrip('.')}): "
            "give other folds in cv, or another scoring."
        )
    if found.failures:
        more = f"; {len(found.failures) - 3} more are in failures_" if len(found.failures) > 3 else ""
        told = "; ".join(failure.rstrip(".") for failure in found.failures[:3])
        warn(f"without a score: {told}{more}.", FitFailedWarning)


def _results(candidates: list[dict[str, Any]], found: FoldScores) -> dict[str, Any]:
    """Results as in ``GridSearchCV``; NaN ranks last."""
    kept, means = found.scores[:, found.scored], found.means
    return {
        **{f"param_{name}": _column([candidate[name] for candidate in candidates]) for name in candidates[0]},
        "params": candidates,
        **{f"split{i}_test_score": column for i, column in enumerate(found.scores.T)},
        "mean_test_score": means,
        "std_test_score": kept.std(axis=1),
        "rank_test_score": scipy.stats.rankdata(-np.nan_to_num(means, nan=-np.inf), method="min").astype(int),
        "max_relative_gap": found.gaps[:, found.scored].max(axis=1),
    }


def _plain(array: Any) -> Any:
    """An array of numpy from arrays of other libraries, such as pandas' extension arrays, that are no series."""
    return np.asarray(array) if hasattr(array, "dtype") and not hasattr(array, "iloc") else array


def _takes_weights(scorer: Any) -> bool:
    """Whether a scorer has use for sample weights."""
    if hasattr(scorer, "_accept_sample_weight"):
        return bool(scorer._accept_sample_weight())
    return "sample_weight" in inspect.signature(scorer).parameters


def _column(values: list[Any]) -> np.ma.MaskedArray:
    """Values of one parameter as a masked array, of objects if there are several types."""
    kinds = {type(value) for value in values}
    return np.ma.MaskedArray(np.array(values, dtype=kinds.pop() if len(kinds) == 1 else object))
