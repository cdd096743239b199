"""ReLU networks on many rows: mini-batch descent, warm starts, budgets, and what the certificate says of them."""

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from convexbn import ConvexBNClassifier, ConvexBNRegressor, Status
from convexbn._types import now
from convexbn.data.whitening import whiten
from convexbn.program import relu
from convexbn.program.losses import CrossEntropyLoss, HuberLoss, LogisticLoss, SquaredHingeLoss, SquaredLoss
from convexbn.program.neurons import Neurons
from convexbn.program.output_bias import WithOutputBias
from convexbn.program.relu import ReluProgram
from convexbn.solvers.base import Budget
from convexbn.solvers.relu.column_generation import ColumnGeneration
from convexbn.solvers.relu.large_scale import LargeScale
from convexbn.solvers.relu.lbfgs import lbfgs
from convexbn.solvers.relu.sgd import SGD, random_start, shape
from convexbn.training import fit
from instances import network_outputs


@pytest.fixture(autouse=True)
def two_threads():
    """Threads of ours are as many as BLAS had."""
    with threadpool_limits(2, user_api="blas"):
        yield


def instance(n=2000, d=6, K=1, seed=0):
    rng = np.random.default_rng(seed)
    rows = whiten(rng.standard_normal((n, d))).rows
    targets = np.maximum(np.sqrt(n) * rows @ rng.standard_normal((d + 1, 4)), 0) @ rng.standard_normal((4, K))
    return rows, targets / targets.std() + 0.3 * rng.standard_normal((n, K))


def losses():
    rows, targets = instance(n=300, d=4, K=3)
    ones = np.ones(len(rows))
    yield rows, SquaredLoss(targets, ones)
    yield rows, HuberLoss(targets, ones, delta=0.5)
    yield rows, SquaredHingeLoss(np.where(targets > 0, 1.0, -1.0), ones)
    yield rows, LogisticLoss(np.where(targets[:, :1] > 0, 1.0, -1.0), ones)
    yield rows, CrossEntropyLoss(np.eye(3)[targets.argmax(axis=1)], ones)


def normal(*shape):
    return np.random.default_rng(5).standard_normal(shape)


def objective(rows, loss, beta, neurons):
    return loss.value(network_outputs(rows, neurons)) + beta * neurons.norms.sum()


@pytest.mark.parametrize("kind", range(5))
def test_it_ends_near_the_optimum_that_pricing_finds(kind):
    rows, loss = list(losses())[kind]
    beta = 0.05 * np.linalg.norm(loss.negative_gradient(np.zeros_like(loss.targets)))
    best = (
        ColumnGeneration(tol=1e-3, max_iter=2, n_starts=20)
        .solve(ReluProgram(rows, loss, beta), rng=np.random.default_rng(0))
        .weights
    )
    found = LargeScale(width=100, polish=100).solve(ReluProgram(rows, loss, beta), rng=np.random.default_rng(0))
    value, least = objective(rows, loss, beta, found.weights), objective(rows, loss, beta, best)
    assert least * (1 - 1e-6) <= value <= 1.02 * least
    assert found.history[-1].objective == pytest.approx(value, rel=1e-5)
    assert found.stopped_by == "max_iter"
    assert len(found.history) == 21


def test_weights_are_repetition_in_the_mean_of_the_steps():
    """The gradient of a batch does not tell a weight from repeated rows."""
    rows, targets = instance(n=40)
    twice, once = np.vstack([rows, rows]) / np.sqrt(2), np.full(40, 2.0)
    settings, loss = SGD(epochs=3, batch_size=40), SquaredLoss(targets, once)
    start = random_start(ReluProgram(rows, loss, 0.0), normal(7, 5), np.random.default_rng(0))
    weighted = settings.run(ReluProgram(rows / np.sqrt(2), loss, 0.1), start, np.random.default_rng(1))
    program = ReluProgram(twice, SquaredLoss(np.vstack([targets, targets]), np.ones(80)), 0.1)
    repeated = SGD(epochs=3, batch_size=80).run(program, start, np.random.default_rng(1))
    for (one, seen), (other, also) in zip(weighted, repeated, strict=True):
        assert np.allclose(one.first, other.first, rtol=1e-4, atol=1e-4 * np.abs(one.first).max())
        assert seen == pytest.approx(also, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-150, 1e-3, 1e6, 1e150])
