"""The filtered program: rows ``A Phi`` with plain norms, against references that never see this package's whitening."""

import json
import warnings

import cvxpy as cp
import numpy as np
import pytest

import convexbn
from convexbn import ConvexBNClassifier, ConvexBNRegressor, bounds, max_weight_decay
from convexbn.bounds.lifted_set import completed
from convexbn.bounds.local_search import hidden_norms
from convexbn.cli import main
from convexbn.data.whitening import whiten
from convexbn.nn import to_module
from convexbn.program.losses import SquaredLoss
from convexbn.program.relu import ReluProgram
from convexbn_studies.peers.conic_relu import ConicRelu
from instances import PAPER, THRESHOLD, residual

TAU = 0.1


def rows_of_decreasing_size(n, d, seed=0):
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.standard_normal((d, d)))[0]
    return rng.standard_normal((n, d)) * np.geomspace(5, 0.05, d) @ rotation + 3


def targets(X, seed=1):
    rng = np.random.default_rng(seed)
    response = X @ rng.standard_normal(X.shape[1])
    return np.maximum(response - np.median(response), 0) + 0.1 * rng.standard_normal(len(X))


X = rows_of_decreasing_size(60, 5)
Y = targets(X)
LABELS = np.digitize(Y, np.quantile(Y, [0.4, 0.7]))


def filtered_rows(X, tau=TAU, weights=None):
    """``A Phi`` and ``(s, V)`` straight from NumPy's SVD."""
    weights = np.ones(len(X)) if weights is None else weights
    root = np.sqrt(weights)[:, None]
    centred = X - np.average(X, axis=0, weights=weights)
    left, s, right = np.linalg.svd(root * centred, full_matrices=False)
    phi = s / np.sqrt(s**2 + (tau * s[0]) ** 2)
    return np.c_[left / root * phi, np.full(len(X), weights.sum() ** -0.5)], s, right.T


def penalty_of_weights(network, tau_s1):
    """``sqrt(gamma^2 (1 + tau^2 ||w||^2 / n) + shift^2) ||c||`` of every neuron: weights alone."""
    steepness = 1 + tau_s1**2 * (network.weight**2).sum(axis=0) / network.n_effective
    return np.sqrt(network.gamma**2 * steepness + network.shift**2) * np.linalg.norm(network.output, axis=1)


