"""The gated program: kernels against dense sums, row blocks, repetition, and the largest weight decay."""

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convexbn.certificate.status import Status
from convexbn.data.whitening import whiten
from convexbn.program import gated as module
from convexbn.program.gated import GateBlocks, GatedProgram, block_norms, gated_operator
from convexbn.program.gates import gate_patterns, sample_gates
from convexbn.program.losses import LOSSES, SquaredLoss
from convexbn.solvers.gated.group_newton import GroupNewton
from convexbn.solvers.gated.proximal import Proximal
from instances import EPS, LOSS_NAMES, THRESHOLD, gate_norm_in_digits, proof_of_blocks, residual, targets_for


def draw(n=50, d=4, K=2, n_gates=9, loss="squared", seed=0, weights=None, weight_decay=0.3):
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.2, 3, n) if weights is None else weights
    X = rng.standard_normal((n, d))
    whitening = whiten(X, weights)
    patterns = gate_patterns(X, whitening.mean, *sample_gates("data", n_gates, whitening, np.random.RandomState(seed)))
    return GatedProgram(
        gated_operator(whitening.rows, patterns), LOSSES[loss](targets_for(loss, n, K, rng), weights), weight_decay
    )


def value(program, gate_index, blocks):
    fit = program.loss.value(program.outputs(gate_index, blocks))
    return fit + program.weight_decay * block_norms(blocks).sum()


# --- kernels ---


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 150), st.integers(1, 6), st.integers(1, 4), st.integers(1, 12), st.integers(0, 10**6))
def test_kernels_against_dense_sums(n, q, K, P, seed):
    rng = np.random.default_rng(seed)
    A, M = rng.standard_normal((n, q)), rng.integers(0, 2, (n, P)).astype(bool)
    program = GatedProgram(gated_operator(A, M), SquaredLoss(np.zeros((n, K)), np.ones(n)), 1.0)
    index = rng.integers(P, size=rng.integers(0, 8))  # gates may repeat, or be none
    S, V = rng.standard_normal((len(index), q, K)), rng.standard_normal((n, K))
    F = np.einsum("nj,nq,jqk->nk", M[:, index].astype(float), A, S)
    assert residual(program.outputs(index, S) - F, q * max(len(index), 1), 20) < THRESHOLD
    dense = np.einsum("np,nq,nk->pqk", M.astype(float), A, V)
    assert residual(program.correlations(V) - dense, n, 20) < THRESHOLD
    assert residual(program.correlations(V, index) - dense[index], n, 20) < THRESHOLD
    assert residual(program.correlation_norms(V) - np.linalg.norm(dense, axis=(1, 2)), n, 100) < THRESHOLD


