"""The exact ReLU solver: its estimated gaps and proofs, what it never loses, what it stops for."""

from typing import ClassVar

import numpy as np
import pytest

from convexbn import bounds
from convexbn._types import now
from convexbn.certificate.certificate import Found, judge
from convexbn.certificate.dual_bounds import ReluDualBounds
from convexbn.certificate.status import Scope, Status
from convexbn.data.whitening import whiten
from convexbn.program.losses import CrossEntropyLoss, HuberLoss, LogisticLoss, SquaredHingeLoss, SquaredLoss
from convexbn.program.neurons import Neurons, merge
from convexbn.program.relu import ReluProgram
from convexbn.solvers.base import Budget
from convexbn.solvers.relu import newton as newton_module
from convexbn.solvers.relu.column_generation import ColumnGeneration
from convexbn.solvers.relu.lbfgs import lbfgs, random_neurons
from convexbn.solvers.relu.newton import polish
from convexbn.solvers.relu.pruning import merged_in_cones, vertex
from convexbn.solvers.relu.restricted_master import with_best_norms
from instances import network_outputs

LOSSES = {"squared": 1, "three outputs": 3, "huber": 1, "squared_hinge": 1, "logistic": 1, "cross_entropy": 3}


def instance(n=60, d=2, K=1, seed=0):
    """Whitened rows and targets of a teacher of five neurons with noise."""
    rng = np.random.default_rng(seed)
    rows = whiten(rng.standard_normal((n, d))).rows
    targets = np.maximum(rows @ rng.standard_normal((d + 1, 5)), 0) @ rng.standard_normal((5, K))
    targets = targets / targets.std() + 0.3 * rng.standard_normal((n, K))
    return rows, targets


def problem(kind, fraction, n=60, d=2, seed=0):
    """Rows, loss, and the weight decay as a fraction of the largest."""
    K = LOSSES[kind]
    rows, targets = instance(n, d, K, seed)
    if kind == "huber":
        loss = HuberLoss(targets, np.ones(n), delta=0.5)
    elif kind in ("squared_hinge", "logistic"):
        binary = SquaredHingeLoss if kind == "squared_hinge" else LogisticLoss
        loss = binary(np.where(targets > np.median(targets), 1.0, -1.0), np.ones(n))
    elif kind == "cross_entropy":
        loss = CrossEntropyLoss(np.eye(K)[targets.argmax(axis=1)], np.ones(n))
    else:
        loss = SquaredLoss(targets, np.ones(n))
    return rows, loss, fraction * largest(rows, loss)


def iris(kind):
    """Distinct rows of iris, whitened, with one-hot targets."""
    datasets = pytest.importorskip("sklearn.datasets")
    X, labels = datasets.load_iris(return_X_y=True)
    X, groups = np.unique(X, axis=0, return_inverse=True)
    loss = kind(np.eye(3)[labels], np.ones(150)).merged(groups.ravel(), len(X))
    return whiten(X, loss.weights).rows, loss


def largest(rows, loss):
    root = np.sqrt(loss.weights)[:, None]
    V = loss.negative_gradient(np.zeros_like(loss.targets)) / root
    return bounds.local_maxima(V, root * rows, 300, np.random.default_rng(0))[0][0]


def objective_of(rows, loss, beta, neurons):
    return loss.value(network_outputs(rows, neurons)) + beta * neurons.norms.sum()


def gap_of(rows, loss, beta, neurons):
    """Relative gap against an estimate of its own: another search with other starts."""
    root = np.sqrt(loss.weights)[:, None]
    V = loss.negative_gradient(network_outputs(rows, neurons)) / root
    norm = bounds.local_maxima(V, root * rows, 500, np.random.default_rng(77), start=neurons.first.T)[0][0]
    objective = objective_of(rows, loss, beta, neurons)
    return (objective - loss.dual_value(min(1.0, beta / norm) * root * V)) / objective


