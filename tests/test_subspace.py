"""Descent in subspaces with a sampled Hessian: agreement with other solvers, float32 and float64, bounds, memory."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize

from convexbn.certificate.status import Status
from convexbn.program.gated import GateBlocks, GatedProgram, MaskedRows, block_norms, gated_operator
from convexbn.program.losses import LOSSES, SquaredLoss
from convexbn.solvers.base import Budget
from convexbn.solvers.gated import sketched_hessian
from convexbn.solvers.gated.group_newton import GroupNewton
from convexbn.solvers.gated.proximal import Proximal
from convexbn.solvers.gated.sketched_hessian import SketchedHessian, factor_hessian, row_curvature, sample_size
from convexbn.solvers.gated.subspace import Subspace
from convexbn.training.fit import FEW_ROWS, NEWTON_ROWS, choose_solver
from instances import LOSS_NAMES, proof_of_blocks, targets_for


def draw(n=400, q=7, K=3, P=30, loss="squared", fraction=0.05, seed=0):
    """Program with orthonormal rows up to weights, and gates on them."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.2, 3, n)
    root = np.sqrt(weights)[:, None]
    rows = np.linalg.qr(np.hstack([root, rng.standard_normal((n, q - 1)) * root]))[0] / root
    patterns = rows @ rng.standard_normal((q, P)) >= 0
    targets = targets_for(loss, n, K, rng)
    program = GatedProgram(gated_operator(rows, patterns), LOSSES[loss](targets, weights), 1.0)
    return program.with_weight_decay(fraction * program.max_weight_decay())


@pytest.fixture
def sampled(monkeypatch):
    """Small programs are sampled and solved in float32, as large ones are."""
    monkeypatch.setattr(sketched_hessian, "_SMALLEST", 150)


def proof_of(program, solution, tol):
    return proof_of_blocks(program, solution.weights, tol, solution.stopped_by)


# --- the sampled Hessian ---


def dense_hessian(program, penalty, outputs):
    """Hessian of one output, mean over outputs, as a dense matrix (P q, P q)."""
    curvature = row_curvature(program.loss, outputs)
    lifted = (program.operator.patterns[:, :, None] * program.operator.rows[:, None, :]).reshape(
        len(program.operator.rows), -1
    )
    return (lifted.T * curvature) @ lifted + np.diag(np.repeat(penalty, program.operator.rows.shape[1]))


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_complete_sample_gives_the_inverse_of_the_hessian(loss):
    program = draw(n=60, q=4, K=2, P=6, loss=loss)
    rng = np.random.default_rng(1)
    penalty, outputs, blocks = rng.uniform(0.1, 1, 6), rng.standard_normal((60, 2)), rng.standard_normal((6, 4, 2))
    hessian = SketchedHessian.at(program, penalty, outputs, rng)
    image = dense_hessian(program, penalty, outputs) @ hessian.solve(blocks).reshape(24, 2)
    assert np.abs(image.reshape(blocks.shape) - blocks).max() < 1e-9 * np.abs(blocks).max()


def test_sampled_inverse_is_that_of_the_stated_matrix(sampled):
    program = draw(n=300, q=4, K=2, P=6)
    rng = np.random.default_rng(1)
    penalty, outputs, blocks = rng.uniform(0.1, 1, 6), np.zeros((300, 2)), rng.standard_normal((6, 4, 2))
    hessian = SketchedHessian.at(program, penalty, outputs, rng)
    scaled = hessian.scaled.rows / np.sqrt(sketched_hessian._SKETCH)  # each with the root of its weight
    gates = hessian.scaled.patterns
    assert sample_size(program) < 300 and len(scaled) < 300
    independent = (gates.T * np.einsum("nq,nq->n", scaled, scaled) / 4) @ gates
    base = np.diag(penalty + np.trace(independent) / 6) + sketched_hessian._COMMON * independent
    lifted = (gates[:, :, None] * scaled[:, None, :]).reshape(len(scaled), -1)
    dense = np.kron(base, np.eye(4)) + sketched_hessian._SKETCH * lifted.T @ lifted
    expected = np.linalg.solve(dense, blocks.reshape(24, 2)).reshape(blocks.shape)
    assert np.abs(hessian.solve(blocks) - expected).max() < 1e-9 * np.abs(expected).max()