def test_units_of_the_targets_do_not_matter(scale):
    rows, targets = instance(n=200)

    def trained(unit):
        loss = SquaredLoss(unit * targets, np.ones(len(rows)))
        start = random_start(ReluProgram(rows, loss, 0.0), normal(7, 20), np.random.default_rng(0))
        *_, (neurons, value) = SGD(epochs=3).run(ReluProgram(rows, loss, 0.1 * unit), start, np.random.default_rng(1))
        return network_outputs(rows, neurons) / unit, value / unit**2

    plain, other = trained(1.0), trained(scale)
    assert np.allclose(plain[0], other[0], rtol=1e-3, atol=1e-3 * np.abs(plain[0]).max())
    assert plain[1] == pytest.approx(other[1], rel=1e-3)


def test_wide_networks_do_not_diverge_on_the_squared_loss():
    """Their hidden layers are so large that the usual learning rate is far beyond what is stable."""
    rows, targets = instance(n=500)
    loss = SquaredLoss(targets, np.ones(len(rows)))
    values = [
        value
        for _, value in SGD(epochs=10).run(
            ReluProgram(rows, loss, 1.0),
            random_start(ReluProgram(rows, loss, 0.0), normal(7, 3000), np.random.default_rng(0)),
            np.random.default_rng(1),
        )
    ]
    assert values[-1] < 0.5 * loss.value(np.zeros_like(targets))


def test_the_learning_rate_rises_and_falls():
    rates = np.array([shape(done) for done in np.linspace(0, 1, 101)])
    assert rates.argmax() == 25
    assert rates.max() == 1
    assert (np.diff(rates[:26]) > 0).all()
    assert (np.diff(rates[25:]) < 0).all()
    assert rates[-1] < 1e-12


def test_a_deadline_ends_it_with_a_network():
    rows, targets = instance()
    solver = LargeScale(width=50, descent=SGD(epochs=10**6))
    found = solver.solve(
        ReluProgram(rows, SquaredLoss(targets, np.ones(len(rows))), 1.0),
        rng=np.random.default_rng(0),
        budget=Budget(0.5),
    )
    assert found.stopped_by == "time_limit"
    assert len(found.weights.output)


def test_a_callback_ends_it_after_an_epoch():
    rows, targets = instance()
    loss = SquaredLoss(targets, np.ones(len(rows)))
    found = LargeScale(width=20).solve(
        ReluProgram(rows, loss, 1.0), rng=np.random.default_rng(0), budget=Budget(callback=lambda report: True)
    )
    assert found.stopped_by == "callback"
    assert len(found.history) == 1


def test_a_warm_start_takes_fewer_epochs_and_is_no_worse():
    rows, targets = instance()
    loss, beta = SquaredLoss(targets, np.ones(len(rows))), 2.0
    cold = LargeScale(width=100).solve(ReluProgram(rows, loss, beta), rng=np.random.default_rng(0))
    warm = LargeScale(width=100).solve(ReluProgram(rows, loss, beta), rng=np.random.default_rng(1), start=cold.weights)
    assert len(warm.history) == 13
    assert objective(rows, loss, beta, warm.weights) <= 1.01 * objective(rows, loss, beta, cold.weights)


