"""The exact ReLU solver: its restricted program against a conic solver, its objective against training and proof."""

import cvxpy
import numpy as np
import pytest

from convexbn import bounds
from convexbn.certificate import judge
from convexbn.evidence import AllPatterns
from convexbn.losses import LogisticLoss, SquaredLoss
from convexbn.solvers.cone_program import ConeProgram
from convexbn.solvers.neuron_pricing import NeuronPricing, Neurons, merge, network_outputs, polish
from convexbn.verdict import Status
from convexbn.whitening import whiten


def instance(n=60, d=2, K=1, seed=0):
    """Whitened rows and targets of a teacher of five neurons with noise."""
    rng = np.random.default_rng(seed)
    rows = whiten(rng.standard_normal((n, d))).rows
    targets = np.maximum(rows @ rng.standard_normal((d + 1, 5)), 0) @ rng.standard_normal((5, K))
    targets = targets / targets.std() + 0.3 * rng.standard_normal((n, K))
    return rows, targets


def decay(rows, targets, fraction):
    return fraction * bounds.local_search(targets, rows, 300, np.random.default_rng(0))[0]


def proof_of(rows, loss, beta, neurons, seconds=10.0):
    first = neurons.first.T / np.linalg.norm(neurons.first.T, axis=1)[:, None]
    root = np.sqrt(loss.weights)[:, None]
    prover = AllPatterns(loss, root * rows, beta, first, seconds)
    penalty = float(neurons.masses.sum())
    return judge(
        loss, network_outputs(rows, neurons), beta, penalty=penalty, plain_penalty=penalty,
        evidence=prover.evidence, estimate=prover.estimate, scope="all patterns", tolerance=1e-5,
        stopped_by="tolerance",
    )  # fmt: skip


@pytest.mark.parametrize("K", [1, 3])
def test_restricted_program_agrees_with_a_conic_solver(K):
    rng = np.random.default_rng(1)
    rows, targets = instance(40, 3, K)
    start = rng.standard_normal((8, 4))
    opened = start @ rows.T >= 0
    output = rng.standard_normal((8, K))
    output /= np.linalg.norm(output, axis=1)[:, None]
    w = ConeProgram(rows, targets, 0.4, opened, output).solve(start)
    variable = cvxpy.Variable((8, 4))
    fitted = sum(np.diag(o * 1.0) @ rows @ variable[[j]].T @ output[[j]] for j, o in enumerate(opened))
    cones = [cvxpy.multiply(2.0 * o - 1, rows @ variable[j]) >= 0 for j, o in enumerate(opened)]
    problem = cvxpy.Problem(
        cvxpy.Minimize(0.5 * cvxpy.sum_squares(fitted - targets) + 0.4 * cvxpy.sum(cvxpy.norm(variable, axis=1))),
        cones,
    )
    best = problem.solve(solver="CLARABEL")
    network = sum(np.outer(o * (rows @ w[j]), output[j]) for j, o in enumerate(opened))
    value = 0.5 * np.sum((network - targets) ** 2) + 0.4 * np.linalg.norm(w, axis=1).sum()
    assert value == pytest.approx(best, rel=1e-7)
    assert ((2.0 * opened - 1) * (w @ rows.T)).min() >= -1e-8


@pytest.mark.parametrize("fraction", [0.3, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_small_programs_are_certified_over_all_patterns(fraction, seed):
    rows, targets = instance(seed=seed)
    beta, loss = decay(rows, targets, fraction), SquaredLoss(targets, np.ones(60))
    solution = NeuronPricing().solve(rows, loss, beta, np.random.default_rng(seed))
    proof = proof_of(rows, loss, beta, solution.neurons)
    assert proof.status is Status.CERTIFIED, proof.sentence
    assert proof.bound == "branch and bound"


def test_three_outputs_are_certified_within_a_hundredth():
    rows, targets = instance(K=3)
    beta, loss = decay(rows, targets, 0.1), SquaredLoss(targets, np.ones(60))
    solution = NeuronPricing().solve(rows, loss, beta, np.random.default_rng(0))
    assert proof_of(rows, loss, beta, solution.neurons).relative_gap <= 0.01


def test_the_valid_and_the_estimated_gap_are_told_apart():
    rows, targets = instance(200, 9)
    beta, loss = decay(rows, targets, 0.1), SquaredLoss(targets, np.ones(200))
    solution = NeuronPricing().solve(rows, loss, beta, np.random.default_rng(0))
    proof = proof_of(rows, loss, beta, solution.neurons, seconds=2.0)
    assert proof.estimated_gap < 1e-3 < proof.relative_gap
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
        solution = NeuronPricing().solve(A, SquaredLoss(Y, w), 0.5, np.random.default_rng(0))
        values.append(solution.history[-1].objective)
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_the_logistic_loss_reaches_a_small_estimated_gap():
    rows, targets = instance()
    Y = np.where(targets > 0, 1.0, -1.0)
    bound = LogisticLoss(Y, np.ones(60))
    beta = 0.1 * bounds.local_search(bound.negative_gradient(0 * Y), rows, 300, np.random.default_rng(0))[0]
    solution = NeuronPricing(max_iter=10).solve(rows, bound, beta, np.random.default_rng(0))
    assert solution.history[-1].relative_gap < 1e-2


def test_polishing_never_loses_and_merging_keeps_the_sum():
    rows, targets = instance()
    rng = np.random.default_rng(2)
    neurons = Neurons(0.3 * rng.standard_normal((3, 10)), 0.3 * rng.standard_normal((10, 1)))
    loss = SquaredLoss(targets, np.ones(60))

    def objective(network):
        return loss.value(network_outputs(rows, network)) + 0.2 * network.masses.sum()

    assert objective(polish(rows, loss, 0.2, neurons)) <= objective(neurons)
    merged = merge(neurons.joined(neurons))
    assert merged.first.shape[1] == 10
    twice = 2 * network_outputs(rows, neurons)
    assert np.abs(network_outputs(rows, merged) - twice).max() <= 1e-12 * np.abs(twice).max()
