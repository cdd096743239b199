"""Time limits, proofs that end, bounds that are kept, and words that tell an estimate from a bound."""

import pickle
import time
from dataclasses import replace

import matplotlib.pyplot
import numpy as np
import pytest
from scipy.optimize import rosen, rosen_der

from convexbn import ConvexBNClassifier, ConvexBNRegressor, bounds, load
from convexbn._types import now
from convexbn.bounds import descent
from convexbn.certificate.status import Status
from convexbn.cli.progress_bar import _line
from convexbn.estimators.display import CertificateDisplay
from convexbn.program.losses import SquaredLoss
from convexbn.program.relu import ReluProgram
from convexbn.solvers.base import Budget, Progress
from convexbn.solvers.relu import column_generation
from convexbn.training import fit
from instances import proof_of_outputs

matplotlib.use("agg")
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

#: Seconds of the processor beyond a limit: 10 per cent and half a second, for steps that nothing can cut short.
SLACK = 0.5


def rows(n=80, d=9, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


def values_of(X):
    return np.tanh(2 * X[:, 0]) + np.abs(X[:, 1]) + 0.1 * np.random.default_rng(1).standard_normal(len(X))


def regressor(**changes):
    return ConvexBNRegressor(**{"activation": "relu", "weight_decay": 1.0, "random_state": 0, **changes})


@pytest.fixture(scope="module")
def proved():
    """A network with its rows, whose bound is far above the cheapest."""
    X = rows()
    y = values_of(X)
    return regressor().fit(X, y), X, y


def orthonormal(n, q, seed=0):
    return np.linalg.qr(rows(n, q, seed))[0]


# -- limits --


@pytest.mark.cpu_clock
@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((200, 2), {}), ((60, 3), {}), ((14, 12), {}), ((400, 60), {}), ((1000, 8), {"weight_decay": "auto"}),
        ((20, 5), {"activation": "gated", "gates": "trained"}),
        ((2000, 5), {"activation": "gated", "gates": "trained"}),
    ],
)  # fmt: skip
def test_a_time_limit_is_kept_by_the_whole_fit(shape, changes):
    X = rows(*shape)
    regressor(time_limit=0.1, **changes).fit(X[:30], values_of(X[:30]))  # imports
    started = time.process_time()
    regressor(time_limit=0.4, **changes).fit(X, values_of(X))
    assert time.process_time() - started <= 1.1 * 0.4 + SLACK


@pytest.mark.cpu_clock
def test_by_default_a_proof_takes_no_longer_than_the_solver_and_a_second(monkeypatch):
    spent = {}

    def measured(*args, **options):
        started, spent["left"] = time.process_time(), options["deadline"] - time.process_time()
        found = judged(*args, **options)
        spent["proof"] = time.process_time() - started
        return found

    judged = fit.judge_on
    monkeypatch.setattr(fit, "judge_on", measured)
    X = rows(3000, 30)
    started = time.process_time()
    regressor(max_iter=1, width=5).fit(X, values_of(X))
    assert spent["left"] <= time.process_time() - started + fit.LEAST_PROOF
    assert spent["proof"] <= 1.1 * spent["left"] + SLACK


def test_proof_time_buys_bounds():
    X = rows(700, 12)
    y = values_of(X)
    none, some = (regressor(max_iter=2, proof_time=seconds).fit(X, y).certificate_ for seconds in (0, 20))
    assert none.bound == "orthant" and none.objective == some.objective
    assert some.bound != "orthant" and some.relative_gap < 0.8 * none.relative_gap
    assert "proof_time" in none.sentence and "proof_time" not in some.sentence


def test_the_network_does_not_depend_on_the_time_of_the_proof():
    X = rows(60, 4)
    first, second = (regressor(proof_time=seconds).fit(X, values_of(X)).network_ for seconds in (0, None))
    np.testing.assert_array_equal(first.weight, second.weight)
    np.testing.assert_array_equal(first.output, second.output)


def test_budgets_end_at_the_sooner_limit():
    assert Budget().sooner(None) is None and Budget().sooner(np.inf) is None
    limited = Budget(5.0)
    assert limited.sooner(None) == limited.sooner(np.inf) == limited.deadline == limited.sooner(1e9)
    assert limited.sooner(0) < limited.deadline and Budget().sooner(0) is not None


def test_lbfgs_looks_at_the_clock_in_every_evaluation():
    def square(x):
        while now() < until:
            pass
        return float(x @ x), 2 * x

    until = now() + 0.01
    start = np.array([3.0, -4.0])
    point, evaluations = descent.minimise(square, start, max_iter=100, deadline=until)
    assert evaluations == 1 and np.array_equal(point, start)
    point, evaluations = descent.minimise(square, start, max_iter=100, deadline=until)
    assert evaluations == 0 and np.array_equal(point, start)
    assert np.abs(descent.minimise(square, start, max_iter=100)[0]).max() < 1e-6