def test_warm_starts_along_a_path_are_as_good_as_cold_ones():
    """At a large weight decay nearly all neurons die, and the next point needs others."""
    rows, targets = instance(K=3)
    loss, solver = SquaredLoss(targets, np.ones(len(rows))), LargeScale(width=100)
    largest = np.linalg.norm(rows.T @ loss.negative_gradient(np.zeros_like(targets)))
    point = Neurons(rows[:2].T, 1e-3 * np.ones((2, 3)))
    for share in (0.3, 0.1, 0.03):
        beta = share * largest
        point = solver.solve(ReluProgram(rows, loss, beta), rng=np.random.default_rng(0), start=point).weights
        cold = solver.solve(ReluProgram(rows, loss, beta), rng=np.random.default_rng(1)).weights
        assert objective(rows, loss, beta, point) <= 1.01 * objective(rows, loss, beta, cold)


@pytest.mark.parametrize("kind", range(5))
def test_the_mean_of_some_descents_has_at_most_the_mean_of_their_objectives(kind):
    rows, loss = list(losses())[kind]
    beta = 0.05 * np.linalg.norm(loss.negative_gradient(np.zeros_like(loss.targets)))
    rng = np.random.default_rng(0)
    alone = [LargeScale(width=20, polish=0).solve(ReluProgram(rows, loss, beta), rng=rng) for _ in range(3)]
    found = LargeScale(width=20, polish=0, n_starts=3).solve(
        ReluProgram(rows, loss, beta), rng=np.random.default_rng(0)
    )
    outputs = np.mean([network_outputs(rows, one.weights) for one in alone], axis=0)
    np.testing.assert_allclose(
        network_outputs(rows, found.weights), outputs, rtol=0, atol=1e-12 * np.abs(outputs).max()
    )
    mean = np.mean([objective(rows, loss, beta, one.weights) for one in alone])
    assert objective(rows, loss, beta, found.weights) <= mean * (1 + 1e-12)
    assert [p.objective for p in found.history] == [p.objective for one in alone for p in one.history]
    polished = LargeScale(width=20, polish=5, n_starts=3).solve(
        ReluProgram(rows, loss, beta), rng=np.random.default_rng(0)
    )
    assert objective(rows, loss, beta, polished.weights) <= objective(rows, loss, beta, found.weights) * (1 + 1e-6)


def test_descents_share_the_time_and_a_warm_start_is_one_of_them():
    rows, targets = instance()
    loss = SquaredLoss(targets, np.ones(len(rows)))
    endless = LargeScale(width=50, n_starts=2, polish=0, descent=SGD(epochs=10**6))
    both = endless.solve(ReluProgram(rows, loss, 1.0), rng=np.random.default_rng(0), budget=Budget(1.0))
    assert both.stopped_by == "time_limit" and 50 < len(both.weights.output) <= 100
    warm = LargeScale(width=50, n_starts=2).solve(
        ReluProgram(rows, loss, 1.0), rng=np.random.default_rng(0), start=both.weights
    )
    assert len(warm.history) == 13


def test_a_callback_in_a_later_descent_leaves_it_out():
    rows, targets = instance()
    loss = SquaredLoss(targets, np.ones(len(rows)))
    first = LargeScale(width=20, polish=0).solve(ReluProgram(rows, loss, 1.0), rng=np.random.default_rng(0)).weights
    stopped = LargeScale(width=20, n_starts=3).solve(
        ReluProgram(rows, loss, 1.0),
        rng=np.random.default_rng(0),
        budget=Budget(callback=lambda report: report.iteration == 22),
    )
    assert stopped.stopped_by == "callback" and len(stopped.history) == 22
    np.testing.assert_array_equal(stopped.weights.output, first.output)


