"""Gated networks as ReLU networks: equal outputs, smallest norms, unrealisable gates counted, refused or moved."""

import cvxpy as cp
import numpy as np
import pytest
import scipy.optimize

from convexbn import ConvexBNClassifier, ConvexBNRegressor, max_weight_decay
from convexbn.data.whitening import whiten
from convexbn.program.gates import gate_patterns
from convexbn.program.losses import SquaredLoss
from convexbn.program.network import BatchNormNetwork
from convexbn.program.realizability import are_realizable, nearest_directions
from convexbn.solvers.cone_decomposition import difference_in_cones
from convexbn.solvers.relu.newton import polish
from convexbn.training.relu_conversion import neurons_of, to_relu
from convexbn.training.training_set import TrainingSet
from instances import PAPER, network_outputs


def drawn(n=60, d=4, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


def values_of(X, K=1):
    Y = np.column_stack([np.sin((k + 1) * X[:, 0]) + X[:, 1] ** 2 - 1 for k in range(K)])
    return Y[:, 0] if K == 1 else Y


def training_set(model, X, y, weights=None):
    X, y, weights = model._checked_data(X, y, weights, reset=False)
    return model._training_set(X, model._encode_known(y), weights)


def converted(model, X, y, weights=None, **options):
    data = training_set(model, X, y, weights)
    return to_relu(data, model.network_, model.gates_, model.gate_offsets_, model.weight_decay_, **options)


def regressor(X, y, weights=None, **changes):
    settings = {**PAPER, "n_gates": 20, "random_state": 0, **changes}
    if "weight_decay" not in settings:
        settings["weight_decay"] = 0.02 * max_weight_decay(X, y, sample_weight=weights, **settings)
    return ConvexBNRegressor(**settings).fit(X, y, weights)


def gap_between(model, conversion, X):
    """Largest difference of the outputs on rows, relative to the largest output."""
    gated = model.network_.predict(X)
    return np.abs(conversion.network.predict(X) - gated).max() / np.abs(gated).max()


def tied_rows(seed=0):
    """Rows of a small grid, many of them repeated, with a mean of exactly zero."""
    X = np.random.default_rng(seed).integers(-2, 3, (30, 3)).astype(float)
    return np.vstack([X, -X])


# -- outputs --


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("gates", ["data", "whitened"])
def test_outputs_on_the_training_rows_are_kept(gates, K):
    X = drawn()
    model = regressor(X, values_of(X, K), gates=gates)
    conversion = converted(model, X, values_of(X, K))
    assert conversion.network.gates is conversion.network.gate_offsets is conversion.network.gate_index is None
    assert conversion.n_unrealisable == 0 and conversion.output_error <= 1e-10
    assert gap_between(model, conversion, X) <= 1e-10
    assert conversion.network.n_neurons <= 2 * model.network_.n_neurons


@pytest.mark.parametrize("loss", ["logistic", "cross_entropy"])
def test_outputs_are_kept_for_other_losses(loss):
    X = drawn()
    y = (X[:, 0] * X[:, 1] > 0).astype(int) + (X[:, 2] > 1 if loss == "cross_entropy" else 0)
    model = ConvexBNClassifier(loss=loss, n_gates=20, random_state=0).fit(X, y)
    conversion = converted(model, X, y)
    assert gap_between(model, conversion, X) <= 1e-10
    assert conversion.objective_before == pytest.approx(model.certificate_.objective, rel=1e-9)


def test_outputs_are_kept_with_weights():
    X = drawn()
    weights = np.random.default_rng(1).integers(0, 4, 60)
    model = regressor(X, values_of(X, 2), weights)
    conversion = converted(model, X, values_of(X, 2), weights)
    assert gap_between(model, conversion, X[weights > 0]) <= 1e-10
    repeated = np.repeat(X, weights, axis=0)
    same = converted(model, repeated, values_of(repeated, 2))
    assert same.objective_after == pytest.approx(conversion.objective_after, rel=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_outputs_are_kept_with_ties_and_repeated_rows(seed):
    X = tied_rows(seed)
    gates = np.vstack([np.tile(np.eye(3), 2), np.repeat([0.0, -1.0], 3)])  # x_j >= 0 and x_j >= 1
    y = np.sin(X[:, 0]) + np.random.default_rng(seed).standard_normal(60)  # rows of equal features differ in y
    model = regressor(X, y, gates=gates)
    opened = gate_patterns(X, model.network_.mean, model.network_.gates, model.network_.gate_offsets)
    tied = X @ model.network_.gates + model.network_.gate_offsets == 0
    assert tied.any(axis=0).all() and opened[tied].all()
    conversion = converted(model, X, y)
    assert conversion.n_unrealisable == 0 and gap_between(model, conversion, X) <= 1e-10


def test_collinear_columns_and_units_do_not_matter():
    X = drawn(seed=3)
    wide = np.column_stack([X, X[:, 0] + X[:, 1], np.full(60, 7.0)]) * np.array([1, 1e6, 1e-6, 1, 1, 1])
    model = regressor(wide, values_of(X))
    assert gap_between(model, converted(model, wide, values_of(X)), wide) <= 1e-10


def test_a_zero_network_stays_one():
    X = drawn()
    model = ConvexBNRegressor(weight_decay=1e6, n_gates=5, random_state=0).fit(X, values_of(X))
    conversion = converted(model, X, values_of(X))
    assert conversion.network.n_neurons == 0 and conversion.output_error == 0
    assert conversion.objective_after == pytest.approx(conversion.objective_before, rel=1e-12)


@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_the_intercept_and_the_linear_gate_are_converted(shift):
    X = drawn()
    y = shift + X[:, 0] + np.abs(X[:, 1])
    model = regressor(X, y, fit_intercept=True, linear=True)
    assert 0 in model.network_.gate_index  # the gate that is always open
    conversion = converted(model, X, y)
    assert np.array_equal(conversion.network.output_bias, model.network_.output_bias)
    assert gap_between(model, conversion, X) <= 1e-10
    assert conversion.objective_before == pytest.approx(model.certificate_.objective, rel=1e-9)


# -- objectives --


@pytest.mark.parametrize("K", [1, 3])
def test_objectives_are_those_of_the_weights(K):
    X = drawn()
    y = values_of(X, K)
    model = regressor(X, y)
    conversion = converted(model, X, y)
    N, targets = conversion.network, y.reshape(60, K)
    response = (X - X.mean(axis=0)) @ N.weight
    response = N.gamma * response / np.linalg.norm(response, axis=0) + N.shift / np.sqrt(60)
    value = 0.5 * np.sum((np.maximum(response, 0) @ N.output - targets) ** 2)
    penalty = np.hypot(N.gamma, N.shift) @ np.linalg.norm(N.output, axis=1)
    assert conversion.objective_after == pytest.approx(value + model.weight_decay_ * penalty, rel=1e-9)
    assert conversion.certificate.weight_decay_objective == pytest.approx(conversion.objective_after, rel=1e-9)
    assert conversion.objective_before == pytest.approx(model.certificate_.objective, rel=1e-9)
    assert conversion.objective_realised == conversion.objective_before <= conversion.objective_after
    assert conversion.certificate.scope == "all patterns"


def test_no_conversion_beats_the_best_relu_network():
    X = drawn(12, 15)
    y = np.random.default_rng(1).standard_normal(12)
    model = regressor(X, y, weight_decay=0.3)
    best = regressor(X, y, activation="relu", gates="trained", weight_decay=0.3).certificate_.objective
    conversion = converted(model, X, y)
    assert conversion.certificate.lower_bound <= best <= conversion.objective_after


def test_a_gate_whose_block_lies_in_its_cone_costs_nothing():
    X = drawn()
    y = X[:, 0] - X[:, 0].min() + 1.0  # one neuron that is open everywhere
    everywhere = np.append(np.zeros(4), 1.0)[:, None]
    model = regressor(X, y, gates=everywhere, weight_decay=0.1)
    conversion = converted(model, X, y)
    assert conversion.network.n_neurons == 1  # its other half is exactly zero
    assert conversion.objective_after == pytest.approx(conversion.objective_before, rel=1e-12)


# -- smallest norms --


def smallest_norms(signed, vector):
    p = cp.Variable(len(vector))
    problem = cp.Problem(cp.Minimize(cp.norm(p) + cp.norm(p - vector)), [signed @ p >= 0, signed @ (p - vector) >= 0])
    problem.solve(solver=cp.CLARABEL)
    return problem.value


def cone_of(n, d, seed, rows=None):
    rng = np.random.default_rng(seed)
    A = whiten(rng.standard_normal((n, d)) if rows is None else rows).rows
    gate = rng.standard_normal(A.shape[1])
    return A, A @ gate >= 0, gate / np.linalg.norm(gate), rng.standard_normal(A.shape[1])


@pytest.mark.parametrize(("n", "d"), [(4, 2), (15, 1), (40, 5), (150, 10)])
@pytest.mark.parametrize("nearness", [None, 1e-1, 1e-4, 1e-8, -1e-1, -1e-6])
def test_norms_are_the_smallest(n, d, nearness):
    """Also for vectors close to the boundary of the cone, or to that of its opposite."""
    for seed in range(3):
        A, opened, gate, vector = cone_of(n, d, seed)
        if nearness is not None:
            vector = np.sign(nearness) * gate + abs(nearness) * vector
        signed = np.where(opened, 1.0, -1.0)[:, None] * A
        p, m = difference_in_cones(A, opened[None], vector[None])
        np.testing.assert_allclose(p - m, vector[None], rtol=0, atol=1e-12 * np.linalg.norm(p + m))
        assert min((signed @ p[0]).min(), (signed @ m[0]).min()) >= -1e-12 * np.linalg.norm(p + m)
        reference = smallest_norms(signed / np.linalg.norm(signed, axis=1)[:, None], vector)
        assert np.linalg.norm(p) + np.linalg.norm(m) == pytest.approx(reference, rel=1e-6)


def test_norms_are_the_smallest_with_repeated_and_tied_rows():
    A, opened, _, vector = cone_of(0, 0, 1, rows=tied_rows())
    p, m = difference_in_cones(A, opened[None], vector[None])
    signed = np.where(opened, 1.0, -1.0)[:, None] * A
    assert np.linalg.norm(p) + np.linalg.norm(m) == pytest.approx(smallest_norms(signed, vector), rel=1e-6)


def test_many_vectors_at_once_are_as_one_by_one_and_scales_do_not_matter():
    A, opened, _, _ = cone_of(50, 4, 0)
    vectors = np.random.default_rng(1).standard_normal((7, 5)) * np.logspace(-200, 200, 7)[:, None]
    together = difference_in_cones(A, np.tile(opened, (7, 1)), vectors)
    for j, vector in enumerate(vectors):
        alone = difference_in_cones(A, opened[None], vector[None] * 2.0**-20)
        for whole, single in zip(together, alone, strict=True):
            np.testing.assert_allclose(whole[j], single[0] * 2.0**20, rtol=0, atol=1e-5 * np.abs(whole[j]).max())


def test_the_network_has_the_smallest_norms_of_its_blocks():
    X = drawn(40, 3)
    model = regressor(X, values_of(X), n_gates=8)
    data = training_set(model, X, values_of(X))
    before, after = (neurons_of(data, N) for N in (model.network_, converted(model, X, values_of(X)).network))
    signs = np.where(data.gated_program(model.gates_, model.gate_offsets_).operator.patterns, 1.0, -1.0)
    vectors = (before.first * np.linalg.norm(before.output, axis=1)).T
    expected = [
        smallest_norms(signs[:, [i]] * data.whitening.rows, vector)
        for i, vector in zip(model.network_.gate_index, vectors, strict=True)
    ]
    assert after.norms.sum() == pytest.approx(sum(expected), rel=1e-6)


# -- gates that are not realised --


def truncated(**changes):
    X = drawn(100, 20)
    settings = {"n_gates": 50, "rank": 4, **changes}
    return X, values_of(X), regressor(X, values_of(X), **settings)


def test_gates_of_a_truncated_program_are_counted_and_refused():
    X, y, model = truncated()
    assert model.gates_.shape[1] == 50
    data = training_set(model, X, y)
    assert not realisable(data, model.gates_, model.gate_offsets_).any()
    used = len(np.unique(model.network_.gate_index))
    with pytest.raises(ValueError, match=rf"^{used} of the {used} gates .* \(rank 4 of 20\).*unrealisable='nearest'"):
        converted(model, X, y)


def realisable(data, gates, offsets):
    program = data.gated_program(gates, offsets)
    directions = nearest_directions(data.X, data.whitening, data.loss.weights, gates, offsets)
    return are_realizable(program.operator.rows, program.operator.patterns, directions)


@pytest.mark.parametrize("K", [1, 3])
def test_the_nearest_gates_are_solved_for_and_the_change_is_told(K):
    X = drawn(100, 20)
    y = values_of(X, K)
    model = regressor(X, y, n_gates=50, rank=4)
    conversion = converted(model, X, y, unrealisable="nearest")
    assert conversion.n_unrealisable == len(np.unique(model.network_.gate_index))
    assert conversion.objective_before == pytest.approx(model.certificate_.objective, rel=1e-9)
    assert conversion.objective_realised <= conversion.objective_after
    assert conversion.network.gates is None and conversion.output_error <= 1e-10
    data = training_set(model, X, y)
    directions = nearest_directions(data.X, data.whitening, np.ones(100), model.gates_, model.gate_offsets_)
    moved = data.whitening.projection @ directions[:-1]
    again = regressor(X, y, gates=np.vstack([moved, directions[-1] / 10]), rank=4, weight_decay=model.weight_decay_)
    assert conversion.objective_realised == pytest.approx(again.certificate_.objective, rel=1e-5)


def test_whitened_gates_are_realised_whatever_the_rank():
    X, y, model = truncated(gates="whitened")
    conversion = converted(model, X, y)
    assert conversion.n_unrealisable == 0 and gap_between(model, conversion, X) <= 1e-10
    same = converted(model, X, y, unrealisable="nearest")
    assert same.objective_realised == same.objective_before and same.objective_after == conversion.objective_after


@pytest.mark.parametrize("seed", range(4))
def test_realised_patterns_are_those_of_a_linear_program(seed):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((12, 6)) if seed % 2 else rng.integers(-1, 2, (12, 6)).astype(float)
    rows = whiten(X, rank=2 + seed % 2).rows
    opened = (X - X.mean(axis=0)) @ rng.standard_normal((6, 40)) >= 0
    found = are_realizable(rows, opened, np.zeros((rows.shape[1], 40)))
    expected = [widest_margin(np.where(pattern, 1.0, -1.0)[:, None] * rows) > 1e-9 for pattern in opened.T]
    assert found.tolist() == expected and 0 < sum(expected) < 40


def widest_margin(signed):
    n, q = signed.shape
    lengths = np.linalg.norm(signed, axis=1)[:, None]
    bounds = [(-1, 1)] * q + [(None, 1)]
    return -scipy.optimize.linprog(-np.eye(q + 1)[-1], np.hstack([-signed, lengths]), np.zeros(n), bounds=bounds).fun


def test_rows_on_the_hyperplane_of_a_gate_do_not_make_it_unrealisable():
    rows = whiten(np.array([[-1.0], [0.0], [1.0], [2.0]])).rows
    through = rows[1] @ np.array([[0.0, -1.0], [1.0, 0.0]])  # orthogonal to the second row
    through *= np.sign(rows[3] @ through)
    assert rows[1] @ through == 0
    opened = np.array([[0, 1, 1, 1]], dtype=bool).T
    assert are_realizable(rows, opened, through[:, None]).all()


# -- neurons --


@pytest.mark.parametrize("K", [1, 2])
def test_neurons_are_read_off_and_written_back(K):
    X = drawn()
    weights = np.random.default_rng(0).uniform(0.5, 2, 60)
    model = regressor(X, values_of(X, K), weights)
    network = converted(model, X, values_of(X, K), weights).network
    data = training_set(model, X, values_of(X, K), weights)
    neurons = neurons_of(data, network)
    again = BatchNormNetwork.from_neurons(data.whitening, neurons)
    np.testing.assert_allclose(again.predict(X), network.predict(X), rtol=0, atol=1e-10)
    outputs = network_outputs(data.whitening.rows, neurons)
    np.testing.assert_allclose(outputs, network.predict(data.X), rtol=0, atol=1e-10)


def test_neurons_are_read_in_the_coordinates_of_any_training_set():
    """ReLU programs merge rows of equal features, which turns and reflects the whitened rows."""
    X = tied_rows()
    y = np.random.default_rng(0).standard_normal(60)
    network = converted(regressor(X, y), X, y).network
    merged = TrainingSet.prepare(
        X, y[:, None], np.ones(60), loss=SquaredLoss, rank=None, input_eps=np.finfo(float).eps, merge_features=True
    )
    assert len(merged.X) < 60
    neurons = neurons_of(merged, network)
    outputs = network_outputs(merged.whitening.rows, neurons)
    np.testing.assert_allclose(outputs, network.predict(merged.X), rtol=0, atol=1e-9 * np.abs(outputs).max())


def test_the_converted_network_is_a_start_of_the_restricted_program():
    X = drawn()
    model = regressor(X, values_of(X), n_gates=10)
    conversion = converted(model, X, values_of(X))
    data = training_set(model, X, values_of(X))
    program = data.relu_program(model.weight_decay_)
    better = polish(program, neurons_of(data, conversion.network))
    assert program.objective(better) <= conversion.objective_after


# -- refusals --


def test_a_relu_network_is_not_converted():
    X = drawn()
    model = regressor(X, values_of(X))
    data, relu = training_set(model, X, values_of(X)), converted(model, X, values_of(X)).network
    with pytest.raises(ValueError, match="ReLU network already"):
        to_relu(data, relu, model.gates_, model.gate_offsets_, model.weight_decay_)


def test_unknown_options_are_refused():
    X = drawn()
    with pytest.raises(ValueError, match="'refuse' or 'nearest', got 'drop'"):
        converted(regressor(X, values_of(X)), X, values_of(X), unrealisable="drop")