def test_kernels_are_adjoint():
    """``<V, F(S)> = <A' D V, S>``."""
    program = draw()
    rng = np.random.default_rng(1)
    index, S, V = np.array([0, 3, 8]), rng.standard_normal((3, 5, 2)), rng.standard_normal((50, 2))
    left, right = np.vdot(V, program.outputs(index, S)), np.vdot(program.correlations(V, index), S)
    assert residual(left - right, 50, np.linalg.norm(V) * np.linalg.norm(S)) < THRESHOLD


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_row_blocks_give_the_same(monkeypatch, n):
    rng = np.random.default_rng(n)
    A, M = rng.standard_normal((n, 4)), rng.integers(0, 2, (n, 7)).astype(bool)
    program = GatedProgram(gated_operator(A, M), SquaredLoss(np.zeros((n, 3)), np.ones(n)), 1.0)
    index, S, V = np.array([6, 0, 2]), rng.standard_normal((3, 4, 3)), rng.standard_normal((n, 3))
    whole = program.outputs(index, S), program.correlations(V), program.correlations(V, index)
    monkeypatch.setattr(module, "_BLOCK_ENTRIES", 1)
    assert [b.stop - b.start for b in program.operator._size(1).slices(n)] == [64] * -(-n // 64)
    blocked = program.outputs(index, S), program.correlations(V), program.correlations(V, index)
    for a, b in zip(whole, blocked, strict=True):
        assert residual(a - b, n, 20) < THRESHOLD


def test_no_blocks_give_zero_outputs():
    program = draw()
    none = np.zeros(0, dtype=np.intp)
    assert not program.outputs(none, np.zeros((0, *program.block_shape))).any()
    assert program.outputs(none, np.zeros((0, *program.block_shape))).shape == (50, 2)
    assert program.correlations(np.ones((50, 2)), none).shape == (0, 5, 2)
    assert block_norms(np.zeros((0, 5, 2))).shape == (0,)


@pytest.mark.parametrize("layout", ["C", "F"])
def test_layout_and_type_of_the_patterns_do_not_matter(layout):
    program = draw()
    V = np.random.default_rng(0).standard_normal((50, 2))
    as_numbers = GatedProgram(
        gated_operator(np.array(program.operator.rows, order=layout), program.operator.patterns.astype(float)),
        program.loss,
        program.weight_decay,
    )
    assert residual(as_numbers.correlations(np.array(V, order=layout)) - program.correlations(V), 50) < THRESHOLD


def test_kernels_do_not_change_their_input():
    program = draw()
    rng = np.random.default_rng(0)
    index, S, V = np.array([1, 2]), rng.standard_normal((2, 5, 2)), rng.standard_normal((50, 2))
    copies = [a.copy() for a in (program.operator.rows, program.operator.patterns, index, S, V)]
    program.outputs(index, S), program.correlations(V, index), program.dual_norm_bound(V), program.max_weight_decay()
    for before, now in zip(copies, (program.operator.rows, program.operator.patterns, index, S, V), strict=True):
        assert np.array_equal(before, now)


# --- bound of the dual norm ---


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("scale", [1e-100, 1.0, 1e100])
def test_dual_norm_bound_is_never_below_the_exact_norm(seed, scale):
    program = draw(n=12, d=3, K=1 + seed % 3, n_gates=5, seed=seed)
    V = scale * np.random.default_rng(seed).standard_normal((12, 1 + seed % 3))
    bound, rounding = program.dual_norm_bound(V)
    with mp.workdps(50):
        exact = gate_norm_in_digits(program, V)
        assert mp.mpf(bound) >= exact >= mp.mpf(bound) - 2 * mp.mpf(rounding)
    assert 0 < rounding < 1e-12 * np.linalg.norm(V)


def test_dual_norm_bound_covers_long_sums_that_round_one_way():
    """Equal terms: every addition may round downwards."""
    n = 20000
    rows = np.full((n, 1), 1 / np.sqrt(n))
    program = GatedProgram(
        gated_operator(rows, np.ones((n, 1), dtype=bool)), SquaredLoss(np.zeros((n, 1)), np.ones(n)), 1.0
    )
    for number in (1 / 3, 0.1, 0.7, np.pi):
        with mp.workdps(50):
            exact = n * mp.mpf(rows[0, 0]) * mp.mpf(number)
            assert mp.mpf(program.dual_norm_bound(np.full((n, 1), number))[0]) >= exact


# --- weights and weight decay ---


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_weights_are_repetition_of_the_whole_program(loss):
    rng = np.random.default_rng(2)
    counts = rng.integers(1, 5, 30)
    X, Y = rng.standard_normal((30, 4)), targets_for(loss, 30, 2, rng)
    programs = []
    for times in (np.ones(30, dtype=int), counts):
        rows, weights = np.repeat(X, times, axis=0), np.repeat(counts / times, times)
        whitening = whiten(rows, weights)
        gates = np.random.RandomState(0).standard_normal((4, 8)), np.zeros(8)
        patterns = gate_patterns(rows, whitening.mean, *gates)
        programs.append(
            GatedProgram(
                gated_operator(whitening.rows, patterns), LOSSES[loss](np.repeat(Y, times, axis=0), weights), 0.5
            )
        )
    weighted, repeated = programs
    turn = _change_of_basis(weighted, repeated, counts)
    index, S = np.array([1, 4, 6]), rng.standard_normal((3, 5, 2))
    there = np.einsum("pq,jqk->jpk", turn, S)
    first, second = value(weighted, index, S), value(repeated, index, there)
    assert residual(first - second, counts.sum(), first) < THRESHOLD
    assert weighted.max_weight_decay() == pytest.approx(repeated.max_weight_decay(), rel=1e-13)
    solver = GroupNewton(tol=1e-9) if loss == "squared" else Proximal(tol=1e-8)
    bounds = [solver.solve(p.with_weight_decay(0.1 * p.max_weight_decay())).history[-1] for p in programs]
    gaps = sum(b.objective - b.lower_bound for b in bounds)
    assert abs(bounds[0].objective - bounds[1].objective) <= gaps


def _change_of_basis(weighted, repeated, counts):
    """Orthogonal map between coordinates on the two sets of whitened rows."""
    once = repeated.operator.rows[np.cumsum(counts) - 1]
    return once.T @ (counts[:, None] * weighted.operator.rows)


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("K", [1, 3])
def test_zero_is_optimal_from_the_largest_weight_decay_on_and_not_below(loss, K):
    program = draw(loss=loss, K=K + (loss == "cross_entropy" and K == 1))
    largest = program.max_weight_decay()
    none, zero = np.zeros(0, dtype=np.intp), np.zeros((0, *program.block_shape))
    for factor, optimal in ((1.0, True), (1.5, True), (0.99, False)):
        proof = proof_of_blocks(program.with_weight_decay(factor * largest), GateBlocks(none, zero), 1e-10, "tolerance")
        assert (proof.status is Status.TRIVIAL) == optimal, proof.sentence
    assert _descends_from_zero(program, largest)


def _descends_from_zero(program, largest):
    """One step along the largest correlation lowers the objective at 0.99 of the largest weight decay only."""
    dual = program.loss.negative_gradient(np.zeros_like(program.loss.targets))
    correlations = program.correlations(dual)
    i = np.argmax(block_norms(correlations))
    step = 1e-3 * correlations[[i]] / program.loss.curvature
    at_zero = program.loss.value(np.zeros_like(dual))
    below, at = (value(program.with_weight_decay(f * largest), np.array([i]), step) for f in (0.99, 1.0))
    return below < at_zero <= at * (1 + THRESHOLD * EPS)


def test_with_weight_decay_changes_nothing_else():
    program = draw()
    other = program.with_weight_decay(7.0)
    assert other.weight_decay == 7.0 and program.weight_decay == 0.3
    assert other.operator is program.operator and other.loss is program.loss
    assert program.block_shape == (5, 2) and program.n_gates == 9
