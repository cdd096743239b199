"""The ReLU solver against brute force over every activation pattern, and its network and bounds against that optimum.

The reference is Clarabel on the program of all cells. For one output a second brute force proves it: the largest
``|v'(A u)_+|`` is the largest over the cells, and on a cell it is the length of a projection onto a cone.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np
import pytest
import scipy.optimize

from convexbn import bounds
from convexbn._types import now
from convexbn.certificate.certificate import certify, lower_bound
from convexbn.certificate.question import Question
from convexbn.data.whitening import whiten
from convexbn.program.arrangement import enumerate_patterns, facets
from convexbn.program.losses import CrossEntropyLoss, LogisticLoss, SquaredLoss
from convexbn.program.network import BatchNormNetwork
from convexbn.program.neurons import Neurons
from convexbn.program.relu import ReluProgram
from convexbn.solvers.relu.column_generation import ColumnGeneration
from convexbn_studies.peers.conic_relu import ConicRelu
from instances import network_outputs


class Instance(NamedTuple):
    """Raw data, whitened data, loss and weight decay."""

    X: np.ndarray
    rows: np.ndarray
    loss: object
    weight_decay: float
    whitening: object

    def objective(self, neurons):
        penalty = self.weight_decay * neurons.norms.sum()
        return self.loss.value(network_outputs(self.rows, neurons)) + penalty


def data(kind, rng):
    """Raw rows, and weights where the kind has them."""
    n, d = {"line": (10, 1), "plane": (12, 2), "space": (16, 3), "few": (6, 1), "square": (5, 3)}.get(kind, (16, 2))
    X, weights = rng.standard_normal((n, d)), None
    if kind == "ties":
        X = rng.integers(0, 3, (16, 2)).astype(float)
        X = np.unique(X, axis=0)
    elif kind == "duplicates":
        X = np.repeat(X[:8], 2, axis=0)
    elif kind == "symmetric":
        X = np.vstack([X[:7], -X[:7], np.zeros((1, 2))])
    elif kind == "grid":
        X = np.array(list(itertools.product(range(4), range(4))), dtype=float)
    elif kind == "binary":
        X = np.array(list(itertools.product([0.0, 1.0], repeat=3)))
    elif kind == "weights":
        weights = rng.uniform(0.1, 3.0, n)
    elif kind == "integer weights":
        weights = rng.integers(1, 5, n).astype(float)
    elif kind == "clusters":
        X = np.vstack([X[:8], X[:8] + 1e-3 * rng.standard_normal((8, 2))])
    elif kind == "offset":
        X = X * [1.0, 1e-3] + [1e4, -1.0]
    return X, np.ones(len(X)) if weights is None else weights


def instance(kind, fraction, K=1, seed=0, loss=SquaredLoss):
    """Random targets, signs for other losses; the weight decay is a fraction of the largest."""
    rng = np.random.default_rng([seed, *kind.encode()])
    X, weights = data(kind, rng)
    targets = rng.standard_normal((len(X), K))
    bound = loss(targets if loss is SquaredLoss else np.where(targets > 0, 1.0, -1.0), weights)
    whitening = whiten(X, weights)
    root = np.sqrt(weights)[:, None]
    V = bound.negative_gradient(np.zeros_like(targets)) / root
    largest = bounds.branch_and_bound(V, root * whitening.rows, tol=1e-3).lower
    return Instance(X, whitening.rows, bound, fraction * largest, whitening)


def dual_norm(V, A):
    """``max |v'(A u)_+|`` over the unit ball; a projection onto ``W s >= 0`` is a least-squares residual (Moreau)."""
    patterns = enumerate_patterns(A).patterns
    best = 0.0
    for opened, wall in zip(patterns, facets(patterns), strict=True):
        inward = np.where(opened, 1.0, -1.0)[wall, None] * A[wall]
        gradient = A[opened].T @ V[opened, 0]
        best = max(best, *(scipy.optimize.nnls(inward.T, sign * gradient)[1] for sign in (1.0, -1.0)))
    return best


def solved(problem):
    """Network of the optimum by Clarabel and its objective; for one output proved by the norm over all cells."""
    solution = ConicRelu().solve(ReluProgram(problem.rows, problem.loss, problem.weight_decay))
    optimum = problem.objective(solution.weights)
    assert solution.value == pytest.approx(optimum, rel=2e-9)
    if problem.loss.targets.shape[1] == 1:
        assert optimum * (1 - 2e-9) <= dual_bound(problem, solution.dual) <= optimum
    return solution.weights, optimum


@functools.cache
def brute_force(kind, fraction, K, seed):
    """An instance, the network of its optimum and the objective."""
    problem = instance(kind, fraction, K, seed)
    return problem, *solved(problem)


