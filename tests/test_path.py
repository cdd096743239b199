"""Regularisation path: every point certified, warm starts that pay, and the same optima as from cold."""

import numpy as np
import pytest

from convexbn.certificate import certify_blocks
from convexbn.losses import LOSSES
from convexbn.path import weight_decay_path
from convexbn.patterns import gate_patterns, sample_gates
from convexbn.program import GatedProgram
from convexbn.solvers.group_newton import GroupNewton
from convexbn.solvers.proximal import Proximal
from convexbn.solvers.solution import Budget
from convexbn.verdict import Status
from convexbn.whitening import whiten
from instances import targets_for


def draw(loss="squared", n=80, d=6, K=1, P=60, seed=0):
    """A small analogue of an image problem: correlated features, gates on the raw rows, noisy targets."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)) @ rng.standard_normal((d, d))
    whitening = whiten(X)
    gates, offsets = sample_gates("data", P, whitening, np.random.RandomState(seed))
    targets = targets_for(loss, n, K, rng)
    return GatedProgram(
        whitening.rows, gate_patterns(X, whitening.mean, gates, offsets), LOSSES[loss](targets, np.ones(n)), 1.0
    )


def decreasing(program, smallest=0.01, count=10):
    return program.max_weight_decay() * np.geomspace(1, smallest, count)


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_every_point_is_certified_in_few_factorisations(K, seed):
    program = draw(K=K, seed=seed)
    points = list(weight_decay_path(program, decreasing(program)))
    assert [p.certificate.status for p in points] == [Status.TRIVIAL] + [Status.CERTIFIED] * 9
    assert [p.weight_decay for p in points] == decreasing(program).tolist()
    assert max(p.solution.n_factorizations for p in points) <= 6
    assert all(p.certificate.tolerance == GroupNewton().tol for p in points)


@pytest.mark.parametrize(("loss", "solver"), [("squared", GroupNewton(tol=1e-7)), ("logistic", Proximal(tol=1e-5))])
def test_points_equal_cold_solves_within_their_gaps(loss, solver):
    program = draw(loss, n=50, P=30)
    for point in weight_decay_path(program, decreasing(program, 0.05, 6), solver):
        current = program.with_weight_decay(point.weight_decay)
        cold = solver.solve(current)
        proof = certify_blocks(current, cold.gate_index, cold.blocks, tolerance=solver.tol, stopped_by=cold.stopped_by)
        warm = point.certificate
        assert warm.status in (Status.CERTIFIED, Status.TRIVIAL) and proof.status is warm.status
        assert warm.lower_bound <= proof.objective and proof.lower_bound <= warm.objective


def test_warm_starts_save_work():
    program = draw(n=100, P=80)
    points = list(weight_decay_path(program, decreasing(program, 0.02, 8)))
    cold = [GroupNewton().solve(program.with_weight_decay(p.weight_decay)).n_factorizations for p in points]
    assert sum(p.solution.n_factorizations for p in points) < sum(cold)


@pytest.mark.parametrize("K", [1, 2])
def test_loss_falls_and_penalty_grows_with_less_weight_decay(K):
    """Optima of ``L + beta P``: exact up to what the gaps leave open, for every pair of neighbours."""
    program = draw(K=K)
    points = list(weight_decay_path(program, decreasing(program), GroupNewton(tol=1e-8)))
    losses = [program.loss.value(program.outputs(p.solution.gate_index, p.solution.blocks)) for p in points]
    objectives = [p.certificate.objective for p in points]
    gaps = [p.certificate.gap for p in points]
    for i in range(len(points) - 1):
        large, small = points[i].weight_decay, points[i + 1].weight_decay
        slack = (small * gaps[i] + large * gaps[i + 1]) / (large - small)
        assert losses[i + 1] <= losses[i] + slack
        assert objectives[i + 1] <= objectives[i] + gaps[i + 1]  # the optimal value is monotone in the weight decay
    values = np.array(objectives)
    betas = np.array([p.weight_decay for p in points])
    slopes = np.diff(values) / np.diff(betas)  # the optimal value is concave: its slope is the penalty
    rounding = np.add(gaps[1:], gaps[:-1]) / np.abs(np.diff(betas))
    assert np.all(np.diff(slopes) >= -(rounding[1:] + rounding[:-1]))


def test_order_is_the_callers():
    program = draw(n=40, P=20)
    largest = program.max_weight_decay()
    betas = [0.1 * largest, 2 * largest, 0.05 * largest, 0.05 * largest]
    points = list(weight_decay_path(program, betas))
    assert [p.weight_decay for p in points] == betas
    assert [p.certificate.status.value for p in points] == ["CERTIFIED", "TRIVIAL", "CERTIFIED", "CERTIFIED"]
    assert points[3].solution.n_factorizations <= 2
    assert list(weight_decay_path(program, [])) == []


def test_points_come_one_by_one_and_do_not_change_the_program():
    program = draw(n=40, P=20)
    asked = []

    def betas():
        for fraction in (0.5, 0.1, np.nan):
            asked.append(fraction)
            yield fraction * program.max_weight_decay()

    path = weight_decay_path(program, betas())
    assert asked == []
    first = next(path)
    blocks = first.solution.blocks.copy()
    next(path)
    assert asked == [0.5, 0.1] and program.weight_decay == 1.0
    assert np.array_equal(first.solution.blocks, blocks)


def test_a_path_repeats_bit_for_bit():
    program = draw(n=40, P=20)
    first, second = (list(weight_decay_path(program, decreasing(program, count=4))) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.solution.blocks, b.solution.blocks) and a.certificate == b.certificate


def test_a_shared_budget_ends_every_later_point_honestly():
    program = draw(n=40, P=20)
    calls = []
    budget = Budget(callback=lambda progress: calls.append(progress) or len(calls) >= 6)
    points = list(weight_decay_path(program, decreasing(program, 0.001, 5), GroupNewton(tol=1e-12), budget))
    assert len(points) == 5 and points[-1].certificate.status is Status.INTERRUPTED
    for point in points:
        closed = point.certificate.relative_gap <= 1e-12
        assert closed == (point.certificate.status in (Status.CERTIFIED, Status.TRIVIAL))