def test_samples_are_unbiased(monkeypatch):
    """The mean of many estimates of the Hessian in factors of the blocks is the Hessian."""
    monkeypatch.setattr(sketched_hessian, "_SMALLEST", 10)
    monkeypatch.setattr(sketched_hessian, "_PER_COLUMN", 1)
    program = draw(n=120, q=2, K=1, P=5)
    rng = np.random.default_rng(2)
    outputs, blocks, gates = np.zeros((120, 1)), rng.standard_normal((5, 2, 1)), np.arange(5)
    parts = program.operator.patterns * (program.operator.rows @ blocks[..., 0].T)
    exact = (parts.T * program.loss.weights) @ parts
    draws = [factor_hessian(program, gates, blocks, outputs, rng) for _ in range(400)]
    spread = np.std(draws, axis=0) / np.sqrt(len(draws))
    assert np.all(np.abs(np.mean(draws, axis=0) - exact) <= 5 * spread) and spread.max() > 1e-3 * exact.max()


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_hessian_of_factors_is_the_second_derivative(loss):
    program = draw(n=50, q=4, K=2, P=4, loss=loss)
    rng = np.random.default_rng(3)
    blocks, gates = rng.standard_normal((4, 4, 2)), np.arange(4)
    found = factor_hessian(program, gates, blocks, program.outputs(gates, blocks), rng)

    def slope(z):
        dual = program.loss.negative_gradient(program.outputs(gates, z[:, None, None] * blocks))
        return -np.einsum("pqk,pqk->p", blocks, program.correlations(dual))

    step = 1e-5
    for i, unit in enumerate(step * np.eye(4)):
        assert np.abs((slope(1 + unit) - slope(1 - unit)) / (2 * step) - found[i]).max() < 1e-6 * np.abs(found).max()


# --- kernels in float32 ---


@pytest.mark.parametrize("n", [100, 3000])
def test_single_precision_kernels_are_right_to_float32(n):
    program = draw(n=n, q=9, K=3, P=20)
    single = program.in_single_precision()
    rng = np.random.default_rng(0)
    S, V = rng.standard_normal((20, 9, 3)), rng.standard_normal((n, 3))
    gates = np.arange(20)
    scale = np.abs(program.operator.rows)
    seen, there = single.outputs(gates, S), program.outputs(gates, S)
    assert seen.dtype == np.float32 and single.correlations(V).dtype == np.float32
    bound = (20 + 9) * 2.0**-24 * (scale @ np.abs(S).sum(axis=0))
    assert np.all(np.abs(seen - there) <= 2 * bound)
    bound = (n + 3) * 2.0**-24 * (scale.T @ np.abs(V))
    assert np.all(np.abs(single.correlations(V) - program.correlations(V)) <= 2 * bound)


def test_memory_is_that_of_blocks_of_rows():
    """Neither kernel holds an array of n x q K or n x P K numbers."""
    n, q, K, P = 20_000, 20, 10, 40
    rng = np.random.default_rng(0)
    program = GatedProgram(
        gated_operator(rng.standard_normal((n, q)).astype(np.float32), rng.random((n, P)) < 0.5),
        SquaredLoss(np.zeros((n, K)), np.ones(n)),
        1.0,
    )
    S, V = rng.standard_normal((P, q, K)), rng.standard_normal((n, K)).astype(np.float32)
    tracemalloc.start()
    program.outputs(np.arange(P), S), program.correlations(V)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.8 * 4 * n * q * K


# --- the solver ---


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("fraction", [0.3, 0.02])
def test_agrees_with_another_solver_within_both_gaps(sampled, loss, K, fraction):
    program = draw(K=K + (loss == "cross_entropy" and K == 1), loss=loss, fraction=fraction)
    solution = Subspace(tol=1e-5).solve(program)
    proof = proof_of(program, solution, 1e-5)
    assert proof.status is Status.CERTIFIED, proof.sentence
    other = (GroupNewton if loss == "squared" else Proximal)(tol=1e-6).solve(program).history[-1]
    assert other.lower_bound <= proof.objective * (1 + 1e-12) and proof.lower_bound <= other.objective * (1 + 1e-12)


def test_history_holds_valid_bounds_and_falling_objectives(sampled):
    program = draw(n=600, P=40, fraction=0.02)
    best = GroupNewton(tol=1e-9).solve(program).history[-1].objective
    history = Subspace(tol=1e-4).solve(program).history
    assert all(report.lower_bound <= best * (1 + 1e-9) <= report.objective * (1 + 1e-5) for report in history)
    objectives = np.array([report.objective for report in history])
    assert np.all(np.diff(objectives) <= 1e-5 * objectives[:-1])


def test_single_precision_is_left_where_it_is_not_enough(sampled):
    program = draw(n=500, K=2, fraction=0.05)
    solution = Subspace(tol=1e-7).solve(program)
    assert solution.stopped_by == "tolerance" and proof_of(program, solution, 1e-7).status is Status.CERTIFIED