def test_lbfgs_ends_where_it_hardly_descends():
    def valley(x):
        return 1e4 + rosen(x), rosen_der(x)

    start = np.tile([-1.2, 1.0], 10)
    _, all_of_them = descent.minimise(valley, start, max_iter=1000)
    _, few = descent.minimise(valley, start, max_iter=1000, worthwhile=0.5)
    assert few <= 30 < 2 * few < all_of_them


@pytest.mark.parametrize("K", [1, 2])
def test_bounds_hold_wherever_the_time_is_over(K):
    A, V = orthonormal(40, 4), rows(40, K, seed=3)
    exact = bounds.branch_and_bound(V, A, tol=1e-6).lower
    for seconds in (-1.0, 0.0, 1e-3, 1e-2):
        deadline = now() + seconds
        found = bounds.branch_and_bound(V, A, tol=0, deadline=deadline)
        assert found.stopped_by == "deadline" and found.value >= exact
        assert bounds.lifted(V, A, deadline=deadline).value >= exact
        assert bounds.local_maxima(V, A, 30, np.random.default_rng(0), deadline=deadline)[0][0] <= exact * (1 + 1e-9)
        if K == 1:
            assert bounds.relaxation(V, A, deadline=deadline).value >= exact


def test_cells_that_time_does_not_allow():
    A, v = orthonormal(60, 3), rows(60, 1, seed=3)
    exact = bounds.EveryCell(A).maxima(v).value
    assert bounds.EveryCell(A).maxima(v, deadline=now()).value >= exact * (1 - 1e-12)
    assert bounds.EveryCell.of_few(A, now()) is None
    assert bounds.EveryCell.of_few(orthonormal(200, 6)) is None
    assert bounds.EveryCell.of_few(A).maxima(v).value == exact


# -- bounds that are kept --


def test_certify_is_never_worse_than_the_fit(proved):
    model, X, y = proved
    again = model.certify(X, y, time_limit=0)
    assert again.lower_bound == model.certificate_.lower_bound and again.bound == model.certificate_.bound
    order = np.random.default_rng(0).permutation(len(X))
    assert model.certify(X[order], y[order], time_limit=0).lower_bound == again.lower_bound


def test_only_bounds_that_this_process_proved_count(proved, tmp_path):
    model, X, y = proved
    cheapest = regressor(proof_time=0).fit(X, y).certificate_.lower_bound
    assert cheapest < 0.9 * model.certificate_.lower_bound
    model.save(tmp_path / "m")
    copies = [load(tmp_path / "m"), pickle.loads(pickle.dumps(model))]
    copies[0].certificate_ = replace(model.certificate_, lower_bound=model.certificate_.objective)
    for copy in copies:
        assert copy.certify(X, y, time_limit=0).lower_bound == cheapest
    claimed = regressor(proof_time=0).fit(X, y)
    claimed.certificate_ = model.certificate_
    assert claimed.certify(X, y, time_limit=0).lower_bound == cheapest


def test_bounds_of_other_questions_do_not_count(proved):
    model, X, y = proved
    for name, value in (("weight_decay_", 1.5), ("loss", "huber"), ("rank", 5), ("spectral_filter", 0.1)):
        before = getattr(model, name)
        setattr(model, name, value)
        assert model.certify(X, y, time_limit=0).bound == "orthant", name
        setattr(model, name, before)
    assert model.certify(X, 1.1 * y, time_limit=0).bound == "orthant"
    assert model.certify(X, y, time_limit=0).bound == model.certificate_.bound


def test_certify_refuses_a_negative_limit(proved):
    model, X, y = proved
    with pytest.raises(ValueError, match="time_limit must not be negative"):
        model.certify(X, y, time_limit=-1)


# -- estimates and bounds --


def test_no_network_is_below_a_bound_of_the_history():
    X = rows(30, 3)
    y = values_of(X)
    model = regressor(weight_decay=0.5, tol=1e-6).fit(X, y)
    assert model.certificate_.status is Status.CERTIFIED
    short = regressor(weight_decay=0.5, max_iter=2, rank=2).fit(rows(300, 9), values_of(rows(300, 9)))
    best = regressor(weight_decay=0.5, rank=2).fit(rows(300, 9), values_of(rows(300, 9)))
    for history in (short.history_, best.history_):
        assert all(progress.lower_bound <= best.certificate_.objective * (1 + 1e-9) for progress in history)


def test_the_history_of_a_search_has_estimates(proved, tmp_path):
    model, _, _ = proved
    last = model.history_[-1]
    assert last.estimated_bound is not None and last.estimated_gap <= model.tol < last.relative_gap
    model.save(tmp_path / "m")
    assert load(tmp_path / "m").history_ == model.history_
    gated = ConvexBNRegressor(random_state=0).fit(rows(), values_of(rows()))
    assert all(progress.estimated_bound is None for progress in gated.history_)
    assert gated.history_[-1].estimated_gap == gated.history_[-1].relative_gap


