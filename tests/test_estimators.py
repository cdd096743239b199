"""The estimators' interface: attributes, conventions, defaults on digits, invariances, scikit-learn's machinery."""

import copy
import dataclasses
import functools
import pickle
import warnings

import cvxpy as cp
import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from convexbn import ConvexBNClassifier, ConvexBNRegressor, Status, max_weight_decay
from convexbn.certificate import gated
from convexbn.program.gated import GateBlocks, gated_outputs
from convexbn.solvers.base import Progress
from instances import proof_of_blocks


def rows(n=60, d=4, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


def classes_of(X, n_classes=3):
    score = X[:, 0] * X[:, 1]
    return np.searchsorted(np.quantile(score, np.arange(1, n_classes) / n_classes), score)


def values_of(X, K=1):
    Y = np.column_stack([np.sin((k + 1) * X[:, 0]) + X[:, 1] ** 2 - 1 for k in range(K)])
    return Y[:, 0] if K == 1 else Y


def classifier(**changes):
    return ConvexBNClassifier(**{"n_gates": 20, "random_state": 0, **changes})


def regressor(**changes):
    return ConvexBNRegressor(**{"n_gates": 20, "random_state": 0, **changes})


def blocks_of(model, X, y, weights=None):
    """The program of a fitted model on its rows, and the blocks that its neurons add up to."""
    weights = np.ones(len(X)) if weights is None else weights
    data = model._training_set(X, model._encode_known(y), weights)
    program = data.gated_program(model.gates_, model.gate_offsets_, model.weight_decay_)
    network = model.network_
    centred = (data.X - network.mean) @ network.weight / np.sqrt(weights.sum())
    first = data.whitening.coordinates(centred, data.loss.weights)[:-1]
    first = np.vstack([network.gamma * first, network.shift])
    used, place = np.unique(network.gate_index, return_inverse=True)
    blocks = np.zeros((len(used), *program.block_shape))
    np.add.at(blocks, place, first.T[:, :, None] * network.output[:, None, :])
    return program, used, blocks


# -- attributes and conventions --


def test_defaults_are_the_documented_ones():
    expected = {"activation": "gated", "weight_decay": "auto", "gates": "trained", "rank": None}
    expected |= {"linear": True, "fit_intercept": True, "standardize": True, "spectral_filter": "auto"}
    expected |= {"solver": "auto", "tol": 1e-6, "time_limit": None, "proof_time": None, "random_state": None}
    for model, loss in ((ConvexBNClassifier(), "auto"), (ConvexBNRegressor(), "squared")):
        parameters = model.get_params()
        assert (expected | {"loss": loss}).items() <= parameters.items()
        assert {"n_gates", "max_iter"} <= set(parameters)


@pytest.mark.parametrize("K", [1, 3])
def test_shapes_of_a_gated_network(K):
    X = rows()
    model = regressor().fit(X, values_of(X, K))
    network, d, m, P = model.network_, 4, model.network_.n_neurons, model.gates_.shape[1]
    shapes = {"weight": (d, m), "gamma": (m,), "shift": (m,), "output": (m, K), "mean": (d,), "output_bias": (K,)}
    shapes |= {"gates": (d, m), "gate_offsets": (m,), "gate_index": (m,)}
    assert {name: getattr(network, name).shape for name in shapes} == shapes
    assert model.gates_.shape == (d, P) and model.gate_offsets_.shape == (P,) and 0 < P <= 21
    assert not model.gates_[:, 0].any() and model.gate_offsets_[0] == 1
    assert network.n_effective == 60 and np.allclose(network.mean, X.mean(axis=0))
    assert np.array_equal(network.gates, model.gates_[:, network.gate_index])
    assert np.array_equal(network.gate_offsets, model.gate_offsets_[network.gate_index])
    assert model.n_features_in_ == d and model.rank_ == 4 and model.n_iter_ == len(model.history_) > 0
    assert all(isinstance(point, Progress) for point in model.history_)


def test_the_certificate_has_the_documented_fields():
    X = rows()
    proof = classifier().fit(X, classes_of(X)).certificate_
    names = ["objective", "lower_bound", "gap", "relative_gap", "tolerance", "scope", "status", "sentence"]
    names += ["stopped_by"]
    assert all(hasattr(proof, name) for name in names)
    assert proof.status is Status.CERTIFIED and proof.scope == "these gates" and proof.tolerance == 1e-6
    assert proof.gap == proof.objective - proof.lower_bound
    assert "one Frobenius norm per gate" in proof.sentence
    assert proof.weight_decay_objective >= proof.objective


@pytest.mark.parametrize("weighted", [False, True])
def test_hidden_activations_follow_the_written_formula(weighted):
    X, rng = rows(), np.random.default_rng(1)
    weights = rng.uniform(0.5, 2, 60) if weighted else np.ones(60)
    model = regressor().fit(X, values_of(X, 2), weights)
    N, new = model.network_, rows(7, seed=2)
    mean, n = weights @ X / weights.sum(), weights.sum()
    norms = np.sqrt(weights @ ((X - mean) @ N.weight) ** 2)
    hidden = N.gamma * ((new - mean) @ N.weight) / norms + N.shift / np.sqrt(n)
    hidden *= (new - mean) @ N.gates + N.gate_offsets >= 0
    np.testing.assert_allclose(model.transform(new), hidden, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(model.predict(new), hidden @ N.output + N.output_bias, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(N.predict(new), model.predict(new), rtol=0, atol=0)


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("tau", [0, 0.3])
@pytest.mark.parametrize("standardize", [False, True])
def test_neurons_are_balanced_and_their_norms_are_the_penalty(K, tau, standardize):
    X = rows() * [9, 3, 1, 0.3]
    y = values_of(X, K)
    model = regressor(tol=1e-10, weight_decay=0.3, spectral_filter=tau or None, standardize=standardize).fit(X, y)
    N = model.network_
    np.testing.assert_allclose(N.gamma**2 + N.shift**2, np.sum(N.output**2, axis=1), rtol=1e-10)
    loss = 0.5 * np.sum((model.predict(X) - y) ** 2)
    plain = loss + 0.3 * np.sum(N.output**2)
    assert plain == pytest.approx(model.certificate_.weight_decay_objective, rel=1e-9)
    if K == 1:  # with a filter small singular directions cost more: gamma^2 (1 + tau^2 ||w||^2 / n) + shift^2
        unit = X.std(axis=0) if standardize else np.ones(4)
        largest = np.linalg.norm((X - X.mean(axis=0)) / unit, 2)
        w = unit[:, None] * N.weight / np.std(X @ N.weight, axis=0)
        cost = 1 + (tau * largest) ** 2 * np.sum(w**2, axis=0) / 60
        penalty = np.sqrt(N.gamma**2 * cost + N.shift**2) @ np.abs(N.output[:, 0])
        assert loss + 0.3 * penalty == pytest.approx(model.certificate_.objective, rel=1e-10)
    assert (N.gamma >= 0).all()
    program, used, blocks = blocks_of(model, X, y)
    proof = proof_of_blocks(program, GateBlocks(used, blocks), 1e-6, "tolerance")
    assert proof.objective == pytest.approx(model.certificate_.objective, rel=1e-10)
    # rank(S_i) neurons a gate, and their plain weight decay is the nuclear norm
    ranks = np.linalg.matrix_rank(blocks, tol=1e-10 * np.linalg.norm(blocks))
    assert N.n_neurons >= ranks.sum() and np.bincount(N.gate_index).max() <= min(5, K)
    if tau == 0:
        assert proof.weight_decay_objective == pytest.approx(plain, rel=1e-9)


def test_two_classes_are_one_output_and_three_are_one_hot():
    X = rows()
    two, three = (classifier(loss="squared").fit(X, classes_of(X, k)) for k in (2, 3))
    assert two.network_.output.shape[1] == 1 and two.decision_function(X).shape == (60,)
    assert three.network_.output.shape[1] == 3 and three.decision_function(X).shape == (60, 3)
    signs = ConvexBNRegressor(n_gates=20, random_state=0).fit(X, np.where(classes_of(X, 2) == 1, 1.0, -1.0))
    np.testing.assert_array_equal(two.decision_function(X), signs.predict(X))
    one_hot = ConvexBNRegressor(n_gates=20, random_state=0).fit(X, np.eye(3)[classes_of(X, 3)])
    np.testing.assert_array_equal(three.decision_function(X), one_hot.predict(X))


@pytest.mark.parametrize(
    ("loss", "factor"), [("squared", 2), ("squared_hinge", 2), ("logistic", 1), ("cross_entropy", 1)]
)
def test_probabilities_of_two_classes_are_the_sigmoid(loss, factor):
    X = rows()
    for weight_decay in (0.5, "auto"):
        model = classifier(loss=loss, tol=1e-4, weight_decay=weight_decay).fit(X, classes_of(X, 2))
        f = model.decision_function(X)
        p = model.predict_proba(X)
        # held-out rows calibrate the outputs of losses that do not model probabilities
        assert (model.temperature_ is None) == (weight_decay == 0.5 or factor == 1)
        inverse = factor if model.temperature_ is None else 1 / model.temperature_
        np.testing.assert_allclose(p[:, 1], 1 / (1 + np.exp(-inverse * f)), rtol=1e-12)
        np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-15)
        np.testing.assert_array_equal(model.predict(X), model.classes_[p.argmax(axis=1)])


@pytest.mark.parametrize("loss", ["squared", "squared_hinge", "cross_entropy"])
def test_probabilities_of_three_classes_are_the_softmax(loss):
    X = rows()
    for weight_decay in (0.5, "auto"):
        model = classifier(loss=loss, tol=1e-4, weight_decay=weight_decay)
        f = model.fit(X, np.array(["b", "a", "c"])[classes_of(X)]).decision_function(X)
        assert (model.temperature_ is None) == (weight_decay == 0.5 or loss == "cross_entropy")
        e = np.exp(f / (model.temperature_ or 1.0))
        np.testing.assert_allclose(model.predict_proba(X), e / e.sum(axis=1, keepdims=True), rtol=1e-12)
        assert model.classes_.tolist() == ["a", "b", "c"]
        np.testing.assert_array_equal(model.predict(X), model.classes_[f.argmax(axis=1)])


def test_cross_entropy_of_two_classes_is_the_logistic_loss():
    X = rows()
    one, two = (classifier(loss=loss).fit(X, classes_of(X, 2)) for loss in ("logistic", "cross_entropy"))
    assert one.certificate_.objective == two.certificate_.objective
    with pytest.raises(ValueError, match="two classes"):
        classifier(loss="logistic").fit(X, classes_of(X, 3))


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_squared_hinge_tells_every_class_from_the_others(n_classes):
    X, tiny = rows(), 1e-9
    y = classes_of(X, n_classes)
    model = classifier(loss="squared_hinge", n_gates=5, tol=1e-7).fit(X, y)
    assert model.certificate_.status is Status.CERTIFIED and model.score(X, y) > 0.8
    signs = 2.0 * (y[:, None] == np.arange(n_classes)) - 1
    signs = signs[:, 1:] if n_classes == 2 else signs
    margins = signs * model.decision_function(X).reshape(60, -1)
    assert (margins > 1).any() and (margins < 1).any()
    loss = 0.5 * np.sum(np.maximum(1 - margins, 0) ** 2)
    _, _, blocks = blocks_of(model, X, y)
    penalty = model.weight_decay_ * np.linalg.norm(blocks, axis=(1, 2)).sum()
    assert model.certificate_.objective == pytest.approx(loss + penalty, rel=tiny)


def test_the_huber_loss_is_the_squared_one_up_to_delta_and_bounds_the_pull_of_outliers():
    X = rows()
    y = values_of(X)
    far = 10 * np.ptp(y)
    squared, huber = regressor(weight_decay=0.3).fit(X, y), regressor(weight_decay=0.3, loss="huber", huber_delta=far)
    assert huber.fit(X, y).certificate_.objective == pytest.approx(squared.certificate_.objective, rel=2e-6)
    wrong = y + np.where(np.arange(60) % 10 == 0, 100.0, 0.0)
    scores = [
        model.set_params(weight_decay=0.1).fit(X, wrong).score(X, y)
        for model in (regressor(), regressor(loss="huber", huber_delta=0.3))
    ]
    assert scores[0] < 0 < 0.5 < scores[1]
    assert regressor(loss="huber", huber_delta=0.3).fit(X, np.c_[y, -y]).certificate_.status is Status.CERTIFIED


@pytest.mark.parametrize("delta", [0, -1.0, np.inf, "1"])
def test_a_delta_that_is_none_is_refused(delta):
    X = rows()
    with pytest.raises(ValueError, match="huber_delta"):
        regressor(loss="huber", huber_delta=delta).fit(X, values_of(X))


def test_regression_keeps_the_shape_of_the_targets():
    X = rows()
    y = values_of(X)
    assert regressor().fit(X, y).predict(X).shape == (60,)
    assert regressor().fit(X, y[:, None]).predict(X).shape == (60, 1)
    assert regressor().fit(X, np.c_[y, -y]).predict(X).shape == (60, 2)
    assert regressor().fit(X, y).score(X, y) > 0.5


# -- weight decay --


@pytest.mark.parametrize("gates", ["data", "whitened", "given"])
@pytest.mark.parametrize("solver", ["group_newton", "proximal"])
@pytest.mark.parametrize("fit_intercept", [False, True])
def test_zero_is_optimal_exactly_from_max_weight_decay_on(gates, solver, fit_intercept):
    X, rng = rows(), np.random.default_rng(3)
    gates = rng.standard_normal((5, 20)) if gates == "given" else gates
    options = {"gates": gates, "n_gates": 20, "random_state": 0, "fit_intercept": fit_intercept}
    for K in (1, 3):
        y = values_of(X, K)
        largest = max_weight_decay(X, y, **options)
        at = ConvexBNRegressor(weight_decay=largest, solver=solver, **options).fit(X, y)
        assert at.certificate_.status is Status.TRIVIAL and at.network_.n_neurons == 0
        mean = np.broadcast_to(fit_intercept * y.mean(axis=0), y.shape)
        np.testing.assert_allclose(at.predict(X), mean, rtol=1e-13)
        assert at.transform(X).shape == (60, 0)
        below = ConvexBNRegressor(weight_decay=0.99 * largest, solver=solver, tol=1e-9, **options).fit(X, y)
        assert below.certificate_.status is Status.CERTIFIED and below.network_.n_neurons > 0


@pytest.mark.parametrize("solver", ["group_newton", "proximal"])
def test_zero_is_optimal_at_max_weight_decay_with_weights(solver):
    """To the last bit: whatever the weights round to."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        X, y, weights = rng.standard_normal((50, 4)), rng.standard_normal((50, 1 + seed % 3)), rng.uniform(0.1, 3, 50)
        largest = max_weight_decay(X, y, sample_weight=weights, random_state=seed, n_gates=50)
        model = ConvexBNRegressor(weight_decay=largest, random_state=seed, n_gates=50, solver=solver)
        assert model.fit(X, y, weights).certificate_.status is Status.TRIVIAL, seed


def test_max_weight_decay_of_the_huber_loss():
    X = rows()
    y, options = values_of(X), {"loss": "huber", "huber_delta": 0.2, "n_gates": 20, "random_state": 0}
    largest = max_weight_decay(X, y, **options)
    assert ConvexBNRegressor(weight_decay=largest, **options).fit(X, y).certificate_.status is Status.TRIVIAL
    below = ConvexBNRegressor(weight_decay=0.9 * largest, **options).fit(X, y)
    assert below.certificate_.status is Status.CERTIFIED and below.network_.n_neurons > 0


@pytest.mark.parametrize("loss", ["squared_hinge", "logistic", "cross_entropy"])
def test_max_weight_decay_of_other_losses(loss):
    X = rows()
    y = classes_of(X, 2 if loss == "logistic" else 3)
    largest = max_weight_decay(X, y, loss=loss, n_gates=20, random_state=0)
    assert classifier(loss=loss, weight_decay=largest).fit(X, y).certificate_.status is Status.TRIVIAL
    below = classifier(loss=loss, weight_decay=0.9 * largest).fit(X, y)
    assert below.certificate_.status is Status.CERTIFIED and below.network_.n_neurons > 0


def test_max_weight_decay_takes_integers_for_classes_and_floats_for_targets():
    X = rows()
    y = classes_of(X, 2)
    signs = np.where(y == 1, 1.0, -1.0)
    settings = {"loss": "squared", "random_state": 0}
    assert max_weight_decay(X, y, **settings) == max_weight_decay(X, signs, **settings)
    assert max_weight_decay(X, np.array(["a", "b"])[y], **settings) == max_weight_decay(X, y, **settings)


@pytest.mark.parametrize(
    "wrong",
    [{"activation": "foo"}, {"loss": "foo"}, {"gates": "foo"}, {"n_gates": 0}, {"rank": 0}, {"loss": "logistic"}],
)
def test_max_weight_decay_refuses_what_the_estimators_refuse(wrong):
    X = rows()
    with pytest.raises(ValueError):
        max_weight_decay(X, classes_of(X, 3), **wrong)


def test_auto_weight_decay_is_a_halving_of_the_largest():
    X = rows()
    y = classes_of(X)
    largest = max_weight_decay(X, y, n_gates=20, random_state=0)
    # noise in the targets grows with the root of the number of rows, and folds have four fifths of them
    halvings = np.log2(largest * np.sqrt(0.8) / classifier().fit(X, y).weight_decay_)
    assert halvings == pytest.approx(round(halvings), abs=1e-12) and 1 <= halvings <= 10
    assert "among halvings of :func:`max_weight_decay`" in " ".join(ConvexBNClassifier.__doc__.split())
    assert classifier(weight_decay=0.7).fit(X, y).weight_decay_ == 0.7


# -- ReLU by formula --


@pytest.mark.parametrize("d", [7, 20])
@pytest.mark.parametrize(
    ("loss", "y"),
    [
        ("squared", [0, 1, 2, 0, 1, 2, 0, 1]),
        ("squared", [0, 1, 0, 0, 1, 1, 0, 1]),
        ("logistic", [0, 1, 0, 0, 1, 1, 0, 1]),
        ("cross_entropy", [0, 1, 2, 0, 1, 2, 0, 1]),
        ("squared_hinge", [0, 1, 0, 0, 1, 1, 0, 1]),
        ("squared_hinge", [0, 1, 2, 0, 1, 2, 0, 1]),
    ],
)
@pytest.mark.parametrize("fit_intercept", [False, True])
def test_relu_at_rank_n_minus_1_is_certified_over_all_networks(d, loss, y, fit_intercept):
    if fit_intercept and loss == "cross_entropy":
        y = y[:6]  # the formula with an intercept is for classes of equal weight
    X, options = rows(len(y), d), {"activation": "relu", "loss": loss, "fit_intercept": fit_intercept}
    largest, upper = max_weight_decay(X, y, **options)
    model = classifier(**options, weight_decay=0.02 * largest).fit(X, y)
    proof = model.certificate_
    assert proof.status is Status.CERTIFIED and proof.scope == "all patterns"
    assert proof.relative_gap <= 1e-12 and proof.stopped_by == "formula"
    assert model.gates_ is None and model.gate_offsets_ is None and model.network_.gate_index is None
    N = model.network_
    np.testing.assert_allclose(N.gamma**2 + N.shift**2, np.sum(N.output**2, axis=1), rtol=1e-10)
    assert (model.transform(X) >= 0).all() and model.score(X, y) == 1
    assert largest == upper
    trivial = classifier(**options, weight_decay=largest).fit(X, y)
    assert trivial.certificate_.status is Status.TRIVIAL
    below = classifier(**options, weight_decay=0.99 * largest).fit(X, y)
    assert below.certificate_.status is Status.CERTIFIED and below.network_.n_neurons > 0


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("fit_intercept", [False, True])
def test_relu_of_the_huber_loss_at_rank_n_minus_1(repeated, fit_intercept):
    """By formula, unless equal rows have different targets: these are not merged, and a search finds the optimum."""
    rng = np.random.default_rng(0)
    X, y = rows(6, 7), 2 * rng.standard_normal(6)
    if repeated:
        X, y = np.vstack([X, X[:2]]), np.append(y, [3.0, -2.0])
    options = {"activation": "relu", "loss": "huber", "huber_delta": 0.5, "fit_intercept": fit_intercept}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = regressor(**options, weight_decay=0.3).fit(X, y)
    proof = model.certificate_
    assert (proof.stopped_by == "formula") is not repeated
    up, down, place = cp.Variable(6, nonneg=True), cp.Variable(6, nonneg=True), np.arange(len(y)) % 6
    root = np.sqrt(np.bincount(place))
    penalty = cp.norm(cp.multiply(root, up)) + cp.norm(cp.multiply(root, down))
    bias = cp.Variable() if fit_intercept else 0.0
    fit = cp.sum(cp.huber((up - down)[place] + bias - y, 0.5)) / 2
    least = cp.Problem(cp.Minimize(fit + 0.3 * penalty)).solve(solver=cp.CLARABEL)
    assert proof.objective == pytest.approx(least, rel=1e-5)
    assert proof.lower_bound <= least * (1 + 1e-7)


# -- rank --


@pytest.mark.parametrize("standardize", [False, True])
def test_rank_counts_directions_or_their_share_of_the_variance(standardize):
    X = rows(80, 5) * [10, 5, 2, 1, 0.1]
    y = values_of(X / 10)
    unit = X.std(axis=0) if standardize else np.ones(5)
    variance = np.linalg.svd((X - X.mean(axis=0)) / unit, compute_uv=False) ** 2
    share = np.cumsum(variance) / variance.sum()

    def rank_of(rank=None):
        return regressor(rank=rank, standardize=standardize, gates="data", weight_decay=1.0).fit(X, y).rank_

    assert rank_of() == 5
    assert rank_of(2) == 2
    assert rank_of(99) == 5
    assert rank_of(1.0) == 5
    for k in (1, 2, 3):
        assert rank_of(float(share[k - 1]) - 1e-9) == k
        assert rank_of(float(share[k - 1]) + 1e-9) == k + 1


@pytest.mark.parametrize("standardize", [False, True])
def test_a_truncated_model_does_not_see_the_directions_left_out(standardize):
    X = rows(80, 5) * [10, 5, 2, 1, 0.1]
    model = regressor(rank=2, standardize=standardize).fit(X, values_of(X / 10))
    unit = X.std(axis=0) if standardize else np.ones(5)
    basis = np.linalg.svd((X - X.mean(axis=0)) / unit, full_matrices=False)[2]
    weight = unit[:, None] * model.network_.weight
    assert np.abs(basis[2:] @ weight).max() < 1e-10 * np.abs(weight).max()
    assert model.certificate_.status is Status.CERTIFIED


# -- gates --


def test_given_gates_with_and_without_offsets():
    X, rng = rows(), np.random.default_rng(4)
    directions, offsets = rng.standard_normal((4, 15)), rng.standard_normal(15)
    y = values_of(X)
    plain, zero = (regressor(gates=g).fit(X, y) for g in (directions, np.vstack([directions, np.zeros(15)])))
    np.testing.assert_array_equal(plain.predict(X), zero.predict(X))
    assert plain.gate_offsets_[0] == 1 and not plain.gate_offsets_[1:].any()
    model = regressor(gates=np.vstack([directions, offsets])).fit(X, y)
    assert {*model.gate_offsets_[1:]} <= {*offsets} and model.certificate_.status is Status.CERTIFIED
    opened = (X - X.mean(axis=0)) @ model.network_.gates + model.network_.gate_offsets >= 0
    assert not model.transform(X)[~opened].any()


def test_of_gates_with_equal_patterns_the_first_is_kept():
    X, rng = rows(), np.random.default_rng(5)
    gates = rng.standard_normal((4, 6))
    doubled = np.hstack([gates, 3 * gates[:, ::-1], gates])
    for linear in (False, True):  # the linear gate is the first
        model = regressor(gates=doubled, linear=linear).fit(X, values_of(X))
        np.testing.assert_array_equal(model.gates_, np.hstack([np.zeros((4, int(linear))), gates]))
        np.testing.assert_array_equal(model.gate_offsets_, [1] * linear + [0] * 6)


def test_gates_of_one_feature_have_two_patterns():
    X = rows(30, 1)
    for linear in (False, True):
        model = regressor(n_gates=500, gates="data", linear=linear).fit(X, X[:, 0] ** 2)
        assert model.gates_.shape == (1, 2 + linear)


def test_gates_are_drawn_as_documented():
    X = rows()
    y = values_of(X)
    expected = np.random.RandomState(7).standard_normal((4, 20))
    np.testing.assert_array_equal(regressor(random_state=7, gates="data", linear=False).fit(X, y).gates_, expected)
    model = regressor(random_state=7, gates="whitened", linear=False, spectral_filter=None).fit(X, y)
    assert model.gate_offsets_.any()
    covariance = np.cov(X.T, bias=True) * 60  # g = V S^-1 h: unit variance in the whitened space
    spread = np.einsum("dp,de,ep->p", model.gates_, covariance, model.gates_)
    assert 2 < spread.mean() < 7


def test_predict_uses_stored_statistics_alone():
    X = rows()
    model = regressor().fit(X, values_of(X))
    new = rows(40, seed=8) * 3 + 1
    together = model.predict(new)
    for size in (1, 7):
        apart = np.concatenate([model.predict(new[i : i + size]) for i in range(0, 40, size)])
        np.testing.assert_allclose(apart, together, rtol=1e-11, atol=1e-12)


# -- the solvers through the door --


@pytest.mark.parametrize("K", [1, 2])
def test_the_three_solvers_agree(K):
    X = rows(40)
    y = values_of(X, K)
    found = {
        solver: regressor(solver=solver, tol=1e-8, max_iter=20000 if solver == "proximal" else None).fit(X, y)
        for solver in ("group_newton", "proximal", "conic")
    }
    objectives = [model.certificate_.objective for model in found.values()]
    assert np.ptp(objectives) <= 1e-6 * min(objectives)
    assert all(model.certificate_.status is Status.CERTIFIED for model in found.values())


def test_a_solver_for_another_loss_is_refused():
    X = rows()
    with pytest.raises(TypeError, match="proximal"):
        classifier(loss="cross_entropy", solver="group_newton").fit(X, classes_of(X))


def test_an_open_gap_warns_with_cause_and_remedy():
    X = rows()
    with pytest.warns(ConvergenceWarning, match="raise max_iter"):
        model = regressor(max_iter=1, weight_decay=1e-3).fit(X, values_of(X))
    assert model.certificate_.status is Status.GAP_OPEN and model.certificate_.stopped_by == "max_iter"
    assert model.certificate_.lower_bound <= regressor(weight_decay=1e-3).fit(X, values_of(X)).certificate_.objective


def test_certify_recomputes_on_training_rows_and_on_others():
    X = rows()
    y = classes_of(X)
    model = classifier().fit(X, y)
    again = model.certify(X, y)
    assert again.status is Status.CERTIFIED
    assert again.objective == pytest.approx(model.certificate_.objective, rel=1e-12)
    assert again.lower_bound == pytest.approx(model.certificate_.lower_bound, rel=1e-12)
    other = model.certify(rows(seed=9), classes_of(rows(seed=9)))
    assert other.status is Status.GAP_OPEN and other.objective > again.objective
    with pytest.raises(ValueError, match="not seen in training"):
        model.certify(X, y + 1)


# -- digits --


@functools.cache
def digits():
    X, y = load_digits(return_X_y=True)
    split = train_test_split(X, y, test_size=0.2, stratify=y, random_state=0)
    return *split, ConvexBNClassifier(random_state=0).fit(split[0], split[2])


def test_defaults_certify_all_ten_digits_and_generalise():
    _, X_test, _, y_test, model = digits()
    proof = model.certificate_
    assert proof.status is Status.CERTIFIED and proof.relative_gap <= 1e-6 and len(model.classes_) == 10
    accuracy = model.score(X_test, y_test)
    assert accuracy >= 0.96, f"test accuracy {accuracy:.4f}"


def test_digits_certificate_is_confirmed_by_independent_arithmetic():
    X, _, y, _, model = digits()
    N = model.network_
    loss = 0.5 * np.sum((model.decision_function(X) - np.eye(10)[y]) ** 2)
    varying = X[:, X.std(axis=0) > 0]
    U, S, _ = np.linalg.svd((varying - varying.mean(axis=0)) / varying.std(axis=0), full_matrices=False)
    U, S = U[:, 1e-10 * S[0] < S], S[1e-10 * S[0] < S]
    phi = S / np.hypot(S, 0.3 * S[0])
    normalized = (X - X.mean(axis=0)) @ N.weight
    normalized /= np.linalg.norm(normalized, axis=0)
    first = np.vstack([N.gamma * (U.T @ normalized) / phi[:, None], N.shift])
    penalty = 0.0
    for gate in np.unique(N.gate_index):
        own = N.gate_index == gate
        penalty += np.linalg.norm(first[:, own] @ N.output[own])
    assert loss + model.weight_decay_ * penalty == pytest.approx(model.certificate_.objective, rel=1e-9)
    A = np.hstack([U * phi, np.full((len(X), 1), len(X) ** -0.5)])
    V = np.eye(10)[y] - model.decision_function(X)
    assert np.abs(V.sum(axis=0)).max() < 1e-9  # the output bias is at its best
    V -= V.mean(axis=0)
    opened = (X - X.mean(axis=0)) @ model.gates_ + model.gate_offsets_ >= 0
    norms = [np.linalg.norm(A.T @ (gate[:, None] * V)) for gate in opened.T]
    t = min(1, model.weight_decay_ / max(norms))
    bound = t * np.sum(V * np.eye(10)[y]) - 0.5 * t**2 * np.sum(V**2)
    assert bound <= model.certificate_.lower_bound * (1 + 1e-9)
    assert bound >= model.certificate_.objective * (1 - 1e-5)


# -- invariances --


@pytest.mark.parametrize("gates", ["data", "whitened", "trained"])
def test_order_of_rows_changes_no_bit(gates):
    X = rows()
    y, order = classes_of(X), np.random.default_rng(0).permutation(60)
    one, two = classifier(gates=gates).fit(X, y), classifier(gates=gates).fit(X[order], y[order])
    np.testing.assert_array_equal(one.network_.weight, two.network_.weight)
    np.testing.assert_array_equal(one.predict_proba(X), two.predict_proba(X))
    assert one.fingerprint_ == two.fingerprint_ == one.fingerprint(X[order], y[order])


def test_order_of_weighted_equal_rows_changes_no_bit():
    """Three copies of each row with weights whose sum depends on the order of addition."""
    X = np.repeat(rows(20), 3, axis=0)
    y, weights = classes_of(X), np.tile([0.1, 0.2, 0.3], 20)
    order = np.random.default_rng(0).permutation(60)
    one, two = classifier().fit(X, y, weights), classifier().fit(X[order], y[order], weights[order])
    np.testing.assert_array_equal(one.predict_proba(X), two.predict_proba(X))
    assert one.fingerprint_ == two.fingerprint_


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("gates", ["data", "whitened", "trained"])
def test_repetition_equals_weights(dtype, gates):
    X, rng = rows().astype(dtype), np.random.default_rng(6)
    y, times = classes_of(X), rng.integers(0, 5, 60)
    repeated = classifier(gates=gates).fit(np.repeat(X, times, axis=0), np.repeat(y, times))
    weighted = classifier(gates=gates).fit(X, y, sample_weight=times)
    np.testing.assert_allclose(weighted.predict_proba(X), repeated.predict_proba(X), rtol=1e-7, atol=1e-9)
    assert weighted.certificate_.objective == repeated.certificate_.objective
    assert weighted.network_.n_effective == times.sum() and weighted.rank_ == repeated.rank_


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_non_integer_weights_add_up(dtype):
    """Weights 0.3 and 0.7 of two copies are one row, and weights k/4 are the repeated data at a scaled decay."""
    X, rng = rows().astype(dtype), np.random.default_rng(6)
    y, times = values_of(X), rng.integers(1, 5, 60)
    halves = regressor(weight_decay=0.5).fit(np.vstack([X, X]), np.r_[y, y], np.repeat([0.3, 0.7], 60))
    whole = regressor(weight_decay=0.5).fit(X, y)
    np.testing.assert_allclose(halves.predict(X), whole.predict(X), rtol=1e-7, atol=1e-9)
    quarter = regressor(weight_decay=0.5).fit(X, y, times / 4)
    repeated = regressor(weight_decay=1.0).fit(np.repeat(X, times, axis=0), np.repeat(y, times))
    np.testing.assert_allclose(quarter.predict(X), repeated.predict(X), rtol=1e-7, atol=1e-9)
    assert 4 * quarter.certificate_.objective == pytest.approx(repeated.certificate_.objective, rel=1e-12)


@pytest.mark.parametrize("times", [2, 10, 1000])
def test_rank_and_predictions_survive_repetition_in_float32(times):
    rng = np.random.default_rng(7)
    X = (rng.standard_normal((50, 8)) @ np.diag(np.geomspace(1, 1e-3, 8)) @ rng.standard_normal((8, 8))).astype("f4")
    y = values_of(X)
    once = regressor().fit(X, y)
    often = regressor().fit(np.repeat(X, times, axis=0), np.repeat(y, times))
    assert once.rank_ == often.rank_ == 8
    np.testing.assert_allclose(often.predict(X), once.predict(X), rtol=1e-6, atol=1e-6)


def test_relu_repetition_equals_weights():
    X, times = rows(8, 9), np.array([1, 2, 3, 1, 2, 3, 1, 4])
    y = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    for loss in ("squared", "cross_entropy"):
        model = classifier(activation="relu", loss=loss, weight_decay=0.3)
        repeated = clone(model).fit(np.repeat(X, times, axis=0), np.repeat(y, times))
        weighted = clone(model).fit(X, y, times)
        np.testing.assert_allclose(weighted.decision_function(X), repeated.decision_function(X), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("d", [1, 2, 4])
def test_column_scales_do_not_matter_with_whitened_gates(d):
    X = rows(60, d)
    y = values_of(np.c_[X, X])
    scales = np.array([1e-6, 3.7, 1e5, 0.1])[:d]
    one, two = regressor(gates="whitened").fit(X, y), regressor(gates="whitened").fit(X * scales, y)
    np.testing.assert_allclose(two.predict(X * scales), one.predict(X), rtol=1e-9, atol=1e-9)
    assert two.certificate_.objective == pytest.approx(one.certificate_.objective, rel=1e-10)


@pytest.mark.parametrize("gates", ["data", "whitened"])
@pytest.mark.parametrize("factor", [2.0**-40, 0.3, 1e7])
def test_a_common_factor_and_a_shift_do_not_matter(gates, factor):
    X = rows()
    y = values_of(X)
    one, two = regressor(gates=gates).fit(X, y), regressor(gates=gates).fit(factor * (X + 5), y)
    np.testing.assert_allclose(two.predict(factor * (X + 5)), one.predict(X), rtol=1e-8, atol=1e-8)


def test_swapping_the_sign_of_y_swaps_the_sign_of_the_prediction():
    X = rows()
    y, model = values_of(X), regressor(gates="whitened")  # the descent of trained gates has its own signs
    np.testing.assert_allclose(clone(model).fit(X, -y).predict(X), -clone(model).fit(X, y).predict(X), atol=1e-9)


def test_trained_gates_are_where_the_targets_want_them():
    """Ten trained gates fit a function of three neurons better than forty random ones, at the same weight decay."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((400, 10))
    y = np.maximum(X @ rng.standard_normal((10, 3)), 0) @ np.array([1.0, -1.0, 2.0])
    few, many = (
        regressor(gates=gates, n_gates=n, weight_decay=0.5).fit(X, y)
        for gates, n in (("trained", 10), ("whitened", 40))
    )
    assert few.certificate_.status is many.certificate_.status is Status.CERTIFIED
    assert few.certificate_.objective < 0.9 * many.certificate_.objective


# -- scikit-learn's machinery --


def test_grid_search_in_a_pipeline():
    X = rows()
    y = classes_of(X)
    pipeline = make_pipeline(StandardScaler(), classifier())
    grid = {"convexbnclassifier__weight_decay": [0.1, 1.0], "convexbnclassifier__rank": [2, None]}
    search = GridSearchCV(pipeline, grid, cv=3).fit(X, y)
    best = search.best_estimator_[-1]
    assert best.certificate_.status is Status.CERTIFIED and 0 <= search.best_score_ <= 1
    assert search.predict(X).shape == (60,)


def test_clone_pickle_and_deepcopy():
    X = rows()
    model = classifier(gates=np.random.default_rng(0).standard_normal((4, 9))).fit(X, classes_of(X))
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        np.testing.assert_array_equal(copied.predict_proba(X), model.predict_proba(X))
        assert copied.certificate_ == model.certificate_
    fresh = clone(model)
    assert not hasattr(fresh, "network_")
    np.testing.assert_array_equal(fresh.fit(X, classes_of(X)).predict_proba(X), model.predict_proba(X))


def test_transform_gives_one_named_column_a_neuron():
    X = pd.DataFrame(rows(), columns=list("abcd"))
    model = classifier().fit(X, classes_of(X.to_numpy())).set_output(transform="pandas")
    hidden = model.transform(X)
    assert isinstance(hidden, pd.DataFrame) and hidden.shape == (60, model.network_.n_neurons)
    assert hidden.columns.tolist() == model.get_feature_names_out().tolist()
    assert hidden.columns[0] == "convexbnclassifier0" and model.feature_names_in_.tolist() == list("abcd")
    outputs = hidden.to_numpy() @ model.network_.output + model.network_.output_bias
    np.testing.assert_allclose(outputs, model.decision_function(X), atol=1e-12)


# -- failed fits --


def test_fit_works_after_a_failed_one():
    X = rows()
    y = classes_of(X)
    model = classifier()
    with pytest.raises(ValueError):
        model.fit(np.full_like(X, np.nan), y)
    expected = classifier().fit(X, y).predict_proba(X)
    np.testing.assert_array_equal(model.fit(X, y).predict_proba(X), expected)


def test_a_failed_first_fit_leaves_an_unfitted_estimator():
    X = rows()
    model = classifier(callback=lambda progress: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.fit(X, classes_of(X))
    for use in (model.predict, model.transform, lambda X: model.certify(X, classes_of(X))):
        with pytest.raises(ValueError, match="not fitted"):
            use(X)
    with pytest.raises(ValueError, match="not fitted"):
        model.save("never written")


@pytest.mark.parametrize("kind", ["constant", "callback"])
def test_a_failed_second_fit_leaves_the_first_whole_or_none(kind):
    X = pd.DataFrame(rows(), columns=list("abcd"))
    y = classes_of(X.to_numpy())
    model = classifier().fit(X, y)
    expected, attributes = model.predict_proba(X), set(vars(model))
    model.set_params(callback=(lambda progress: 1 / 0) if kind == "callback" else None)
    wrong = np.zeros((60, 3)) if kind == "constant" else rows(60, 3)
    with pytest.raises((ValueError, ZeroDivisionError)):
        model.fit(wrong, y)
    assert set(vars(model)) == attributes
    np.testing.assert_array_equal(model.predict_proba(X), expected)


def test_fitted_attributes_appear_at_once():
    X = rows()
    seen = []
    model = classifier(callback=lambda progress: seen.append({name for name in vars(model) if name.endswith("_")}))
    model.fit(X, classes_of(X))
    late = {"network_", "certificate_", "gates_", "gate_offsets_", "classes_", "weight_decay_", "rank_", "history_"}
    assert seen and all(not late & names for names in seen) and late <= set(vars(model))


def test_fit_changes_neither_parameters_nor_input():
    X = rows()
    y, weights, gates = classes_of(X), np.ones(60), np.random.default_rng(0).standard_normal((5, 9))
    copies = [a.copy() for a in (X, y, weights, gates)]
    model = classifier(gates=gates)
    before = model.get_params()
    model.fit(X, y, weights)
    assert all(model.get_params()[name] is value for name, value in before.items())
    for now, then in zip((X, y, weights, gates), copies, strict=True):
        np.testing.assert_array_equal(now, then)


# -- what a certificate does not cover is said --


@pytest.mark.parametrize("change", [{"mean": 3.0}, {"weight": 7.0}, {"n_effective": 9.0}])
@pytest.mark.parametrize("kind", ["gated", "relu"])
def test_stored_statistics_that_are_not_those_of_the_rows_are_never_certified(change, kind):
    X = rows(60 if kind == "gated" else 5)
    y = values_of(X)
    model = regressor(activation=kind, weight_decay=0.1).fit(X, y)
    assert model.certificate_.status is Status.CERTIFIED
    ((name, amount),) = change.items()
    value = getattr(model.network_, name)
    wrong = value + amount if name == "mean" else value * amount
    model.network_ = dataclasses.replace(model.network_, **{name: wrong})
    assert model.certify(X, y).status is not Status.CERTIFIED


def test_outputs_with_stored_statistics_are_made_only_where_they_may_differ(monkeypatch):
    X = rows()
    model = regressor(weight_decay=0.1).fit(X, values_of(X))
    made = []
    monkeypatch.setattr(gated, "gated_outputs", lambda *args: made.append(args) or gated_outputs(*args))
    assert model.certify(X, values_of(X)).status is Status.CERTIFIED and len(made) == 1
    model.network_ = dataclasses.replace(model.network_, n_effective=61.0)
    assert model.certify(X, values_of(X)).status is Status.NUMERICAL and len(made) == 3


def test_an_offset_that_spoils_the_stored_mean_is_not_certified():
    X = rows()
    with pytest.warns(ConvergenceWarning, match="offset"):
        model = regressor().fit(X + 1e14, values_of(X))
    assert model.certificate_.status is not Status.CERTIFIED


def test_the_sentence_of_a_truncated_program_says_so():
    X = rows()
    assert "leading 2 directions" in regressor(rank=2).fit(X, values_of(X)).certificate_.sentence
    assert "leading" not in regressor(rank=4).fit(X, values_of(X)).certificate_.sentence


def test_a_class_of_zero_weight_is_as_if_it_were_not_there():
    X = rows()
    y, weights = np.arange(60) % 3, np.where(np.arange(60) % 3 == 2, 0.0, 1.0)
    model, kept = classifier().fit(X, y, weights), weights > 0
    assert model.certify(X, y, weights) == model.certify(X[kept], y[kept])
    assert model.fingerprint(X, y, weights) == model.fingerprint_
    options = {"random_state": 0, "n_gates": 20}
    with_zeros = max_weight_decay(X, y, sample_weight=weights, **options)
    assert with_zeros == max_weight_decay(X[kept], y[kept], **options)


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e160, 1e300])
def test_targets_whose_squares_leave_the_range_are_refused(scale):
    X = rows()
    for attempt in (regressor().fit, max_weight_decay):
        with pytest.raises(ValueError, match="squares of y"):
            attempt(X, scale * values_of(X))
