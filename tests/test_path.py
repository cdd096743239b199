"""Regularisation path: every point certified, warm starts that pay, and the same optima as separate fits."""

import warnings

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning

from convexbn import ConvexBNClassifier, ConvexBNRegressor, Status, fit_path, max_weight_decay
from convexbn.data.whitening import whiten

RNG = np.random.default_rng(3)
X = RNG.standard_normal((80, 6)) @ RNG.standard_normal((6, 6)) + 3
Y = np.tanh(X[:, 0]) + 0.1 * X[:, 1] ** 2 - 1 + 0.2 * RNG.standard_normal(80)
LABELS = np.greater(Y, np.median(Y)).astype(int)
PROVED = (Status.CERTIFIED, Status.TRIVIAL)


def of_all_ranks(changes):
    """Parameters of gates that are the same at every rank."""
    return {} if changes.get("activation") == "relu" else {"gates": "data", "linear": False}


def regressor(**changes):
    return ConvexBNRegressor(**{"n_gates": 30, "random_state": 0, **of_all_ranks(changes), **changes})


def classifier(**changes):
    return ConvexBNClassifier(**{"n_gates": 30, "random_state": 0, **changes})


def largest(y=Y, **options):
    return max_weight_decay(X, y, **{"n_gates": 30, "random_state": 0, **of_all_ranks(options), **options})


def separate(point, y):
    """A plain fit with the parameters of a point."""
    model = type(point.model)(**point.model.get_params())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(X, y)


def same(one, other):
    """Whether two points are equal bit for bit."""
    a, b = one.network, other.network
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("weight", "gamma", "shift", "output"))
    return arrays and one.certificate == other.certificate and one.score == other.score


# -- the points --


@pytest.mark.parametrize("outputs", [1, 3])
def test_every_point_is_certified_in_few_iterations(outputs):
    targets = np.column_stack([Y, *X[:, 1:outputs].T]) if outputs > 1 else Y
    points = list(fit_path(regressor(), X, targets))
    assert [p.certificate.status for p in points] == [Status.TRIVIAL] + [Status.CERTIFIED] * 19
    decays = [p.weight_decay for p in points]
    assert decays == pytest.approx(largest(targets) * np.geomspace(1, 0.01, 20), rel=1e-12)
    assert max(p.model.n_iter_ for p in points) <= 6
    assert [p.model.weight_decay_ for p in points] == decays and {p.model.rank_ for p in points} == {6}


@pytest.mark.parametrize(
    ("model", "y"),
    [
        (regressor(), Y),
        (regressor(gates="whitened"), Y),
        (regressor(gates=np.random.default_rng(0).standard_normal((7, 20))), Y),
        (classifier(loss="logistic", tol=1e-5), LABELS),
        (regressor(spectral_filter=0.2, gates="whitened"), Y),
    ],
    ids=["data", "whitened", "given", "logistic", "filter"],
)
def test_points_equal_separate_fits_within_their_gaps(model, y):
    decays = np.geomspace(largest(y, loss=model.loss), 0.1, 3)
    for point in fit_path(model, X, y, weight_decays=decays, ranks=[2, 0.9, None]):
        alone = separate(point, y)
        warm, cold = point.certificate, alone.certificate_
        assert warm.lower_bound <= cold.objective * (1 + 1e-9) and cold.lower_bound <= warm.objective * (1 + 1e-9)
        assert warm.status in PROVED and warm.status is cold.status and point.model.rank_ == alone.rank_


def test_relu_points_are_as_good_as_separate_fits():
    few, targets = X[:20], Y[:20]
    value, _ = max_weight_decay(few, targets, activation="relu")
    path = fit_path(
        regressor(activation="relu", standardize=False),
        few,
        targets,
        weight_decays=[0.5 * value, 0.2 * value],
        ranks=[1, 2],
    )
    for point in path:
        alone = type(point.model)(**point.model.get_params()).fit(few, targets)
        assert point.certificate.status is Status.CERTIFIED is alone.certificate_.status
        assert point.certificate.objective == pytest.approx(alone.certificate_.objective, rel=2e-6)


def test_relu_points_by_formula_are_the_fits():
    wide, labels = RNG.standard_normal((12, 20)), np.arange(12) % 3
    model = classifier(activation="relu", loss="cross_entropy")
    for point in fit_path(model, wide, labels, weight_decays=[1.0, 0.1]):
        alone = ConvexBNClassifier(**point.model.get_params()).fit(wide, labels)
        assert np.array_equal(point.network.weight, alone.network_.weight) and point.certificate == alone.certificate_


