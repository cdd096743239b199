"""Cross-validation: the scores of a plain loop over fits, without leakage, in scikit-learn's manners."""

import warnings

import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, FitFailedWarning, NotFittedError
from sklearn.metrics import get_scorer
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    KFold,
    LeaveOneOut,
    PredefinedSplit,
    ShuffleSplit,
    StratifiedKFold,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler

from convexbn import (
    ConvexBNClassifier,
    ConvexBNClassifierCV,
    ConvexBNRegressor,
    ConvexBNRegressorCV,
    Convolution,
    load,
    max_weight_decay,
)
from convexbn.estimators import cross_validation
from convexbn.estimators.path import RegularisationPath
from convexbn.training import training_set

RNG = np.random.default_rng(8)
X = RNG.standard_normal((90, 6)) @ RNG.standard_normal((6, 6)) + 3
Y = np.tanh(X[:, 0]) + 0.1 * X[:, 1] ** 2 - 1 + 0.2 * RNG.standard_normal(90)
LABELS = np.array(["low", "mid", "top"])[np.searchsorted(np.quantile(Y, [0.3, 0.6]), Y)]
GRID = {"n_gates": [10, 20], "rank": [2, 0.9, None], "weight_decay": [5.0, 0.5]}


def loop(estimator, X, y, folds, grid=GRID, score=lambda model, X, y: model.score(X, y)):
    """Scores of separate fits, (n_candidates, n_splits), in the order of ``itertools.product``."""
    scores = []
    for n_gates in grid["n_gates"]:
        for rank in grid["rank"]:
            for weight_decay in grid["weight_decay"]:
                model = clone(estimator).set_params(n_gates=n_gates, rank=rank, weight_decay=weight_decay)
                scores.append([score(model.fit(X[train], y[train]), X[test], y[test]) for train, test in folds])
    return np.array(scores)


def settings(**changes):
    named = {"n_gates": GRID["n_gates"], "ranks": GRID["rank"], "weight_decays": GRID["weight_decay"]}
    return {**named, "random_state": 0, **changes}


def splits(model):
    return np.column_stack([model.cv_results_[f"split{i}_test_score"] for i in range(model.n_splits_)])


def test_the_delta_of_the_huber_loss_reaches_the_estimator():
    grid = {"weight_decays": [0.5], "ranks": [2], "n_gates": 10, "cv": 2, "random_state": 0}
    model = ConvexBNRegressorCV(loss="huber", huber_delta=0.2, **grid).fit(X, Y)
    assert model.best_estimator_.get_params()["huber_delta"] == 0.2
    assert clone(model).huber_delta == 0.2 and "huber_delta" not in ConvexBNClassifierCV().get_params()


# -- equal to a plain loop over fits --


@pytest.mark.parametrize("gates", ["data", "whitened"])
def test_scores_of_a_classifier_equal_a_plain_loop(gates):
    model = ConvexBNClassifierCV(**settings(gates=gates, cv=3)).fit(X, LABELS)
    folds = list(StratifiedKFold(3).split(X, LABELS))
    expected = loop(ConvexBNClassifier(gates=gates, random_state=0), X, LABELS, folds)
    assert np.array_equal(splits(model), expected)
    best = int(np.argmax(expected.mean(axis=1)))
    assert model.best_index_ == best and model.best_score_ == expected.mean(axis=1)[best]


def test_scores_of_a_regressor_equal_a_plain_loop_within_the_gaps():
    folds = list(KFold(4, shuffle=True, random_state=0).split(X))
    targets = np.column_stack([Y, X[:, 1]])
    with joblib.parallel_config("threading"):
        model = ConvexBNRegressorCV(**settings(tol=1e-8, cv=folds, n_jobs=2)).fit(X, targets)
    expected = loop(ConvexBNRegressor(tol=1e-8, random_state=0), X, targets, folds)
    assert np.allclose(splits(model), expected, rtol=0, atol=1e-3)