def dual_bound(problem, dual):
    """``D(t V)`` at the best feasible multiple of a dual point, by the norm over all cells."""
    root = np.sqrt(problem.loss.weights)[:, None]
    return lower_bound(problem.loss, dual, dual_norm(dual / root, root * problem.rows), problem.weight_decay)


def pricing(problem, seed=0):
    """Neurons of the solver that is tested."""
    rng = np.random.default_rng(seed)
    return (
        ColumnGeneration(tol=1e-8).solve(ReluProgram(problem.rows, problem.loss, problem.weight_decay), rng=rng).weights
    )


@functools.cache
def priced(kind, fraction, K, seed):
    """The same on an instance."""
    return pricing(instance(kind, fraction, K, seed), seed)


def certificate(problem, neurons, seconds):
    """Certificate of the network that the neurons are on the raw rows."""
    network = BatchNormNetwork.from_neurons(problem.whitening, neurons)
    program = ReluProgram(problem.rows, problem.loss, problem.weight_decay)
    question = Question(problem.X, problem.whitening.mean, program, 1e-9)
    return certify(question, network, deadline=now() + seconds)


def objective_from_raw_data(problem, neurons):
    """Loss and ``beta / 2`` times the squared weights, with the batch norm of the raw rows computed here."""
    network = BatchNormNetwork.from_neurons(problem.whitening, neurons)
    w = problem.loss.weights
    response = (problem.X - w @ problem.X / w.sum()) @ network.weight
    response -= w @ response / w.sum()
    normalised = response / np.sqrt(w @ response**2)
    outputs = np.maximum(network.gamma * normalised + network.shift / np.sqrt(w.sum()), 0) @ network.output
    predicted = network.predict(problem.X)
    assert np.abs(predicted - outputs).max() <= 1e-9 * np.abs(outputs).max()
    squares = np.sum(network.gamma**2) + np.sum(network.shift**2) + np.sum(network.output**2)
    return [problem.loss.value(F) + 0.5 * problem.weight_decay * squares for F in (outputs, predicted)]


KINDS = [
    "line", "plane", "space", "few", "square", "ties", "duplicates", "symmetric", "grid", "binary", "weights",
    "integer weights", "clusters", "offset",
]  # fmt: skip
FRACTIONS = [(0.5, 0), (0.1, 0), (0.02, 1)]  # of the largest weight decay, and the seed