def test_estimators_take_it_on_many_rows(monkeypatch):
    monkeypatch.setattr(fit, "PRICING_ENTRIES", 1000)
    rng = np.random.default_rng(0)
    X = rng.standard_normal((700, 10))
    y = np.maximum(X @ rng.standard_normal(10), 0)
    with pytest.warns(match="GAP_OPEN"):
        model = ConvexBNRegressor(activation="relu", weight_decay=0.5, width=30, random_state=0, proof_time=60).fit(
            X, y
        )
    assert model.n_iter_ == 21
    assert model.network_.n_neurons <= 30
    assert model.score(X, y) > 0.9
    assert model.certificate_.status is Status.GAP_OPEN
    assert 0 < model.certificate_.estimated_gap <= model.certificate_.relative_gap < 1
    labels = (y > np.median(y)).astype(int)
    with pytest.warns(match="GAP_OPEN"):
        few = ConvexBNClassifier(activation="relu", loss="logistic", max_iter=2, random_state=0).fit(X, labels)
    assert few.n_iter_ == 3
    with pytest.warns(match="GAP_OPEN"):
        mean = ConvexBNClassifier(
            activation="relu", loss="logistic", width=9, n_starts=3, max_iter=2, random_state=0
        ).fit(X, labels)
    assert mean.n_iter_ == 7 and 9 < mean.network_.n_neurons <= 27


def test_an_output_bias_is_one_of_all_blocks_of_rows(monkeypatch):
    rng = np.random.default_rng(3)
    rows, labels = rng.standard_normal((700, 4)), np.eye(3)[rng.integers(3, size=700)]
    loss = WithOutputBias.with_decay(CrossEntropyLoss(labels, rng.uniform(0.5, 2, 700)), 0.1)
    start = Neurons(rng.standard_normal((4, 6)), rng.standard_normal((6, 3)))
    program = ReluProgram(rows, loss, 1.0)
    at_once = lbfgs(program, start, max_iter=5)
    monkeypatch.setattr(relu, "BLOCK_ENTRIES", 6 * 256)
    in_blocks = lbfgs(program, start, max_iter=5)
    assert np.allclose(in_blocks.first, at_once.first, rtol=1e-6, atol=1e-9)
    outputs, parts = network_outputs(rows, at_once), (slice(0, 300), slice(300, 700))
    assert sum(loss.of_rows(part).value(outputs[part]) for part in parts) <= loss.value(outputs)


def test_a_start_far_above_outputs_of_zero_is_no_divergence():
    """Random outputs for ten classes have many times the loss of zeros, at every learning rate."""
    rows, _ = instance(n=40)
    loss = SquaredLoss(np.eye(10)[np.arange(40) % 10], np.ones(40))
    rng = np.random.default_rng(0)
    start = random_start(ReluProgram(rows, loss, 0.0), rng.standard_normal((rows.shape[1], 20)), rng)
    start = Neurons(start.first, 3 * start.output)
    assert loss.value(network_outputs(rows, start)) > 20 * loss.value(np.zeros_like(loss.targets))
    found = list(SGD(epochs=200).run(ReluProgram(rows, loss, 1.0), start, rng))
    assert len(found) == 200 and found[-1][1] < loss.value(np.zeros_like(loss.targets))


@pytest.mark.parametrize("kind", [0, 4])
def test_a_descent_that_diverges_begins_again_slower(kind):
    rows, loss = list(losses())[kind]
    rate = {"learning_rate": 1e6} if kind == 4 else {"learning_rate": 1e6, "momentum": 1e5}
    rng = np.random.default_rng(0)
    start = random_start(ReluProgram(rows, loss, 0.0), rng.standard_normal((rows.shape[1], 20)), rng)
    with np.errstate(all="ignore"):
        *_, (found, value) = SGD(epochs=5, **rate).run(ReluProgram(rows, loss, 1.0), start, rng)
        assert value <= 10 * loss.value(np.zeros_like(loss.targets)) and np.isfinite(found.norms).all()
        late = list(SGD(epochs=5, **rate).run(ReluProgram(rows, loss, 1.0), start, rng, now()))
    assert len(late) <= 1


def test_no_epochs_are_no_training(monkeypatch):
    monkeypatch.setattr(fit, "PRICING_ENTRIES", 1000)
    rng = np.random.default_rng(0)
    X = rng.standard_normal((400, 6))
    with pytest.warns(match="GAP_OPEN"):
        model = ConvexBNRegressor(
            activation="relu", width=5, max_iter=0, time_limit=0.1, random_state=0, weight_decay=1.0
        ).fit(X, X[:, 0])
    assert model.n_iter_ == 1