def proof_of(rows, loss, beta, neurons, seconds=10.0):
    first = neurons.first.T / np.linalg.norm(neurons.first.T, axis=1)[:, None]
    program = ReluProgram(rows, loss, beta)
    prover = ReluDualBounds(program, first, tol=1e-6, deadline=now() + seconds)
    norms = float(neurons.norms.sum())
    found = Found(network_outputs(rows, neurons), norms, norms)
    return judge(loss, found, beta, prover, Scope("all patterns"), 1e-5, "tolerance")


# --- the optimum ---


@pytest.mark.parametrize("fraction", [0.3, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_small_programs_are_certified_over_all_patterns(fraction, seed):
    rows, loss, beta = problem("squared", fraction, seed=seed)
    solution = ColumnGeneration().solve(ReluProgram(rows, loss, beta), rng=np.random.default_rng(seed))
    proof = proof_of(rows, loss, beta, solution.weights)
    assert proof.status is Status.CERTIFIED, proof.sentence
    assert proof.bound == "every cell"


@pytest.mark.parametrize("fraction", [0.3, 0.1, 0.02])
@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_reaches_a_tiny_gap_with_few_neurons(kind, fraction):
    rows, loss, beta = problem(kind, fraction)
    solution = ColumnGeneration().solve(ReluProgram(rows, loss, beta), rng=np.random.default_rng(0))
    assert solution.stopped_by == "tolerance"
    assert gap_of(rows, loss, beta, solution.weights) < 1e-6
    assert len(solution.weights.output) <= 20


@pytest.mark.parametrize(
    ("kind", "fraction", "most"),
    [(SquaredLoss, 0.3, 8), (SquaredLoss, 0.02, 25), (CrossEntropyLoss, 0.1, 8), (CrossEntropyLoss, 0.02, 25)],
)
def test_iris_reaches_a_tiny_gap_with_few_neurons(kind, fraction, most):
    rows, loss = iris(kind)
    beta = fraction * largest(rows, loss)
    solution = ColumnGeneration().solve(ReluProgram(rows, loss, beta), rng=np.random.default_rng(0))
    assert gap_of(rows, loss, beta, solution.weights) < 1e-6
    assert len(solution.weights.output) <= most


def test_higher_rank_ends_where_other_starts_end():
    rows, loss, beta = problem("three outputs", 0.1, n=80, d=8)
    values = []
    for seed in range(2):
        neurons = (
            ColumnGeneration(tol=1e-5).solve(ReluProgram(rows, loss, beta), rng=np.random.default_rng(seed)).weights
        )
        assert gap_of(rows, loss, beta, neurons) < 2e-5
        values.append(objective_of(rows, loss, beta, neurons))
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_three_outputs_are_certified_within_a_hundredth():
    rows, loss, beta = problem("three outputs", 0.1)
    solution = ColumnGeneration().solve(ReluProgram(rows, loss, beta), rng=np.random.default_rng(0))
    assert proof_of(rows, loss, beta, solution.weights).relative_gap <= 0.01


def test_the_valid_and_the_estimated_gap_are_told_apart():
    rows, loss, beta = problem("squared", 0.1, n=200, d=9)
    solution = ColumnGeneration().solve(ReluProgram(rows, loss, beta), rng=np.random.default_rng(0))
    proof = proof_of(rows, loss, beta, solution.weights, seconds=2.0)
    assert proof.estimated_gap < 1e-4 < proof.relative_gap
    assert proof.status in (Status.RESTRICTED, Status.GAP_OPEN)
    assert "an estimate, not a bound" in proof.sentence


def test_weights_are_repetition():
    _, targets = instance(40, 2)
    weights = np.where(np.arange(40) < 20, 2.0, 1.0)
    index = np.repeat(np.arange(40), weights.astype(int))
    X = np.random.default_rng(3).standard_normal((40, 2))
    one, two = whiten(X, weights).rows, whiten(X[index]).rows
    values = []
    for A, Y, w in ((one, targets, weights), (two, targets[index], np.ones(60))):
        solution = ColumnGeneration().solve(ReluProgram(A, SquaredLoss(Y, w), 0.5), rng=np.random.default_rng(0))
        values.append(solution.history[-1].objective)
    assert values[0] == pytest.approx(values[1], rel=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_above_the_largest_weight_decay_there_are_no_neurons(kind):
    rows, loss, beta = problem(kind, 1.01)
    solution = ColumnGeneration().solve(ReluProgram(rows, loss, beta), rng=np.random.default_rng(0))
    assert solution.weights.first.shape == (3, 0)
    assert solution.stopped_by == "tolerance" and solution.history[-1].estimated_gap <= 1e-6


# --- the parts never lose ---


@pytest.mark.parametrize("kind", LOSSES)
def test_masses_and_polish_never_lose(kind):
    rows, loss, beta = problem(kind, 0.1)
    rng = np.random.default_rng(2)
    neurons = Neurons(rng.standard_normal((3, 30)), rng.standard_normal((30, LOSSES[kind])))
    chosen = with_best_norms(ReluProgram(rows, loss, beta), neurons)
    polished = polish(ReluProgram(rows, loss, beta), chosen)
    values = [objective_of(rows, loss, beta, network) for network in (neurons, chosen, polished)]
    assert values[0] > values[1] > values[2]
    assert objective_of(rows, loss, beta, polish(ReluProgram(rows, loss, beta), neurons)) < values[0]
    assert len(chosen.output) < 30


@pytest.mark.parametrize("kind", LOSSES)
def test_a_polished_network_is_stationary(kind):
    """``||V'(A u)_+|| = beta`` for every neuron, with the image along its output, at the top of its ascent."""
    rows, loss, beta = problem(kind, 0.05)
    trained = lbfgs(
        ReluProgram(rows, loss, beta), random_neurons(ReluProgram(rows, loss, beta), 50, np.random.default_rng(0))
    )
    neurons = polish(ReluProgram(rows, loss, beta), with_best_norms(ReluProgram(rows, loss, beta), trained))
    V = loss.negative_gradient(network_outputs(rows, neurons))
    image = V.T @ np.maximum(rows @ neurons.first, 0) / np.linalg.norm(neurons.first, axis=0)
    output = (neurons.output / np.linalg.norm(neurons.output, axis=1)[:, None]).T
    np.testing.assert_allclose(image, beta * output, rtol=0, atol=1e-6 * beta)
    climbed = bounds.local_maxima(V, rows, 0, np.random.default_rng(0), start=neurons.first.T, rounds=1)[0]
    assert climbed[0] <= beta * (1 + 1e-6)


def test_blocks_of_neurons_take_turns_where_all_are_too_many(monkeypatch):
    rows, loss, beta = problem("three outputs", 0.1)
    trained = lbfgs(
        ReluProgram(rows, loss, beta), random_neurons(ReluProgram(rows, loss, beta), 50, np.random.default_rng(0))
    )
    together = objective_of(rows, loss, beta, polish(ReluProgram(rows, loss, beta), trained))
    monkeypatch.setattr(newton_module, "MOST_VARIABLES", 60)
    blocks = objective_of(rows, loss, beta, polish(ReluProgram(rows, loss, beta), trained))
    assert together <= blocks < objective_of(rows, loss, beta, trained)
    assert blocks < together * (1 + 1e-2)


def test_merging_keeps_the_sum():
    rows, _ = instance()
    rng = np.random.default_rng(2)
    neurons = Neurons(0.3 * rng.standard_normal((3, 10)), 0.3 * rng.standard_normal((10, 1)))
    merged = merge(neurons.joined(neurons))
    assert merged.first.shape[1] == 10
    twice = 2 * network_outputs(rows, neurons)
    assert np.abs(network_outputs(rows, merged) - twice).max() <= 1e-12 * np.abs(twice).max()


# --- the fewest neurons ---


def test_neurons_of_one_cone_and_output_are_one():
    """Turned by less than the nearest row allows a neuron stays in its cone; the sum of both costs no more."""
    rows, _ = instance()
    rng = np.random.default_rng(4)
    neurons = Neurons(rng.standard_normal((3, 6)), rng.standard_normal((6, 2)))
    response = rows @ neurons.first
    room = np.abs(response).min(axis=0) / np.linalg.norm(rows, axis=1).max()
    turned = neurons.first + 0.9 * room * np.eye(3)[:, [0] * 6]
    pairs = neurons.joined(Neurons(turned, 2 * neurons.output))
    merged = merged_in_cones(rows, pairs)
    assert len(merged.output) == 6
    np.testing.assert_allclose(network_outputs(rows, merged), network_outputs(rows, pairs), rtol=0, atol=1e-12)
    assert merged.norms.sum() <= pairs.norms.sum()


def test_dependent_functions_lose_masses_down_to_a_vertex():
    """More neurons than ``n K``: the same function and no more penalty with at most ``n K``."""
    rows, _ = instance(6, 2)
    rng = np.random.default_rng(5)
    neurons = Neurons(rng.standard_normal((3, 40)), rng.standard_normal((40, 2)))
    fewer = vertex(rows, neurons)
    assert len(fewer.output) <= 12
    np.testing.assert_allclose(network_outputs(rows, fewer), network_outputs(rows, neurons), rtol=0, atol=1e-5)
    assert fewer.norms.sum() <= neurons.norms.sum()


# --- warm starts and budgets ---


def test_a_warm_start_is_never_lost():
    rows, loss, beta = problem("three outputs", 0.05)
    program, method = ReluProgram(rows, loss, beta), ColumnGeneration()
    solution = method.solve(program, rng=np.random.default_rng(0))
    optimum = objective_of(rows, loss, beta, solution.weights)
    stopped = method.solve(program, solution.weights, Budget(0.0), np.random.default_rng(1))
    assert objective_of(rows, loss, beta, stopped.weights) <= optimum * (1 + 1e-12)
    again = method.solve(program, solution.weights, None, np.random.default_rng(1))
    assert objective_of(rows, loss, beta, again.weights) <= optimum * (1 + 1e-12)


class CountedLoss(SquaredLoss):
    """Counts its gradients in a list."""

    count: ClassVar[list[int]] = []

    def negative_gradient(self, outputs):
        self.count.append(1)
        return super().negative_gradient(outputs)


def test_without_time_hardly_anything_is_computed_and_no_gap_is_claimed():
    rows, loss, beta = problem("squared", 0.1)
    CountedLoss.count.clear()
    solution = ColumnGeneration().solve(
        ReluProgram(rows, CountedLoss(loss.targets, loss.weights), beta),
        rng=np.random.default_rng(0),
        budget=Budget(0.0),
    )
    assert solution.stopped_by == "time_limit" and len(solution.history) == 1
    assert solution.history[0].estimated_gap > 1e-2
    assert sum(CountedLoss.count) < 20
    assert objective_of(rows, loss, beta, solution.weights) <= loss.value(np.zeros_like(loss.targets))


def test_the_callback_is_called_once_a_round_and_stops():
    rows, loss, beta = problem("three outputs", 0.02, n=100, d=5)
    reports = []
    solution = ColumnGeneration(tol=0.0).solve(
        ReluProgram(rows, loss, beta),
        rng=np.random.default_rng(0),
        budget=Budget(callback=lambda report: reports.append(report) or len(reports) == 2),
    )
    assert solution.stopped_by == "callback" and reports == solution.history
    assert reports[1].objective <= reports[0].objective


def test_the_number_of_rounds_is_limited():
    rows, loss, beta = problem("three outputs", 0.02, n=100, d=5)
    solution = ColumnGeneration(tol=0.0, max_iter=1).solve(ReluProgram(rows, loss, beta), rng=np.random.default_rng(0))
    assert solution.stopped_by == "max_iter" and len(solution.history) == 1