def test_a_path_of_one_rank_has_the_whitening_of_a_fit():
    """The same rows bit for bit, so that the trivial point is the fit itself."""
    for rank in (None, 3):
        (point,) = fit_path(regressor(), X, Y, weight_decays=[1.0], ranks=[rank])
        model = regressor(weight_decay=1.0, rank=rank).fit(X, Y)
        assert np.array_equal(point.network.weight, model.network_.weight)
        assert point.certificate == model.certificate_ and point.model.fingerprint_ == model.fingerprint_


@pytest.mark.parametrize("rank", [1, 3, 0.7, 0.999, 6, None])
def test_leading_directions_are_those_of_a_separate_whitening(rank):
    whole = whiten(X, rank=6)
    part, alone = whole.leading(rank), whiten(X, rank=6 if rank is None else rank)
    assert part.rank == alone.rank and part.truncated == alone.truncated
    for name in ("rows", "projection", "directions", "mean"):
        ours, theirs = getattr(part, name), getattr(alone, name)
        assert np.allclose(ours, theirs, rtol=0, atol=1e-13 * np.abs(theirs).max()), name


@pytest.mark.parametrize("spectral_filter", [1e-3, 0.3, 30.0])
@pytest.mark.parametrize("rank", [3, None])
def test_a_filter_after_the_whitening_is_that_of_a_separate_whitening(rank, spectral_filter):
    part = whiten(X, rank=6).leading(rank, spectral_filter)
    alone = whiten(X, rank=rank, spectral_filter=spectral_filter)
    for name in ("rows", "projection", "directions", "filter"):
        ours, theirs = getattr(part, name), getattr(alone, name)
        assert np.allclose(ours, theirs, rtol=0, atol=1e-13 * np.abs(theirs).max(initial=0)), name
    again = alone.leading(2)
    assert again.rank == min(2, alone.rank) and np.array_equal(again.filter, alone.filter[:2])


def test_warm_starts_save_work_both_ways():
    decays = np.geomspace(1, 0.02, 12) * largest()
    cold = [regressor(weight_decay=decay).fit(X, Y).n_iter_ for decay in decays]
    for order in (decays, decays[::-1]):
        warm = [point.model.n_iter_ for point in fit_path(regressor(), X, Y, weight_decays=order)]
        assert sum(warm) < 0.9 * sum(cold)


def test_loss_falls_and_penalty_grows_with_less_weight_decay():
    """Optima of ``L + beta P``: exact up to what the gaps leave open, for every pair of neighbours."""
    points = list(fit_path(regressor(tol=1e-8), X, Y))
    losses = [0.5 * np.sum((Y - p.model.predict(X)) ** 2) for p in points]
    objectives = [p.certificate.objective for p in points]
    gaps = [p.certificate.gap for p in points]
    betas = np.array([p.weight_decay for p in points])
    for i in range(len(points) - 1):
        slack = (betas[i + 1] * gaps[i] + betas[i] * gaps[i + 1]) / (betas[i] - betas[i + 1])
        assert losses[i + 1] <= losses[i] * (1 + 1e-9) + slack
        assert objectives[i + 1] <= objectives[i] + gaps[i + 1]  # the optimal value is monotone in the weight decay
    slopes = np.diff(objectives) / np.diff(betas)  # the optimal value is concave: its slope is the penalty
    rounding = np.add(gaps[1:], gaps[:-1]) / np.abs(np.diff(betas))
    assert np.all(np.diff(slopes) >= -(rounding[1:] + rounding[:-1]))


# -- order, scores, interruption --


def test_neighbours_follow_one_another():
    path = fit_path(regressor(), X, Y, weight_decays=[3, 1, 2], ranks=[4, 2, 4])
    asked = [(3, 4), (1, 4), (2, 4), (2, 2), (1, 2), (3, 2), (3, 4), (1, 4), (2, 4)]
    assert path.grid == asked and len(path) == 9
    assert [(p.weight_decay, p.rank) for p in path] == asked
    in_order = [(p.weight_decay, p.rank) for p in path.in_grid_order()]
    assert in_order == [(w, r) for r in (4, 2, 4) for w in (3, 1, 2)]
    next(unfinished := fit_path(regressor(), X, Y, weight_decays=[3, 1], ranks=[4, 2]))
    assert [p.weight_decay for p in unfinished.in_grid_order()] == [3.0]