def fitted(y=Y, kind=ConvexBNRegressor, **settings):
    settings = PAPER | {"weight_decay": 0.5, "random_state": 0, "spectral_filter": TAU, "n_gates": 30} | settings
    if settings.get("activation") == "relu":
        del settings["gates"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(**settings).fit(X, y)


# --- the rows ---


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rank", [None, 3])
def test_columns_are_those_of_the_plain_rows_times_the_filter(rank, weighted):
    weights = np.random.default_rng(2).uniform(0.2, 3, len(X)) if weighted else None
    found, (expected, s, _) = whiten(X, weights, rank=rank, spectral_filter=TAU), filtered_rows(X, TAU, weights)
    kept = [*range(rank or 5), 5]
    signs = np.sign(np.sum(found.rows * expected[:, kept], axis=0))
    assert residual(found.rows - signs * expected[:, kept], len(X)) < THRESHOLD
    assert np.allclose(found.filter, s[: rank or 5] / np.hypot(s[: rank or 5], TAU * s[0]), rtol=1e-13)
    assert found.filtered and found.truncated == (rank is not None)
    assert residual(found.transform(X) - found.rows, len(X)) < THRESHOLD


def test_the_filter_refers_to_the_spectrum_in_the_units_of_the_data():
    plain = whiten(X, spectral_filter=TAU)
    common, single = whiten(1e-7 * X - 3, spectral_filter=TAU), whiten(X * [1, 1, 1, 1, 100], spectral_filter=TAU)
    assert np.allclose(common.filter, plain.filter, rtol=1e-9)
    s = np.linalg.svd((X - X.mean(axis=0)) * [1, 1, 1, 1, 100], compute_uv=False)
    assert np.allclose(single.filter, s / np.hypot(s, TAU * s[0]), rtol=1e-9)
    assert not np.allclose(single.filter, plain.filter, rtol=0.1)


def test_directions_that_the_filter_makes_vanish_count_as_left_out():
    tiny = X * [1, 1, 1, 1, 1e-12]
    found = whiten(tiny, spectral_filter=TAU)
    assert found.rank == 4 and found.truncated and whiten(tiny).rank == 5
    assert np.isfinite(whiten(X * [1, 1, 1, 1, 1e-300], spectral_filter=1e-3).rows).all()


def test_coordinates_solve_the_least_squares():
    weights = np.random.default_rng(2).uniform(0.2, 3, len(X))
    found = whiten(X, weights, spectral_filter=TAU)
    u = np.random.default_rng(3).standard_normal((6, 4))
    assert residual(found.coordinates(found.rows @ u, weights) - u, len(X), 1 / found.filter.min() ** 2) < THRESHOLD


# --- the programs ---


@pytest.mark.parametrize("activation", ["gated", "relu"])
def test_a_vanishing_filter_is_the_plain_program(activation):
    settings = {"activation": activation, "time_limit": 1 if activation == "relu" else None}
    plain, vanishing = fitted(spectral_filter=None, **settings), fitted(spectral_filter=1e-9, **settings)
    assert abs(vanishing.certificate_.objective / plain.certificate_.objective - 1) < 2e-6
    assert np.allclose(vanishing.predict(X), plain.predict(X), atol=1e-3 * np.abs(Y).max())


@pytest.mark.parametrize("K", [1, 2])
def test_gated_optimum_is_that_of_an_independent_solver(K):
    y = Y if K == 1 else np.c_[Y, X[:, 0]]
    model = fitted(y, solver="group_newton")
    rows, _, _ = filtered_rows(X)
    opened = (X - X.mean(axis=0)) @ model.gates_ + model.gate_offsets_ >= 0
    blocks = [cp.Variable((6, K)) for _ in opened.T]
    outputs = sum((pattern[:, None] * rows) @ S for pattern, S in zip(opened.T, blocks, strict=True))
    objective = 0.5 * cp.sum_squares(outputs - y.reshape(len(X), K)) + 0.5 * sum(cp.norm(S, "fro") for S in blocks)
    reference = cp.Problem(cp.Minimize(objective)).solve("CLARABEL")
    proof = model.certificate_
    assert proof.status == "CERTIFIED" and "spectral filter" in proof.sentence
    assert abs(proof.objective / reference - 1) < 1e-6 and proof.lower_bound <= reference * (1 + 1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_relu_optimum_is_that_of_all_patterns_by_an_independent_solver(seed):
    X = rows_of_decreasing_size(14, 2, seed)
    y = targets(X, seed)
    rows, _, _ = filtered_rows(X, 0.3)
    reference = ConicRelu().solve(ReluProgram(rows, SquaredLoss(y[:, None], np.ones(len(X))), 0.3))
    model = ConvexBNRegressor(
        activation="relu", weight_decay=0.3, spectral_filter=0.3, fit_intercept=False, standardize=False, random_state=0
    ).fit(X, y)
    proof = model.certificate_
    assert proof.status == "CERTIFIED"
    assert abs(proof.objective / reference.value - 1) < 1e-6 and proof.lower_bound <= reference.value * (1 + 1e-8)


@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "logistic"])
@pytest.mark.parametrize("activation", ["gated", "relu"])
def test_the_objective_is_the_loss_and_the_penalty_of_the_weights(activation, loss):
    y = (LABELS > 0) if loss == "logistic" else LABELS
    limit = 1 if activation == "relu" else None
    model = fitted(y, ConvexBNClassifier, activation=activation, loss=loss, time_limit=limit, rank=4, tol=1e-5)
    network, proof, (_, s, _) = model.network_, model.certificate_, filtered_rows(X)
    plain = 0.5 * sum((part**2).sum() for part in (network.gamma, network.shift, network.output))
    loss_value = proof.weight_decay_objective - model.weight_decay_ * plain
    norms = penalty_of_weights(network, TAU * s[0])
    if activation == "relu":
        assert abs(loss_value + model.weight_decay_ * norms.sum() - proof.objective) < 1e-9 * proof.objective
    else:  # one norm a gate, at most the sum of those of its neurons, at least their root of squares
        gates = [norms[network.gate_index == i] for i in np.unique(network.gate_index)]
        penalty = (proof.objective - loss_value) / model.weight_decay_
        assert sum(np.linalg.norm(m) for m in gates) * (1 - 1e-9) <= penalty <= norms.sum() * (1 + 1e-9)
    assert np.allclose(np.hypot(network.gamma, network.shift), np.linalg.norm(network.output, axis=1), rtol=1e-9)
    assert proof.lower_bound <= proof.objective and proof.relative_gap < (1e-5 if activation == "gated" else 0.3)