def test_files_of_earlier_versions_hold_estimates_as_estimates():
    relu, gated = (load(f"tests/saved/{name}.safetensors") for name in ("relu", "gated"))
    assert relu.proof_time is None and gated.proof_time is None
    assert all(progress.lower_bound == 0 < progress.estimated_bound for progress in relu.history_)
    assert all(progress.estimated_bound is None for progress in gated.history_)


def test_progress_names_what_it_shows():
    assert "gap 5.0e-01" in _line(Progress(1, 2.0, 1.0, 3)) and "estimated" not in _line(Progress(1, 2.0, 1.0, 3))
    assert "estimated gap 2.5e-01" in _line(Progress(1, 2.0, 1.0, 3, 1.5))


def test_pictures_tell_estimates_from_bounds(proved):
    model, X, y = proved
    axes = CertificateDisplay.from_estimator(model).plot().axes_
    words = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in axes]
    assert "estimated bound: no bound" in words[0] and "estimated gap: no bound" in words[1]
    lines = {line.get_label(): line for line in axes[0].lines}
    assert lines["estimated bound: no bound"].get_linestyle() == ":"
    assert set(lines["lower bound of the best network"].get_ydata()) == {model.certificate_.lower_bound}
    gated = CertificateDisplay.from_estimator(ConvexBNRegressor(random_state=0).fit(X, y)).plot().axes_
    assert not any("estimated" in text.get_text() for axis in gated for text in axis.get_legend().get_texts())
    matplotlib.pyplot.close("all")


# -- sentences --

ALL = "all patterns"
OUTPUTS = {"weight_decay": 0.1, "tol": 1e-6, "scope": ALL}


def sentence(estimate, stopped_by):
    """Sentence on a gap of about a fifth of which a local search sees a part: the whole, or very little."""
    loss = SquaredLoss(np.array([[1.0], [1.5]]), np.ones(2))
    return proof_of_outputs(
        loss, np.array([[0.5], [1.0]]), bound=0.5, estimate=estimate, stopped_by=stopped_by, **OUTPUTS
    )


@pytest.mark.parametrize(("stopped_by", "remedy"), [("max_iter", "raise max_iter"), ("time_limit", "raise time_limit")])
def test_a_network_that_was_cut_short_is_said_to_be_unfinished(stopped_by, remedy):
    proof = sentence(0.5, stopped_by)
    assert proof.status is Status.GAP_OPEN and proof.estimated_gap > 0.5 * proof.relative_gap
    assert "the network is unfinished" in proof.sentence and remedy in proof.sentence
    assert "loose" not in proof.sentence


def test_a_loose_bound_is_not_blamed_on_iterations():
    proof = sentence(0.345, "max_iter")
    assert proof.status is Status.GAP_OPEN and 1e-6 < proof.estimated_gap < 0.5 * proof.relative_gap
    assert "the bound, which is loose" in proof.sentence and "raise max_iter" not in proof.sentence
    assert "the network is unfinished" in proof.sentence
    assert "raise time_limit" in sentence(0.345, "time_limit").sentence
    alone = sentence(0.345, "stalled").sentence
    assert "loose" in alone and "raise" not in alone


def test_proofs_say_what_more_time_would_buy(proved):
    _, X, y = proved
    assert "ended by itself" in regressor(proof_time=60).fit(X, y).certificate_.sentence
    hurried = regressor(proof_time=0).fit(X, y).certificate_
    assert "The time of the proof was over" in hurried.sentence


# -- large data --


def test_where_newton_is_too_dear_lbfgs_ends_near_the_optimum(monkeypatch):
    X = rows(60, 5)
    program = ReluProgram(orthonormal(60, 5), SquaredLoss(np.c_[values_of(X), X[:, 2]], np.ones(60)), 0.3)
    exact = column_generation.ColumnGeneration().solve(program)
    monkeypatch.setattr(column_generation, "_POLISH_FLOPS", 0.0)
    found = column_generation.ColumnGeneration().solve(program)
    assert len(found.history) <= 3 and found.stopped_by in ("max_iter", "tolerance")
    best = program.objective(exact.weights)
    assert best * (1 - 1e-6) <= program.objective(found.weights) <= best * (1 + 1e-3)


def test_a_spectral_filter_on_many_directions_ends():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((120, 300))
    y = (X @ rng.standard_normal((300, 4))).argmax(axis=1)
    model = ConvexBNClassifier(
        activation="relu", loss="cross_entropy", spectral_filter=0.3, random_state=0, proof_time=0
    ).fit(X, y)
    assert len(model.history_) <= 3 and model.history_[-1].estimated_gap < 1e-2 and model.score(X, y) == 1