def test_scores_of_a_convolution_equal_a_plain_loop():
    layer, images = Convolution(kernel_size=3, regions=2), X[:, :, None]  # 90 signals of length 6
    grid = {"n_gates": [5], "rank": [2, None], "weight_decay": [5.0, 0.5]}
    model = ConvexBNRegressorCV(
        convolution=layer, weight_decays=[5.0, 0.5], ranks=[2, None], n_gates=5, random_state=0, tol=1e-8, cv=3
    ).fit(images, Y)
    folds = list(KFold(3).split(images))
    expected = loop(ConvexBNRegressor(convolution=layer, tol=1e-8, random_state=0), images, Y, folds, grid)
    assert np.allclose(splits(model), expected, rtol=0, atol=1e-3)
    assert model.transform(images).shape[1] == len(model.get_feature_names_out())
    assert np.all(model.cv_results_["max_relative_gap"] <= 1e-8)


@pytest.mark.parametrize("gates", ["data", "whitened"])
def test_filters_are_candidates_too(gates):
    filters, folds = [None, 0.1, 1.0], list(StratifiedKFold(2).split(X, LABELS))
    grid = {"ranks": [3, None], "weight_decays": [2.0], "n_gates": 15, "spectral_filters": filters, "gates": gates}
    model = ConvexBNClassifierCV(**settings(cv=folds, **grid)).fit(X, LABELS)
    assert model.cv_results_["param_spectral_filter"].tolist() == [None, None, 0.1, 0.1, 1.0, 1.0]
    part = {"n_gates": [15], "rank": [3, None], "weight_decay": [2.0]}
    plain = [ConvexBNClassifier(gates=gates, spectral_filter=tau, random_state=0) for tau in filters]
    expected = np.vstack([loop(estimator, X, LABELS, folds, part) for estimator in plain])
    assert np.array_equal(splits(model), expected) and len(np.unique(expected.mean(axis=1))) > 2


def test_scores_of_relu_networks_by_formula_equal_a_plain_loop():
    wide, labels = RNG.standard_normal((24, 30)), np.arange(24) % 3
    folds, grid = list(StratifiedKFold(3).split(wide, labels)), {**GRID, "n_gates": [5], "rank": [None]}
    model = ConvexBNClassifierCV(
        activation="relu", weight_decays=grid["weight_decay"], n_gates=5, cv=folds, random_state=0
    ).fit(wide, labels)
    estimator = ConvexBNClassifier(activation="relu", random_state=0)
    assert np.array_equal(splits(model), loop(estimator, wide, labels, folds, grid))


def test_the_refit_is_a_fit_on_all_rows():
    model = ConvexBNClassifierCV(**settings(cv=3)).fit(X, LABELS)
    alone = ConvexBNClassifier(random_state=0, **model.best_params_).fit(X, LABELS)
    assert np.array_equal(model.network_.weight, alone.network_.weight) and model.certificate_ == alone.certificate_
    for name in ("predict", "predict_proba", "decision_function", "transform"):
        assert np.array_equal(getattr(model, name)(X), getattr(alone, name)(X)), name
    assert (model.weight_decay_, model.rank_) == (alone.weight_decay_, alone.rank_)
    assert model.n_gates_ == model.best_params_["n_gates"] and model.classes_.tolist() == ["low", "mid", "top"]
    assert model.certify(X, LABELS).status == "CERTIFIED" and model.score(X, LABELS) == alone.score(X, LABELS)


def test_a_test_fold_does_not_reach_its_training():
    """Rows of one fold are moved far away: scores of that fold change, and of no fit without them."""
    split = PredefinedSplit([0] * 30 + [-1] * 60)
    far = np.where(np.arange(90)[:, None] < 30, 1e6, 1) * X
    one, other = (
        ConvexBNRegressorCV(**settings(cv=split, scoring=lambda model, X, y: model.network_.output.sum())).fit(rows, Y)
        for rows in (X, far)
    )
    assert np.array_equal(splits(one), splits(other)) and one.n_splits_ == 1


def test_one_whitening_a_fold(monkeypatch):
    calls, whiten = [], training_set.whiten
    monkeypatch.setattr(training_set, "whiten", lambda *args, **options: calls.append(1) or whiten(*args, **options))
    model = ConvexBNClassifierCV(**settings(cv=3)).fit(X, LABELS)
    assert len(calls) == 3 + 1 and len(model.cv_results_["params"]) == 12  # the last for the fit on all rows