def test_the_plain_optimum_is_not_certified_under_the_filter_nor_the_filtered_one_without_it():
    plain, filtered = fitted(spectral_filter=None), fitted()
    best = filtered.certificate_
    plain.gates_, plain.gate_offsets_ = filtered.gates_, filtered.gate_offsets_
    without = filtered.set_params(spectral_filter=None).certify(X, Y)
    assert without.status == "GAP_OPEN" and "filter" not in without.sentence
    assert without.objective < best.objective and without.lower_bound <= plain.certificate_.objective * (1 + 1e-9)
    under = plain.set_params(spectral_filter=TAU).certify(X, Y)
    assert under.status == "GAP_OPEN" and under.lower_bound <= best.objective <= under.objective


def test_the_formula_of_orthogonal_rows_is_not_taken():
    few, y = X[:5], np.array([0, 1, 2, 0, 1])
    shared = {"activation": "relu", "loss": "squared", "weight_decay": 0.2, "random_state": 0}
    model = ConvexBNClassifier(spectral_filter=0.3, tol=1e-4, **shared)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        proof = model.fit(few, y).certificate_
    plain = ConvexBNClassifier(**shared).fit(few, y).certificate_
    assert plain.stopped_by == "formula" and proof.stopped_by != "formula"
    assert plain.objective < proof.objective and proof.lower_bound <= proof.objective
    value, upper = max_weight_decay(few, y, activation="relu", spectral_filter=0.3)
    assert value <= upper * (1 + 1e-9) and value < max_weight_decay(few, y, activation="relu")[0]


def test_sample_weights_are_repetition():
    weights = np.random.default_rng(0).integers(1, 4, len(X))
    settings = {"weight_decay": 0.5, "spectral_filter": TAU, "random_state": 0}
    weighted = ConvexBNRegressor(**settings).fit(X, Y, weights)
    repeated = ConvexBNRegressor(**settings).fit(np.repeat(X, weights, axis=0), np.repeat(Y, weights))
    assert weighted.certificate_.objective == repeated.certificate_.objective


# --- bounds on rows that are not orthonormal ---


def test_completed_rows_are_orthonormal_and_change_no_maximum():
    A = whiten(X, spectral_filter=TAU).rows
    whole = completed(A)
    assert residual(whole.T @ whole - np.eye(6), len(X)) < THRESHOLD and np.array_equal(whole[: len(A)], A)
    assert completed(whiten(X).rows).shape == (60, 6)


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_bounds_hold_on_filtered_rows(seed, K):
    small = rows_of_decreasing_size(20, 3, seed)
    A = filtered_rows(small, 0.5)[0]
    V = np.random.default_rng(seed).standard_normal((20, K))
    exact = bounds.branch_and_bound(V, A, tol=1e-3)
    angles = np.random.default_rng(1).standard_normal((200_000, 4))
    sampled = hidden_norms(angles / np.linalg.norm(angles, axis=1)[:, None], V, A).max()
    assert sampled <= exact.value <= exact.lower * (1 + 2e-3) and exact.lower <= sampled * 1.05
    lifted = bounds.lifted(V, A, iterations=400).value
    assert exact.lower <= lifted <= 1.25 * exact.value
    assert exact.lower <= bounds.orthant(V)[0]
    if K == 1:
        assert exact.lower <= bounds.relaxation(V, A).value