@pytest.mark.parametrize(("fraction", "seed"), FRACTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_pricing_finds_the_optimum_over_all_patterns(kind, fraction, seed):
    problem, _, optimum = brute_force(kind, fraction, 1, seed)
    assert problem.objective(priced(kind, fraction, 1, seed)) == pytest.approx(optimum, rel=1e-7)


@pytest.mark.parametrize(
    ("kind", "fraction", "seed"), [("clusters", 0.02, 13), ("few", 0.02, 0), ("plane", 0.005, 15), ("line", 0.005, 16)]
)
@pytest.mark.parametrize("start", range(2))
def test_pricing_finds_the_neuron_that_is_hard_to_find(kind, fraction, seed, start):
    """Optimal but for one missing neuron, whose region of ascent few random starts or none fall into."""
    problem, _, optimum = brute_force(kind, fraction, 1, seed)
    assert problem.objective(pricing(problem, start)) == pytest.approx(optimum, rel=1e-7)


@pytest.mark.parametrize(("fraction", "seed"), FRACTIONS)
@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("kind", ["line", "few"])
def test_pricing_finds_the_optimum_of_several_outputs_in_the_plane(kind, K, fraction, seed):
    problem, _, optimum = brute_force(kind, fraction, K, seed)
    assert problem.objective(priced(kind, fraction, K, seed)) == pytest.approx(optimum, rel=1e-7)


@pytest.mark.parametrize("fraction", [0.1, 0.02])
def test_pricing_finds_the_optimum_of_sixty_rows(fraction):
    """3542 patterns: 21 252 variables in cones for Clarabel, and 7084 projections for the proof."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((60, 2))
    whitening = whiten(X)
    targets = np.maximum(whitening.rows @ rng.standard_normal((3, 5)), 0) @ rng.standard_normal((5, 1))
    loss = SquaredLoss(targets / targets.std() + 0.3 * rng.standard_normal((60, 1)), np.ones(60))
    weight_decay = fraction * dual_norm(loss.targets, whitening.rows)
    problem = Instance(X, whitening.rows, loss, weight_decay, whitening)
    neurons = pricing(problem)
    reference = ConicRelu(tol=1e-8).solve(ReluProgram(problem.rows, problem.loss, problem.weight_decay))
    assert problem.objective(neurons) == pytest.approx(reference.value, rel=1e-7)
    dual = loss.negative_gradient(network_outputs(problem.rows, neurons))
    assert dual_bound(problem, dual) >= problem.objective(neurons) * (1 - 1e-7)


@pytest.mark.parametrize("kind", ["line", "plane", "ties", "weights"])
def test_pricing_finds_the_optimum_of_the_logistic_loss(kind):
    """No conic reference here: the network is proved by its dual point and the norm over all cells."""
    problem = instance(kind, 0.1, loss=LogisticLoss)
    neurons = pricing(problem)
    dual = problem.loss.negative_gradient(network_outputs(problem.rows, neurons))
    objective, exact = problem.objective(neurons), dual_bound(problem, dual)
    assert objective * (1 - 1e-7) <= exact <= objective
    assert certificate(problem, neurons, 0.1).lower_bound <= objective


# --- the network of the optimum ---


@pytest.mark.parametrize(("kind", "K"), [*((kind, 1) for kind in KINDS), ("line", 2), ("few", 3)])
def test_the_network_has_the_objective_of_the_program_on_raw_data(kind, K):
    problem, optimal, _ = brute_force(kind, 0.1, K, 0)
    for neurons in (optimal, priced(kind, 0.1, K, 0)):
        expected = problem.objective(neurons)
        assert objective_from_raw_data(problem, neurons) == pytest.approx([expected] * 2, rel=1e-9)


# --- bounds ---


def perturbed(neurons, size, rng):
    noise = 1 + size * rng.standard_normal(neurons.first.shape)
    return Neurons(neurons.first * noise, neurons.output)


@pytest.mark.parametrize("kind", KINDS)
def test_lower_bounds_are_never_above_the_optimum(kind):
    problem, optimal, optimum = brute_force(kind, 0.1, 1, 0)
    for size in (0.0, 1e-3, 0.1, 1.0):
        neurons = perturbed(optimal, size, np.random.default_rng(0))
        proof = certificate(problem, neurons, 0.1)
        assert proof.lower_bound <= optimum <= proof.objective * (1 + 1e-12)
        assert proof.objective == pytest.approx(problem.objective(neurons), rel=1e-9)


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("kind", ["line", "few"])
def test_lower_bounds_of_several_outputs_are_never_above_the_optimum(kind, K):
    problem, optimal, optimum = brute_force(kind, 0.1, K, 0)
    for size in (0.0, 1e-3, 0.1, 1.0):
        proof = certificate(problem, perturbed(optimal, size, np.random.default_rng(0)), 0.1)
        assert proof.lower_bound <= optimum <= proof.objective * (1 + 1e-12)
        assert size > 0 or proof.relative_gap <= 1e-5, proof.sentence


@pytest.mark.parametrize("kind", KINDS)
def test_branch_and_bound_encloses_the_largest_value_over_the_cells(kind):
    problem = instance(kind, 0.1)
    root = np.sqrt(problem.loss.weights)[:, None]
    A = root * problem.rows
    for seed in range(3):
        V = np.random.default_rng(seed).standard_normal((len(A), 1))
        exact = dual_norm(V, A)
        found = bounds.branch_and_bound(V, A, tol=1e-4, max_nodes=20_000)
        assert found.lower <= exact * (1 + 1e-12) and exact <= found.value
        assert found.stopped_by != "tolerance" or found.value <= exact * (1 + 1.01e-4)


# --- the reference itself ---


@pytest.mark.parametrize("kind", ["line", "few"])
@pytest.mark.parametrize("fraction", [0.5, 0.02])
def test_one_output_is_several_outputs_with_zeros(kind, fraction):
    """The two forms of the reference agree: vectors in cones, and cone nuclear norms."""
    problem, _, optimum = brute_force(kind, fraction, 1, 0)
    targets = np.column_stack([problem.loss.targets, np.zeros(len(problem.rows))])
    padded = problem._replace(loss=SquaredLoss(targets, problem.loss.weights))
    assert solved(padded)[1] == pytest.approx(optimum, rel=1e-8)


def test_zero_is_the_optimum_from_the_largest_weight_decay_on():
    problem, neurons, optimum = brute_force("plane", 1.1, 1, 0)
    assert neurons.first.shape == (3, 0)
    assert optimum == problem.loss.value(np.zeros_like(problem.loss.targets))


def test_the_reference_refuses_what_it_cannot_solve():
    problem = instance("plane", 0.1)
    rows, beta = problem.rows, problem.weight_decay
    targets, weights = np.tile([1.0, 0.0], (12, 1)), np.ones(12)
    for loss in (LogisticLoss(targets[:, :1], weights), CrossEntropyLoss(targets, weights)):
        with pytest.raises(TypeError, match="squared loss only"):
            ConicRelu().solve(ReluProgram(rows, loss, beta))
    with pytest.raises(TypeError, match="2 whitened columns only, not on 3"):
        ConicRelu().solve(ReluProgram(rows, SquaredLoss(targets, weights), beta))
    with pytest.raises(MemoryError, match="max_bytes=1000"):
        ConicRelu(max_bytes=1000).solve(ReluProgram(rows, problem.loss, beta))
