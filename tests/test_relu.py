"""activation="relu" at the doors: any data, any loss, certified over all patterns where the bounds reach."""

import time
from dataclasses import replace

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

import convexbn
from convexbn import ConvexBNClassifier, ConvexBNRegressor, Status, max_weight_decay
from convexbn._types import now
from convexbn.certificate.certificate import certify
from convexbn.program.losses import SquaredLoss
from convexbn.program.output_bias import WithOutputBias
from convexbn.program.relu import ReluProgram
from convexbn.training.training_set import TrainingSet
from instances import neuron_arrays

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def rows(n=40, d=2, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


def values_of(X, K=1, seed=1):
    """A teacher of five batch-normalised neurons, with noise."""
    rng = np.random.default_rng(seed)
    Y = np.maximum(X @ rng.standard_normal((X.shape[1], 5)) + 0.3, 0) @ rng.standard_normal((5, K))
    Y += 0.3 * Y.std() * rng.standard_normal(Y.shape)
    return Y[:, 0] if K == 1 else Y


def classes_of(X, n_classes=3):
    score = X[:, 0] * X[:, 1]
    return np.searchsorted(np.quantile(score, np.arange(1, n_classes) / n_classes), score)


def regressor(**changes):
    return ConvexBNRegressor(**{"activation": "relu", "random_state": 0, **changes})


def classifier(**changes):
    return ConvexBNClassifier(**{"activation": "relu", "random_state": 0, **changes})


def own_objective(model, X, y, weights=1.0):
    """Weight-decay objective of the squared loss from raw rows, with the network's batch norm written out."""
    N, n = model.network_, model.network_.n_effective
    response = X @ N.weight
    weights = np.broadcast_to(weights, len(X))
    response = response - weights @ response / n
    response *= np.sqrt(n / (weights @ response**2))
    outputs = np.maximum((N.gamma * response + N.shift) / np.sqrt(n), 0) @ N.output + N.output_bias
    loss = 0.5 * weights @ np.sum((outputs - y.reshape(len(X), -1)) ** 2, axis=1)
    return loss + 0.5 * model.weight_decay_ * (N.gamma @ N.gamma + N.shift @ N.shift + np.sum(N.output**2))


@pytest.mark.parametrize("fraction", [0.3, 0.1])
def test_regression_is_certified_over_all_patterns(fraction):
    X = rows()
    y = values_of(X)
    largest, upper = max_weight_decay(X, y, activation="relu")
    assert largest <= upper <= largest * (1 + 1e-5)
    model = regressor(weight_decay=fraction * largest).fit(X, y)
    proof = model.certificate_
    assert proof.status is Status.CERTIFIED and proof.scope == "all patterns", proof.sentence
    assert proof.bound == "every cell" and proof.estimated_gap == proof.relative_gap
    assert own_objective(model, X, y) == pytest.approx(proof.objective, rel=1e-9)
    assert proof.weight_decay_objective == pytest.approx(proof.objective, rel=1e-9)
    assert model.gates_ is None and model.network_.gates is None and (model.transform(X) >= 0).all()
    again = model.certify(X, y)
    assert again.status is Status.CERTIFIED and again.objective == proof.objective


@pytest.mark.parametrize("K", [2, 3])
def test_several_outputs_are_certified(K):
    X = rows()
    Y = values_of(X, K)
    largest, upper = max_weight_decay(X, Y, activation="relu")
    assert largest <= upper <= largest * (1 + 1e-4)
    model = regressor(weight_decay=0.3 * largest, tol=1e-5, proof_time=60).fit(X, Y)
    assert model.certificate_.status is Status.CERTIFIED, model.certificate_.sentence
    assert own_objective(model, X, Y) == pytest.approx(model.certificate_.objective, rel=1e-9)
    assert model.predict(X).shape == Y.shape


@pytest.mark.parametrize(("loss", "n_classes"), [("logistic", 2), ("squared", 2), ("cross_entropy", 3)])
def test_classification_by_every_loss(loss, n_classes):
    X = rows(60)
    y = classes_of(X, n_classes)
    model = classifier(loss=loss, weight_decay=0.5, time_limit=10).fit(X, y)
    proof = model.certificate_
    assert proof.relative_gap <= 1e-2 and proof.scope == "all patterns", proof.sentence
    assert model.score(X, y) > LogisticRegression().fit(X, y).score(X, y) + 0.1
    assert model.predict_proba(X).shape == (60, n_classes)


@pytest.mark.parametrize(("fraction", "gap"), [(0.1, 0.01), (0.02, 0.05)])
def test_iris_within_the_gaps_that_are_promised(fraction, gap):
    X, y = load_iris(return_X_y=True)
    largest = np.sqrt(50)  # max_weight_decay: a neuron that is open on one class
    model = classifier(weight_decay=fraction * largest, tol=gap, proof_time=300).fit(X, y)
    assert model.certificate_.status is Status.CERTIFIED, model.certificate_.sentence


def test_valid_and_estimated_gap_are_told_apart():
    X = rows(80, 9)
    y = values_of(X)
    with pytest.warns(ConvergenceWarning, match="RESTRICTED"):
        model = regressor(weight_decay=2.0).fit(X, y)
    proof = model.certificate_
    assert proof.status is Status.RESTRICTED and proof.estimated_gap <= proof.tolerance < proof.relative_gap
    assert "an estimate, not a bound" in proof.sentence and "valid" in proof.sentence


@pytest.mark.cpu_clock
def test_a_time_limit_is_obeyed_by_solver_and_proof():
    X = rows(300, 15)
    Y = values_of(X, 3)
    for limit in (0, 2):
        started = time.process_time()
        model = regressor(time_limit=limit).fit(X, Y)
        assert time.process_time() - started <= limit + 1  # for steps that nothing cuts short
        assert model.certificate_.status in (Status.GAP_OPEN, Status.RESTRICTED)
        assert 0 <= model.certificate_.relative_gap <= 1


def test_a_callback_stops_the_rounds():
    X = rows(100, 6)
    seen = []
    model = regressor(callback=lambda progress: seen.append(progress) or True, time_limit=3).fit(X, values_of(X))
    assert len(seen) == model.n_iter_ == 1
    assert model.certificate_.status in (Status.INTERRUPTED, Status.CERTIFIED)


def test_after_a_callback_no_bound_is_tried_but_the_cheapest():
    X = rows(900, 20)
    with pytest.warns(ConvergenceWarning, match="INTERRUPTED"):
        model = regressor(callback=lambda progress: True, weight_decay=1.0, width=20).fit(X, values_of(X))
    proof = model.certificate_
    assert proof.bound == "orthant" and proof.estimated_gap is None and proof.lower_bound <= proof.objective


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("fit_intercept", [False, True])
def test_zero_is_optimal_above_the_largest_weight_decay(K, fit_intercept):
    """Without neurons the network predicts zero, or the mean of the targets."""
    X = rows()
    Y = values_of(X, K)
    largest, upper = max_weight_decay(X, Y, activation="relu", fit_intercept=fit_intercept)
    model = regressor(weight_decay=upper * (1 + 1e-6), fit_intercept=fit_intercept).fit(X, Y)
    assert model.certificate_.status is Status.TRIVIAL and model.network_.n_neurons == 0
    mean = Y.mean(axis=0) if fit_intercept else np.zeros(Y.shape[1:])
    assert np.abs(model.predict(X) - mean).max() < 1e-14 and model.transform(X).shape == (40, 0)
    below = regressor(weight_decay=0.99 * largest, fit_intercept=fit_intercept).fit(X, Y)
    assert below.certificate_.status is Status.CERTIFIED and below.network_.n_neurons > 0


@pytest.mark.parametrize("fit_intercept", [False, True])
def test_acute_targets_at_rank_n_minus_1_have_a_network_too(fit_intercept):
    X, Y = rows(6, 8), np.abs(rows(6, 2, seed=1)) + 0.1
    model = regressor(weight_decay=0.1, fit_intercept=fit_intercept).fit(X, Y)
    assert model.certificate_.relative_gap <= 1e-4, model.certificate_.sentence
    assert own_objective(model, X, Y) == pytest.approx(model.certificate_.objective, rel=1e-9)


def test_repetition_equals_weights():
    X = rows(25)
    y = values_of(X)
    counts = np.random.default_rng(3).integers(1, 4, 25)
    model = regressor(weight_decay=0.5, time_limit=2)
    weighted = clone(model).fit(X, y, counts).certificate_
    repeated = clone(model).fit(np.repeat(X, counts, axis=0), np.repeat(y, counts)).certificate_
    assert weighted.objective == pytest.approx(repeated.objective, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_invariance_to_units_mixing_and_order_of_rows(seed):
    rng = np.random.default_rng(seed)
    X = rows(30, 3, seed)
    y = values_of(X)
    model = regressor(weight_decay=0.5, time_limit=20)
    expected = clone(model).fit(X, y)
    order = rng.permutation(30)
    for changed, targets in ((X * [1e-3, 1.0, 1e4], y), (X @ rng.standard_normal((3, 3)), y), (X[order], y[order])):
        found = clone(model).fit(changed, targets)
        assert found.certificate_.objective == pytest.approx(expected.certificate_.objective, rel=1e-6)


def test_truncated_programs_say_so():
    X = rows(60, 6) * [10, 5, 2, 1, 0.5, 0.1]
    model = regressor(rank=2, weight_decay=30.0).fit(X, values_of(X))
    assert model.rank_ == 2 and "leading 2 directions" in model.certificate_.sentence
    assert model.certificate_.status is Status.CERTIFIED, model.certificate_.sentence


def test_save_and_load(tmp_path):
    X = rows()
    y = values_of(X)
    model = regressor(weight_decay=1.0).fit(X, y)
    model.save(tmp_path / "model")
    again = convexbn.load(tmp_path / "model")
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    assert again.certify(X, y) == model.certify(X, y)
    assert again.certificate_ == model.certificate_


def test_a_gated_model_becomes_a_relu_network_with_its_outputs():
    X = rows(60, 4)
    y = values_of(X)
    model = ConvexBNRegressor(n_gates=20, random_state=0).fit(X, y)
    conversion = model.to_relu(X, y)
    assert conversion.network.gates is None and conversion.n_unrealisable == 0
    np.testing.assert_allclose(conversion.network.predict(X)[:, 0], model.predict(X), atol=1e-9)
    assert conversion.objective_before == pytest.approx(model.certificate_.objective, rel=1e-9)
    assert conversion.objective_after >= conversion.objective_before
    with pytest.raises(ValueError, match="others"):
        model.to_relu(X[:-1], y[:-1])
    with pytest.raises(ValueError, match="already"):
        regressor(weight_decay=5.0).fit(X, y).to_relu(X, y)


def test_the_seed_decides_and_the_global_one_is_left_alone():
    X = rows(60, 4)
    y = values_of(X)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (regressor(max_iter=3, proof_time=0).fit(X, y) for _ in range(2))
    np.testing.assert_array_equal(first.network_.weight, second.network_.weight)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_no_wrong_relu_network_is_certified(capsys):
    """The honesty count of ReLU runs, one output and several: perturbed networks and runs that were cut short."""
    rng = np.random.default_rng(0)
    runs = refused = false = 0
    for seed in range(6):
        X, fit_intercept = rows(20, 2, seed), bool(seed % 2)
        Y = values_of(X, 1 + seed % 3).reshape(20, -1)
        data = TrainingSet.prepare(X, Y, np.ones(20), loss=SquaredLoss, fit_intercept=fit_intercept)
        beta = 0.2 * data.max_weight_decay_relu()[0]
        other = SquaredLoss(data.loss.targets[::-1], np.ones(20))
        other = WithOutputBias.with_decay(other, 0.0) if fit_intercept else other
        model = regressor(weight_decay=beta, time_limit=4, fit_intercept=fit_intercept).fit(X, Y)
        assert model.certificate_.relative_gap <= 1e-4, model.certificate_.sentence
        optimum = model.certificate_.lower_bound
        for network in _wrong(model.network_, rng):
            for loss in (data.loss, other):
                question = data.question(ReluProgram(data.whitening.rows, loss, beta), 1e-6)
                proof = certify(question, network, deadline=now() + 0.1)
                runs += 1
                certified = proof.status in (Status.CERTIFIED, Status.TRIVIAL)
                refused += not certified
                false += certified and loss is data.loss and proof.objective > optimum * (1 + 1e-4)
                false += loss is data.loss and proof.lower_bound > model.certificate_.objective * (1 + 1e-9)
        short = regressor(weight_decay=beta, max_iter=1, fit_intercept=fit_intercept).fit(X, Y).certificate_
        false += short.lower_bound > model.certificate_.objective * (1 + 1e-9)
        runs += 1
    with capsys.disabled():
        print(f"\nhonesty count (ReLU): {false} wrong results CERTIFIED over {runs} runs ({refused} refused)")
    assert runs >= 60 and refused >= 0.9 * runs - 6 and false == 0


def _wrong(network, rng):
    """Networks that are not the optimum."""
    noise = rng.standard_normal(network.weight.shape)
    yield replace(network, output=network.output * (1 + 3e-3))
    yield replace(network, gamma=network.gamma * (1 + 3e-3))
    yield replace(network, weight=network.weight + 0.03 * np.abs(network.weight).mean() * noise)
    yield replace(network, shift=network.shift + 0.03)
    yield replace(network, **{k: v[:, 1:] if k == "weight" else v[1:] for k, v in neuron_arrays(network).items()})
    yield replace(network, output=-network.output)
    if network.output_bias.any():
        yield replace(network, output_bias=network.output_bias + 0.05)