def test_points_come_one_by_one_and_the_estimator_stays_as_it_is():
    seen, model = [], regressor()
    model.callback = seen.append  # a bound method, which must not be copied
    before = dict(vars(model))
    path = fit_path(model, X, Y, weight_decays=[2, 1])
    assert seen == [] and path.points == []
    first = next(path)
    count, weight = len(seen), first.network.weight.copy()
    assert count == first.model.n_iter_ and path.points == [first]
    assert list(path) == path.points[1:] and len(seen) > count
    assert vars(model) == before and np.array_equal(first.network.weight, weight)


def test_scores_are_those_of_the_models_and_the_best_is_the_first_highest():
    validation = X[::3], LABELS[::3]
    path = fit_path(classifier(), X, LABELS, weight_decays=[50, 5, 5, 0.5], validation=validation)
    with pytest.raises(ValueError, match="no point has a score"):
        _ = path.best
    scores = [point.score for point in path]
    assert scores == [point.model.score(*validation) for point in path.points]
    assert path.best is path.points[int(np.argmax(scores))]
    without = fit_path(classifier(), X, LABELS, weight_decays=[5])
    assert next(without).score is None
    with pytest.raises(ValueError, match="give validation rows"):
        _ = without.best


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_is_finished_outlives_an_exception_and_the_path_goes_on(error):
    decays = [4, 2, 1, 0.5]
    expected = list(fit_path(regressor(), X, Y, weight_decays=decays))
    calls = []

    def callback(progress):
        calls.append(progress)
        if len(calls) == expected[0].model.n_iter_ + expected[1].model.n_iter_ + 2:
            raise error

    path = fit_path(regressor(callback=callback), X, Y, weight_decays=decays)
    with pytest.raises(error):
        list(path)
    assert len(path.points) == 2
    rest = list(path)
    assert len(rest) == 2 and all(same(*pair) for pair in zip(path.points, expected, strict=True))


def test_a_path_repeats_and_draws_its_gates_once():
    first, second = (list(fit_path(regressor(), X, Y, weight_decays=[2, 1], ranks=[3, None])) for _ in range(2))
    assert all(same(*pair) for pair in zip(first, second, strict=True))
    for random_state in (None, np.random.RandomState(3)):
        points = list(fit_path(regressor(random_state=random_state), X, Y, weight_decays=[2, 1], ranks=[3, None]))
        assert all(np.array_equal(point.model.gates_, points[0].model.gates_) for point in points)


def test_a_callback_ends_every_point_honestly():
    model = regressor(callback=lambda progress: True, tol=1e-12)
    points = list(fit_path(model, X, Y, weight_decays=np.geomspace(1, 0.001, 5) * largest()))
    assert len(points) == 5 and points[-1].certificate.status is Status.INTERRUPTED
    for point in points:
        assert (point.certificate.relative_gap <= 1e-12) == (point.certificate.status in PROVED)


def test_sample_weights_are_repetition():
    weights = np.arange(80) % 3
    weighted = list(fit_path(regressor(), X, Y, weight_decays=[2, 1], sample_weight=weights))
    repeated = list(fit_path(regressor(), X.repeat(weights, axis=0), Y.repeat(weights), weight_decays=[2, 1]))
    assert all(same(*pair) for pair in zip(weighted, repeated, strict=True))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weight_decays": []}, "weight_decays must be a sequence of positive finite numbers"),
        ({"weight_decays": [1, -1]}, "weight_decays must be"),
        ({"weight_decays": [np.nan]}, "weight_decays must be"),
        ({"weight_decays": 3.0}, "weight_decays must be"),
        ({"ranks": []}, "ranks is empty"),
        ({"ranks": [3, 0]}, "The 'rank' parameter"),
        ({"ranks": [1.5]}, "The 'rank' parameter"),
        ({"validation": (X[:, :2], Y)}, "X has 2 features, but ConvexBNRegressor is expecting 6"),
        ({"validation": (X, Y[:3])}, "inconsistent numbers of samples"),
    ],
)
def test_refusals_come_before_any_work(options, match):
    with pytest.raises(ValueError, match=match):
        fit_path(regressor(), X, Y, **options)


@pytest.mark.parametrize("weight_decay", [0.283, 0.46])
def test_newton_stops_where_the_judge_agrees(weight_decay):
    """Steps that converge quadratically need their linear systems as accurate as the gap that they reach."""
    digits, classes = load_digits(return_X_y=True)
    model = ConvexBNClassifier(n_gates=30, random_state=2, weight_decay=weight_decay)
    assert model.fit(digits[:500], classes[:500]).certificate_.status is Status.CERTIFIED


def test_one_direction_is_not_the_whole_variance():
    found = [point.model.rank_ for point in fit_path(regressor(), X, Y, weight_decays=[1.0], ranks=[1, 1.0])]
    assert found == [1, 6]