def test_order_of_rows_changes_nothing_beyond_the_gap(sampled):
    program = draw(n=500)
    order = np.random.default_rng(5).permutation(500)
    loss = SquaredLoss(program.loss.targets[order], program.loss.weights[order])
    operator = MaskedRows(program.operator.rows[order], program.operator.patterns[order])
    shuffled = replace(program, operator=operator, loss=loss)
    a, b = (proof_of(p, Subspace(tol=1e-4).solve(p), 1e-4) for p in (program, shuffled))
    assert a.status is b.status is Status.CERTIFIED
    assert abs(a.objective - b.objective) <= max(a.gap, b.gap)


def test_the_same_twice_bit_for_bit(sampled):
    program = draw(loss="cross_entropy")
    first, second = (Subspace(tol=1e-3).solve(program) for _ in range(2))
    assert np.array_equal(first.weights.values, second.weights.values) and first.history == second.history


@pytest.mark.parametrize("exponent", [-100, 100])
def test_scale_of_the_targets_does_not_matter(sampled, exponent):
    program = draw(n=300)
    scale = 2.0**exponent
    loss = SquaredLoss(scale * program.loss.targets, program.loss.weights)
    scaled = replace(program, loss=loss, weight_decay=scale * program.weight_decay)
    a, b = Subspace(tol=1e-3).solve(program), Subspace(tol=1e-3).solve(scaled)
    assert b.history[-1].objective == pytest.approx(scale**2 * a.history[-1].objective, rel=1e-3)
    assert proof_of(scaled, b, 1e-3).status is Status.CERTIFIED


def test_iterations_stay_few():
    """Counts guard the speed: the preconditioner and the new lengths save most iterations of proximal gradients."""
    program = draw(n=1000, q=15, K=4, P=40, fraction=0.01)
    solution = Subspace(tol=1e-3).solve(program)
    slow = Proximal(tol=1e-3).solve(program)
    assert solution.stopped_by == "tolerance" and solution.n_iter < 0.25 * slow.n_iter, (solution.n_iter, slow.n_iter)
    assert len(solution.weights.gate_index) == np.count_nonzero(block_norms(solution.weights.values))


def test_stopping_early_keeps_what_was_reached(sampled):
    program = draw(n=600, fraction=0.01)
    start = program.loss.value(np.zeros_like(program.loss.targets))
    for budget in (Budget(time_limit=0.0), Budget(callback=lambda report: report.iteration >= 4)):
        solution = Subspace(tol=1e-12).solve(program, budget=budget)
        proof = proof_of(program, solution, 1e-12)
        assert proof.status in (Status.GAP_OPEN, Status.INTERRUPTED) and proof.objective <= start
    with pytest.raises(KeyboardInterrupt):
        Subspace().solve(program, budget=Budget(callback=_interrupt))


def test_a_line_search_that_runs_out_of_evaluations_keeps_its_best_point(monkeypatch):
    """L-BFGS-B then returns where it began: on a saturated loss, where steps are far too long, every search did."""
    minimize = scipy.optimize.minimize

    def forgetful(function, x, **settings):
        found = minimize(function, x, **settings)
        found.x = x
        return found

    monkeypatch.setattr(scipy.optimize, "minimize", forgetful)
    assert Subspace().solve(draw(fraction=0.1)).stopped_by == "tolerance"


def test_a_start_where_the_loss_is_flat_is_left():
    program = draw(n=15, q=10, K=1, P=5, loss="logistic", fraction=1e-3)
    blocks = np.random.default_rng(15).standard_normal((5, 10, 1))
    blocks *= 300 / np.abs(program.outputs(np.arange(5), blocks)).max()
    solution = Subspace().solve(program, GateBlocks(np.arange(5), blocks))
    assert proof_of(program, solution, 1e-6).status is Status.CERTIFIED


def _interrupt(report):
    raise KeyboardInterrupt


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_estimators_take_it_where_newton_is_dear(loss):
    def choice(n, q=21, P=100, asked="auto"):
        rows, patterns = np.zeros((n, q)), np.zeros((n, P), dtype=bool)
        return choose_solver(
            asked, GatedProgram(gated_operator(rows, patterns), LOSSES[loss](np.zeros((n, 2)), np.ones(n)), 1.0)
        )

    few = "group_newton" if loss == "squared" else "subspace"
    assert choice(FEW_ROWS) == few and choice(NEWTON_ROWS, q=900) == few  # many columns: products are dear as well
    assert choice(FEW_ROWS + 1) == choice(NEWTON_ROWS + 1, q=900) == "subspace"
    assert choice(NEWTON_ROWS + 1, asked="proximal") == "proximal"
