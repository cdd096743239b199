"""A slice of ``benchmarks/attack_crashes.py``, and its cases that once crashed: an honest status, or words of ours."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from convexbn import ConvexBNClassifier, ConvexBNRegressor, Status

ATTACK = Path(__file__).parents[1] / "benchmarks" / "attack_crashes.py"

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(scope="module")
def attack():
    """The module of the benchmark."""
    if not ATTACK.exists():
        pytest.skip("benchmarks are in a checkout only")
    spec = importlib.util.spec_from_file_location("attack_crashes", ATTACK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", [*range(40), 145, 164, 288, 420])
def test_hostile_fits_end_in_a_certificate_or_in_words_of_ours(attack, seed):
    result, wrong = attack.outcome(seed)
    assert wrong is None, f"{result}: {wrong}"


def test_the_attack_tells_foreign_errors_from_ours(attack):
    def caught(work):
        try:
            work()
        except Exception as error:
            return error

    X = np.ones((4, 2))
    ours = caught(lambda: ConvexBNRegressor().fit(X, [1.0, 2.0, 3.0, np.nan]))
    of_scikit_learn = caught(lambda: ConvexBNRegressor(n_gates=0).fit(X, [1.0, 2.0, 3.0, 4.0]))
    foreign = caught(lambda: np.linalg.cholesky(-np.eye(2)))
    assert attack.is_ours(ours) and attack.is_ours(of_scikit_learn) and not attack.is_ours(foreign)
    assert not attack.is_ours(caught(lambda: 1 / 0))


def test_rows_beyond_their_margins_have_a_dual_of_zero():
    X = np.random.default_rng(58).standard_normal((6, 5))
    model = ConvexBNClassifier(loss="squared_hinge", weight_decay=1e-3, n_gates=10, random_state=0)
    proof = model.fit(X, [0, 1, 2, 0, 1, 2]).certificate_
    assert proof.status is not Status.NUMERICAL and 0 <= proof.lower_bound <= proof.objective


@pytest.mark.parametrize("share", [0.3, 3.0])
@pytest.mark.parametrize("outlier", [1e6, 1e9, 1e12])
@pytest.mark.parametrize("weight_decay", [1.0, "auto"])
def test_an_outlier_beyond_float32(outlier, share, weight_decay):
    rng = np.random.default_rng(10)
    X, y = rng.standard_normal((16, 2)), rng.standard_normal(16)
    y[0] = outlier
    model = ConvexBNRegressor(
        loss="huber", huber_delta=share * outlier, weight_decay=weight_decay, n_gates=3, random_state=0, max_iter=30
    ).fit(X, y)
    assert np.isfinite(model.predict(X)).all() and model.certificate_.lower_bound <= model.certificate_.objective


def test_a_solver_that_breaks_while_weight_decays_are_compared(monkeypatch):
    """Where its matrices cannot be factorised, descent goes on: for the held-out rows as for the fit."""

    def broken(*_):
        raise np.linalg.LinAlgError("not positive definite")

    monkeypatch.setattr("convexbn.solvers.gated.group_newton._Scaled._factorize", broken)
    rng = np.random.default_rng(0)
    X = rng.standard_normal((30, 3))
    model = ConvexBNRegressor(n_gates=5, random_state=0).fit(X, np.abs(X[:, 0]))
    assert model.certificate_.status is Status.CERTIFIED and model.certificate_.relative_gap <= model.tol


def test_gates_are_trained_where_no_neuron_begins_above_zero():
    X = np.random.default_rng(9).standard_normal((3, 1))
    model = ConvexBNRegressor(n_gates=1, random_state=9, fit_intercept=False, weight_decay=0.1).fit(X, X[:, 0])
    assert model.certificate_.status is Status.CERTIFIED