# -- choices --


def test_the_default_grid_is_that_of_a_path_on_all_rows():
    model = ConvexBNRegressorCV(n_gates=10, ranks=[2, 4], random_state=0, cv=2).fit(X, Y)
    decays = model.cv_results_["param_weight_decay"].reshape(2, 20)
    largest = max_weight_decay(X, Y, n_gates=10, rank=4, random_state=0)
    assert decays[0].tolist() == pytest.approx(largest * np.geomspace(1, 0.01, 20)) and np.array_equal(*decays)


def test_results_are_named_and_ranked_as_grid_search_does():
    grid = {"weight_decay": [5.0, 0.5, 50.0], "rank": [2, None]}
    search = GridSearchCV(ConvexBNRegressor(n_gates=10, random_state=0), grid, cv=3).fit(X, Y)
    model = ConvexBNRegressorCV(
        n_gates=10, weight_decays=grid["weight_decay"], ranks=grid["rank"], cv=3, random_state=0
    ).fit(X, Y)
    ours, theirs = model.cv_results_, search.cv_results_
    assert {name for name in theirs if "time" not in name} <= set(ours)
    place = {(params["weight_decay"], params["rank"]): i for i, params in enumerate(theirs["params"])}
    order = [place[params["weight_decay"], params["rank"]] for params in ours["params"]]
    for name in ("mean_test_score", "std_test_score", "split0_test_score"):
        assert ours[name] == pytest.approx(theirs[name][order], abs=1e-4), name
    assert ours["rank_test_score"].tolist() == theirs["rank_test_score"][order].tolist()
    assert {k: model.best_params_[k] for k in grid} == search.best_params_
    assert len(pd.DataFrame(ours)) == 6


def test_scoring_and_weights_reach_the_folds():
    weights = RNG.integers(1, 4, 90).astype(float)
    model = ConvexBNRegressorCV(**settings(cv=3, scoring="neg_mean_absolute_error")).fit(X, Y, weights)
    folds, expected = list(KFold(3).split(X)), []
    for params in model.cv_results_["params"]:
        fits = [ConvexBNRegressor(random_state=0, **params).fit(X[a], Y[a], weights[a]) for a, _ in folds]
        errors = [np.abs(fit.predict(X[b]) - Y[b]) for fit, (_, b) in zip(fits, folds, strict=True)]
        expected.append([-np.average(e, weights=weights[b]) for e, (_, b) in zip(errors, folds, strict=True)])
    assert splits(model) == pytest.approx(np.array(expected), abs=1e-4)


def test_a_held_out_set_takes_one_fit_a_candidate():
    model = ConvexBNClassifierCV(**settings(cv=ShuffleSplit(1, test_size=0.3, random_state=0))).fit(X, LABELS)
    assert model.n_splits_ == 1 and not model.cv_results_["std_test_score"].any()


def test_a_score_that_is_no_number_is_never_the_best():
    def scoring(model, X, y):
        return np.nan if model.rank == 2 else model.score(X, y)

    with pytest.warns(FitFailedWarning, match=r"fold 0, .*rank=2.*its score is not a number"):
        model = ConvexBNRegressorCV(**settings(cv=2, scoring=scoring)).fit(X, Y)
    assert np.isfinite(model.best_score_) and model.best_params_["rank"] != 2


def test_the_draws_are_the_same_in_all_folds_and_the_estimator_stays_as_it_is():
    source = np.random.RandomState(5)
    for random_state in (None, source):
        model = ConvexBNRegressorCV(**settings(random_state=random_state, cv=2, n_gates=10))
        before = model.get_params()
        model.fit(X, Y)
        assert isinstance(model.best_estimator_.random_state, int) and model.get_params() == before


# -- the search of the default grid --