def test_chosen_dual_points_are_feasible_on_filtered_rows_and_better_than_scaling():
    small = rows_of_decreasing_size(16, 3)
    y, A = targets(small)[:, None], filtered_rows(small, 0.5)[0]
    optimum = ConicRelu().solve(ReluProgram(A, SquaredLoss(y, np.ones(16)), 0.4))
    for choose in (bounds.dual_point, bounds.lifted_dual_point):
        point = choose(y, optimum.dual, A, 0.4)
        norm = bounds.branch_and_bound(point.dual, A, tol=1e-6)
        assert norm.lower <= point.value <= 0.4 * (1 + 1e-9)
        value = float(np.sum(point.dual * y) - 0.5 * np.sum(point.dual**2))
        assert 0.9 * optimum.value <= value <= optimum.value * (1 + 1e-7)


# --- the doors ---


@pytest.mark.parametrize("activation", ["gated", "relu"])
def test_save_load_certify(activation, tmp_path):
    model = fitted(activation=activation, time_limit=1, proof_time=0)  # a file keeps no bound that was proved
    model.time_limit = None if activation == "gated" else 0.0
    model.save(tmp_path / "model")
    loaded = convexbn.load(tmp_path / "model")
    assert loaded.spectral_filter == TAU and np.array_equal(loaded.predict(X), model.predict(X))
    proof, own = loaded.certify(X, Y), model.certify(X, Y)
    assert proof.objective == own.objective == model.certificate_.objective
    assert (
        proof == own
        if activation == "gated"
        else proof.lower_bound <= own.lower_bound == model.certificate_.lower_bound
    )
    assert "spectral filter" in proof.sentence


def test_predictions_are_those_of_ordinary_weights():
    model = fitted(LABELS, ConvexBNClassifier, activation="relu", loss="squared", time_limit=1)
    new = rows_of_decreasing_size(40, 5, seed=9)
    outputs = to_module(model.network_).double()(_tensor(new)).detach().numpy()
    assert np.allclose(outputs, model.decision_function(new), atol=1e-9 * np.abs(outputs).max())


def _tensor(array):
    import torch

    return torch.from_numpy(array)


def test_to_relu_keeps_outputs_and_filter():
    model = fitted(gates="whitened", n_gates=5)
    converted = model.to_relu(X, Y)
    assert converted.output_error < 1e-9 and converted.objective_before == pytest.approx(model.certificate_.objective)
    assert "spectral filter" in converted.certificate.sentence


def test_the_command_line_names_the_filter_and_can_leave_it_out(tmp_path, capsys):
    file = str(tmp_path / "model.safetensors")
    settings = ["--rank", "10", "--n-gates", "20", "--weight-decay", "3", "--spectral-filter", "0.1"]
    assert main(["fit", "digits", "--out", file, *settings]) == 0
    assert "spectral filter" in capsys.readouterr().out
    said, numbers = {}, {}
    for option in ((), ("--without-filter",)):
        assert main(["certify", file, "digits", *option]) == 0
        said[option] = capsys.readouterr().out
        assert main(["certify", file, "digits", "--json", *option]) == 0
        numbers[option] = json.loads(capsys.readouterr().out)
    assert "Judged with the spectral filter" in said[()] and numbers[()]["spectral_filter"] == 0.1
    assert "Judged as a plain network, without the spectral filter" in said["--without-filter",]
    assert numbers["--without-filter",]["spectral_filter"] is None
    assert numbers[()]["status"] == "CERTIFIED" and numbers["--without-filter",]["status"] == "GAP_OPEN"


@pytest.mark.parametrize("value", [0, -0.1, "a", np.nan])
def test_impossible_filters_are_refused(value):
    with pytest.raises(ValueError, match="spectral_filter"):
        ConvexBNRegressor(spectral_filter=value).fit(X, Y)


@pytest.mark.parametrize("k", [2, None])
def test_leading_directions_are_those_of_a_smaller_rank(k):
    found, expected = whiten(X, spectral_filter=TAU).leading(k), whiten(X, rank=k, spectral_filter=TAU)
    assert np.array_equal(found.filter, expected.filter) and np.allclose(found.rows, expected.rows, atol=1e-13)
    assert found.truncated == expected.truncated == (k is not None)