def test_a_search_scores_a_part_of_the_grid_and_chooses_as_well_as_all_of_it():
    """Scores that depend on the weight decay alone, with one peak: the search ends within a step of it."""
    largest = max_weight_decay(X, Y, n_gates=5, random_state=0)
    for peak in (0, 4, 9, 13, 19):

        def scoring(model, X, y, peak=peak):
            return -((np.log(largest / model.weight_decay) / np.log(100) * 19 - peak) ** 2)

        model = ConvexBNRegressorCV(n_gates=5, random_state=0, scoring=scoring).fit(X, Y)
        known = np.isfinite(model.cv_results_["mean_test_score"])
        assert abs(model.best_index_ - peak) <= 2 and known.sum() <= 8
        assert np.isnan(model.cv_results_["max_relative_gap"][~known]).all()
        assert model.cv_results_["max_relative_gap"][known].max() <= 1e-2
        assert model.certificate_.status == "CERTIFIED" or model.best_index_ == 0


def test_a_search_solves_few_points_on_each_fold(monkeypatch):
    """The figure behind 'about ten fits': at most 8 points a fold, and the rows whitened once for grid and fit."""
    points, whitenings, whiten = [], [], training_set.whiten
    solve = RegularisationPath._solve
    monkeypatch.setattr(RegularisationPath, "_solve", lambda *args: points.append(1) or solve(*args))
    monkeypatch.setattr(training_set, "whiten", lambda *a, **o: whitenings.append(1) or whiten(*a, **o))
    for seed in range(3):
        points.clear(), whitenings.clear()
        model = ConvexBNClassifierCV(random_state=seed).fit(X, LABELS)
        assert len(points) <= 5 * 8 + 1 and len(whitenings) == 5 + 1
        alone = ConvexBNClassifier(random_state=seed, **model.best_params_).fit(X, LABELS)
        assert np.array_equal(model.network_.weight, alone.network_.weight)
        assert {**vars(alone), "random_state": seed}.keys() == vars(model.best_estimator_).keys()


def test_each_line_of_weight_decays_is_searched():
    model = ConvexBNRegressorCV(n_gates=[5, 10], ranks=[2, 4], cv=3, random_state=0).fit(X, Y)
    scored = np.isfinite(model.cv_results_["mean_test_score"]).reshape(4, 20).sum(axis=1)
    assert (scored >= 2).all() and (scored <= 8).all()


# -- folds and candidates that fail --


def test_leave_one_out_has_no_score_of_a_regressor():
    with (
        pytest.warns(match="R.2 score is not well-defined"),
        pytest.raises(ValueError, match=r"no candidate has a score that is a number.*fold 0.*another scoring"),
    ):
        ConvexBNRegressorCV(weight_decays=[1.0], n_gates=5, cv=LeaveOneOut(), random_state=0).fit(X[:20], Y[:20])
    model = ConvexBNRegressorCV(
        weight_decays=[1.0], n_gates=5, cv=LeaveOneOut(), scoring="neg_mean_squared_error", random_state=0
    ).fit(X[:20], Y[:20])
    assert np.isfinite(model.best_score_) and model.n_splits_ == 20


@pytest.mark.parametrize("decays", [[5.0, 0.5], None])
def test_a_fold_that_fails_is_left_out_and_named(decays):
    weights = np.ones(90)
    weights[:18] = 0.0
    with pytest.warns(FitFailedWarning, match=r"fold 0, .*weights must contain") as caught:
        model = ConvexBNRegressorCV(weight_decays=decays, n_gates=10, cv=KFold(5), random_state=0).fit(X, Y, weights)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert all(failure.startswith("fold 0") for failure in model.failures_)
    folds = [(train[train >= 18], test) for train, test in KFold(5).split(X)][1:]
    grid = {"n_gates": [10], "rank": [None], "weight_decay": [model.weight_decay_]}
    expected = loop(ConvexBNRegressor(random_state=0), X, Y, folds, grid)
    assert model.best_score_ == pytest.approx(expected.mean(), abs=1e-2)


def test_classes_in_order_leave_no_fold_to_train_on():
    model = ConvexBNClassifierCV(n_gates=10, random_state=0, cv=KFold(2), weight_decays=[1.0])
    with pytest.raises(ValueError, match=r"fold 0: .*class"):
        model.fit(X, np.repeat([0, 1], 45))


def test_a_candidate_that_fails_on_one_fold_is_not_chosen():
    calls = []

    def scoring(model, X, y):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("no score today")
        return -model.weight_decay

    with pytest.warns(FitFailedWarning, match=r"fold 0, n_gates=10, .*weight_decay=0.5: no score today"):
        model = ConvexBNRegressorCV(weight_decays=[5.0, 0.5], n_gates=10, cv=3, random_state=0, scoring=scoring).fit(
            X, Y
        )
    assert model.best_params_["weight_decay"] == 5.0 and np.isnan(model.cv_results_["mean_test_score"][1])


def test_a_fold_that_cannot_be_trained_on_is_told_once():
    """One class alone in the training rows of fold 0."""
    labels = np.r_[np.repeat([0, 1], [20, 25]), np.zeros(45, dtype=int)]
    split = [(np.arange(45, 90), np.arange(45)), *StratifiedKFold(2).split(X, labels)]
    with pytest.warns(FitFailedWarning, match=r"fold 0: .*class"):
        model = ConvexBNClassifierCV(n_gates=10, random_state=0, cv=split).fit(X, labels)
    assert len(model.failures_) == 1 and model.n_splits_ == 3 and np.isfinite(model.best_score_)


# -- splitters, scorers, routing, progress --

GROUPS = np.arange(90) % 6


def test_groups_reach_the_splitter():
    expected = ConvexBNClassifierCV(**settings(cv=list(GroupKFold(3).split(X, LABELS, GROUPS)))).fit(X, LABELS)
    plain = ConvexBNClassifierCV(**settings(cv=GroupKFold(3))).fit(X, LABELS, groups=GROUPS)
    with sklearn.config_context(enable_metadata_routing=True):
        routed = ConvexBNClassifierCV(**settings(cv=GroupKFold(3))).fit(X, LABELS, groups=GROUPS)
    assert np.array_equal(splits(plain), splits(expected)) and np.array_equal(splits(routed), splits(expected))
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        ConvexBNClassifierCV(**settings(cv=3)).fit(X, LABELS, colour=GROUPS)


def test_routing_takes_weights_and_groups_through_a_search():
    weights = RNG.uniform(0.5, 2, 90)
    with sklearn.config_context(enable_metadata_routing=True):
        scorer = get_scorer("neg_mean_absolute_error").set_score_request(sample_weight=True)
        inner = ConvexBNRegressorCV(**settings(cv=GroupKFold(3), scoring=scorer))
        expected = splits(inner.fit(X, Y, sample_weight=weights, groups=GROUPS))
        deaf = get_scorer("neg_mean_absolute_error").set_score_request(sample_weight=False)
        other = ConvexBNRegressorCV(**settings(cv=GroupKFold(3), scoring=deaf))
        assert not np.array_equal(splits(other.fit(X, Y, sample_weight=weights, groups=GROUPS)), expected)
        request = inner.set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        search = GridSearchCV(make_pipeline(MinMaxScaler(), request), {"convexbnregressorcv__tol": [1e-6]}, cv=2)
        search.fit(X, Y, sample_weight=weights, groups=GROUPS)
    assert search.best_estimator_[-1].n_splits_ == 3


@pytest.mark.parametrize("name", ["neg_max_error", "neg_root_mean_squared_error", "explained_variance"])
def test_scorers_with_and_without_weights(name):
    weights = np.ones(90)
    one, other = (
        ConvexBNRegressorCV(**settings(cv=3, scoring=name)).fit(X, Y, sample_weight)
        for sample_weight in (None, weights)
    )
    assert splits(one) == pytest.approx(splits(other), abs=1e-6)


@pytest.mark.parametrize("name", ["roc_auc_ovr", "neg_log_loss", "f1_macro", "balanced_accuracy"])
def test_scorers_of_classes(name):
    model = ConvexBNClassifierCV(scoring=name, loss="cross_entropy", n_gates=10, cv=3, random_state=0).fit(X, LABELS)
    assert np.isfinite(model.best_score_) and model.failures_ == []


def test_strings_of_pandas_arrays_are_labels():
    labels = pd.Series(LABELS, dtype="string").array
    model = ConvexBNClassifierCV(**settings(cv=3)).fit(X, labels)
    assert np.array_equal(splits(model), splits(ConvexBNClassifierCV(**settings(cv=3)).fit(X, LABELS)))


@pytest.mark.parametrize("decays", [[5.0, 0.5], None])
@pytest.mark.parametrize("n_jobs", [None, 2])
def test_progress_counts_fits_and_ends_at_the_number_made(decays, n_jobs, capsys):
    told = []
    with joblib.parallel_config("threading"):
        model = ConvexBNRegressorCV(
            weight_decays=decays, n_gates=5, cv=3, random_state=0, n_jobs=n_jobs, callback=told.append, verbose=1
        ).fit(X, Y)
    made = int(np.isfinite(splits(model)).sum())
    counts = [progress.finished for progress in told]
    assert counts == sorted(counts) and counts[-1] == made and all(p.total >= p.finished for p in told)
    assert all(progress.seconds_left >= 0 for progress in told)
    assert told[-1].best_score == pytest.approx(model.best_score_)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= len(told) and "finished   best score" in lines[0] and "s left" in lines[0]


def test_workers_are_silent(capfd):
    model = ConvexBNRegressorCV(weight_decays=[1.0], n_gates=5, cv=2, random_state=0, verbose=1)
    joblib.Parallel(n_jobs=2)(joblib.delayed(model.fit)(X, Y) for _ in range(2))
    with joblib.parallel_config("threading", n_jobs=2):
        joblib.Parallel()(joblib.delayed(model.fit)(X, Y) for _ in range(2))
    assert "finished" not in capfd.readouterr().err


# -- manners --


def test_pipelines_frames_and_files(tmp_path):
    frame = pd.DataFrame(X, columns=list("abcdef"))
    model = make_pipeline(MinMaxScaler(), ConvexBNClassifierCV(**settings(cv=2))).set_output(transform="pandas")
    labels = pd.Series(LABELS)
    assert model.fit(frame, labels).score(frame, labels) > 0.6
    last = model[-1]
    assert last.feature_names_in_.tolist() == list("abcdef") and last.n_features_in_ == 6
    last.save(tmp_path / "model")
    scaled = model[0].transform(frame)
    assert np.array_equal(load(tmp_path / "model").predict(scaled), last.predict(scaled))


def test_a_failed_fit_leaves_the_former_one(monkeypatch):
    model = ConvexBNRegressorCV(**settings(cv=2))
    with pytest.raises(NotFittedError):
        model.predict(X)
    model.fit(X, Y)
    before = dict(vars(model))
    monkeypatch.setattr(RegularisationPath, "_solve", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.fit(X, Y)
    assert vars(model) == before


def test_a_best_candidate_that_is_not_certified_warns_once():
    model = ConvexBNRegressorCV(**settings(cv=2, max_iter=1, weight_decays=[0.1], n_gates=20))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(X, Y)
    assert [w.category for w in caught] == [ConvergenceWarning]
    assert model.cv_results_["max_relative_gap"].max() > 1e-6


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"weight_decays": [0.0]}, "weight_decays must be a sequence of positive finite numbers"),
        ({"ranks": [0]}, "The 'rank' parameter"),
        ({"n_gates": [5, 0]}, "The 'n_gates' parameter"),
        ({"n_gates": []}, "n_gates is empty"),
        ({"cv": 1}, "n_splits"),
        ({"scoring": "nonsense"}, "The 'scoring' parameter"),
        ({"tol": -1}, "The 'tol' parameter"),
    ],
)
def test_refusals(changes, match):
    with pytest.raises(ValueError, match=match):
        ConvexBNRegressorCV(**settings(**changes)).fit(X, Y)


def test_defaults_are_those_of_the_estimators():
    for ours, plain in ((ConvexBNClassifierCV(), ConvexBNClassifier()), (ConvexBNRegressorCV(), ConvexBNRegressor())):
        theirs = plain.get_params()
        assert {k: v for k, v in ours.get_params().items() if k in theirs}.items() <= theirs.items()
        selected = {"weight_decay", "rank", "spectral_filter"}
        assert set(theirs) - set(ours.get_params()) == selected
        assert cross_validation._SelectionCV._parameter_constraints.keys() <= ours._parameter_constraints.keys()
