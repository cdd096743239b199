"""Derivatives of the optimum: exact identities, the dense system, central differences, and the edges."""

from dataclasses import replace

import numpy as np
import pytest

from convexbn.data.whitening import whiten
from convexbn.program.gated import GateBlocks, GatedProgram, gated_operator
from convexbn.program.losses import LOSSES, SquaredLoss
from convexbn.program.output_bias import WithOutputBias
from convexbn.solvers.gated.active_groups import ActiveGroups
from convexbn.solvers.gated.group_newton import GroupNewton
from convexbn.solvers.gated.implicit_differentiation import optimum_of
from instances import LOSS_NAMES, targets_for
from planted import planted

SMOOTH = ("squared", "logistic", "cross_entropy")
CASES = [(name, K) for name in SMOOTH for K in (1, 3) if (name, K) != ("cross_entropy", 1)]


def program_of(name="squared", K=1, n=30, d=4, P=12, fraction=0.1, seed=0, intercept=False):
    """Whitened Gaussian rows, random gates, and a weight decay as a fraction of the largest."""
    rng = np.random.default_rng(seed)
    rows = whiten(rng.standard_normal((n, d))).rows
    patterns = np.unique(rows @ rng.standard_normal((d + 1, P)) >= 0, axis=1)
    loss = LOSSES[name](targets_for(name, n, K, rng, soft=True), rng.uniform(0.5, 2, n))
    if intercept:
        loss = WithOutputBias.with_decay(loss, 0.0)
    program = GatedProgram(gated_operator(rows, patterns), loss, 1.0)
    return program.with_weight_decay(fraction * program.max_weight_decay())


def random_scalar(program, seed=1):
    """A linear function of outputs and blocks."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(program.loss.targets.shape), rng.standard_normal((program.n_gates, *program.block_shape))


def central_difference(moved, in_outputs, in_blocks, h, start):
    """Derivative of the scalar along a curve of programs, whose active groups must not change."""
    ahead, behind = optimum_of(moved(h), start), optimum_of(moved(-h), start)
    assert np.array_equal(ahead.gate_index, behind.gate_index), "the groups change within the step: another seed"
    outputs, blocks = ahead.outputs - behind.outputs, ahead.blocks - behind.blocks
    return (np.vdot(in_outputs, outputs) + np.vdot(in_blocks, blocks)) / (2 * h)


# --- the optimum ---


@pytest.mark.parametrize(("name", "K"), CASES)
@pytest.mark.parametrize("n_active", [1, 3])
def test_planted_optima_are_found_to_rounding(name, K, n_active):
    truth = planted(K=K, n_active=n_active, loss=name, seed=1)
    optimum = optimum_of(truth.program)
    assert optimum.residual < 1e-12
    assert np.array_equal(optimum.gate_index, truth.gate_index)
    assert np.abs(optimum.groups.blocks - truth.blocks).max() < 1e-10 * np.abs(truth.blocks).max()


@pytest.mark.parametrize("n", [40, 600])
def test_a_rough_solution_is_polished(n):
    """Also above 500 rows, where the solver factorises in float32."""
    program = program_of(n=n, K=2, fraction=0.3)
    rough = GroupNewton(tol=1e-4).solve(program)
    best = optimum_of(program)
    before = np.abs(program.outputs(rough.weights.gate_index, rough.weights.values) - best.outputs).max()
    polished = ActiveGroups(program, rough.weights.gate_index, rough.weights.values)
    for _ in range(3):
        polished = polished.newton_step()
    assert np.abs(polished.outputs - best.outputs).max() < 1e-8 < before


def test_a_start_at_the_optimum_needs_no_solver(monkeypatch):
    program = program_of()
    optimum = optimum_of(program)
    monkeypatch.setattr(GroupNewton, "solve", None)
    near = program.with_weight_decay(1.001 * program.weight_decay)
    assert optimum_of(near, optimum).residual < 1e-12


def test_a_start_far_away_does_not_matter():
    """Groups that have to enter and to leave are found from any start."""
    low, high = (optimum_of(program_of(fraction=f)) for f in (0.02, 0.6))
    assert len(high.gate_index) < len(low.gate_index)
    for target, start in ((low, high), (high, low)):
        again = optimum_of(target.groups.program, start)
        assert np.array_equal(again.gate_index, target.gate_index)
        assert np.abs(again.outputs - target.outputs).max() < 1e-11


# --- the linear system ---


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize(("name", "K"), CASES)
def test_systems_against_the_dense_hessian(name, K, intercept):
    program = program_of(name, K, intercept=intercept)
    optimum = optimum_of(program)
    (m, q, _), n = optimum.groups.blocks.shape, len(program.operator.rows)
    size = q * K
    # J of the active groups: outputs (n, K) from blocks (m, q, K)
    opened = program.operator.patterns[:, optimum.gate_index].astype(float)
    J = np.einsum("nm,nq,kl->nkmql", opened, program.operator.rows, np.eye(K)).reshape(n * K, m * size)
    half = program.loss.without_bias.hessian_root(optimum.outputs)
    curvature = np.einsum("njl,nkl,nm->njmk", half, half, np.eye(n)).reshape(n * K, n * K)
    if intercept:  # the best bias follows: the Schur complement of its K variables
        ones = np.tile(np.eye(K), (n, 1))
        pulled = curvature @ ones
        curvature -= pulled @ np.linalg.pinv(ones.T @ pulled, rcond=1e-12) @ pulled.T
    H = J.T @ curvature @ J
    for i, block in enumerate(optimum.groups.blocks):
        s, norm = block.ravel() / np.linalg.norm(block), np.linalg.norm(block)
        part = slice(i * size, (i + 1) * size)
        H[part, part] += program.weight_decay * (np.eye(size) - np.outer(s, s)) / norm
    right = np.random.default_rng(0).standard_normal(optimum.groups.blocks.shape)
    solved = np.linalg.solve(H, right.ravel()).reshape(right.shape)
    assert np.abs(optimum.groups.solve(right) - solved).max() < 1e-9 * np.abs(solved).max()


# --- derivatives ---


@pytest.mark.parametrize(("name", "K"), CASES)
@pytest.mark.parametrize("fraction", [0.3, 0.05])
@pytest.mark.parametrize("intercept", [False, True])
def test_derivatives_against_central_differences(name, K, fraction, intercept):
    program = program_of(name, K, fraction=fraction, seed=3, intercept=intercept)
    in_outputs, in_blocks = random_scalar(program)
    optimum = optimum_of(program)
    found = optimum.pullback(outputs=in_outputs, blocks=in_blocks)
    rng = np.random.default_rng(2)
    along = rng.standard_normal(program.loss.targets.shape)
    if name == "cross_entropy":
        along -= along.mean(axis=1, keepdims=True)  # stays in the simplex
    rows = rng.standard_normal(program.operator.rows.shape)

    def targets_moved(h):
        inner = program.loss.without_bias
        moved = replace(inner, targets=inner.targets + h * along)
        return replace(program, loss=WithOutputBias.with_decay(moved, 0.0) if intercept else moved)

    curves = {
        "targets": (targets_moved, np.vdot(found.targets, along)),
        "rows": (
            lambda h: replace(program, operator=replace(program.operator, rows=program.operator.rows + h * rows)),
            np.vdot(found.rows, rows),
        ),
        "weight decay": (lambda h: program.with_weight_decay(program.weight_decay + h), found.weight_decay),
    }
    for what, (curve, derivative) in curves.items():
        expected = central_difference(curve, in_outputs, in_blocks, 1e-6, optimum)
        assert derivative == pytest.approx(expected, rel=1e-6), what


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("K", [1, 3])
def test_homogeneity(K, intercept):
    """Targets and weight decay times t give blocks and outputs times t: Euler's identity, for every scalar."""
    program = program_of(K=K, intercept=intercept)
    optimum = optimum_of(program)
    in_outputs, in_blocks = random_scalar(program)
    found = optimum.pullback(outputs=in_outputs, blocks=in_blocks)
    euler = np.vdot(found.targets, program.loss.targets) + program.weight_decay * found.weight_decay
    value = np.vdot(in_outputs, optimum.outputs) + np.vdot(in_blocks, optimum.blocks)
    assert euler == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize(("name", "K"), CASES)
def test_scale_and_rotations_of_the_rows(name, K, intercept):
    """Outputs depend on ``A A' / weight_decay^2`` alone: no change along ``A Omega``, nor along (A, weight_decay)."""
    program = program_of(name, K, intercept=intercept)
    found = optimum_of(program).pullback(outputs=random_scalar(program)[0])
    Omega = np.random.default_rng(0).standard_normal((program.operator.rows.shape[1],) * 2)
    size = np.linalg.norm(found.rows) * np.linalg.norm(program.operator.rows)
    assert abs(np.vdot(found.rows, program.operator.rows @ (Omega - Omega.T))) < 1e-11 * size * np.linalg.norm(Omega)
    scale = np.vdot(found.rows, program.operator.rows) + program.weight_decay * found.weight_decay
    assert abs(scale) < 1e-11 * size


def test_rows_of_another_weight_equal_repeated_ones():
    """The derivative in a target of weight 2 is the sum of those of its two copies."""
    program = program_of(K=2)
    weighted = replace(program, loss=SquaredLoss(program.loss.targets, np.r_[2.0, np.ones(29)]))
    index = np.r_[0, np.arange(30)]
    repeated = GatedProgram(
        gated_operator(program.operator.rows[index], program.operator.patterns[index]),
        SquaredLoss(program.loss.targets[index], np.ones(31)),
        1.0,
    ).with_weight_decay(program.weight_decay)
    blocks = random_scalar(program)[1]
    once, twice = (optimum_of(p).pullback(blocks=blocks) for p in (weighted, repeated))
    assert np.allclose(once.targets[0], twice.targets[:2].sum(axis=0), rtol=1e-9)
    assert once.weight_decay == pytest.approx(twice.weight_decay, rel=1e-9)


# --- the edges ---


def test_the_zero_network_does_not_move():
    program = program_of(fraction=1.5)
    optimum = optimum_of(program)
    assert len(optimum.gate_index) == 0 and optimum.unique and 0.3 < optimum.margin < 0.4
    found = optimum.pullback(outputs=np.ones((30, 1)), blocks=np.ones((program.n_gates, *program.block_shape)))
    assert not (found.rows.any() or found.targets.any() or found.weight_decay)


@pytest.mark.parametrize(("name", "K"), CASES)
def test_the_bias_of_the_zero_network_follows_the_targets(name, K):
    program = program_of(name, K, fraction=1.5, intercept=True)
    optimum, (in_outputs, in_blocks) = optimum_of(program), random_scalar(program)
    assert len(optimum.gate_index) == 0 and optimum.unique
    assert np.ptp(optimum.outputs, axis=0).max() == 0 and np.array_equal(optimum.outputs[0], optimum.bias)
    found = optimum.pullback(outputs=in_outputs, blocks=in_blocks)
    assert not found.rows.any() and found.weight_decay == 0
    along = np.random.default_rng(2).standard_normal(program.loss.targets.shape)
    along -= along.mean(axis=1, keepdims=True) * (name == "cross_entropy")
    inner = program.loss.without_bias

    def bias(h):
        moved = replace(inner, targets=inner.targets + h * along)
        return WithOutputBias.with_decay(moved, 0.0).best_bias(np.zeros_like(along))

    expected = in_outputs.sum(axis=0) @ (bias(1e-5) - bias(-1e-5)) / 2e-5
    assert np.vdot(found.targets, along) == pytest.approx(expected, rel=1e-6)


def test_repeated_gates_leave_the_derivatives_of_the_outputs():
    program = program_of(K=2)
    doubled = replace(
        program, operator=replace(program.operator, patterns=np.repeat(program.operator.patterns, 2, axis=1))
    )
    optimum, again = optimum_of(program), optimum_of(doubled)
    assert optimum.unique and not again.unique
    in_outputs = random_scalar(program)[0]
    once, twice = optimum.pullback(outputs=in_outputs), again.pullback(outputs=in_outputs)
    assert np.abs(again.outputs - optimum.outputs).max() < 1e-10
    assert np.allclose(twice.targets, once.targets, rtol=1e-7, atol=1e-9)
    assert np.allclose(twice.rows, once.rows, rtol=1e-7, atol=1e-9)
    assert twice.weight_decay == pytest.approx(once.weight_decay, rel=1e-7)


def test_on_the_edge_the_derivative_is_that_of_one_side():
    """A group at zero that touches the weight decay: it enters on one side only."""
    truth = planted(n_active=2, seed=1)
    leaving = truth.program.outputs(truth.gate_index[1:], truth.blocks[1:])
    loss = replace(truth.program.loss, targets=truth.program.loss.targets - leaving)
    program = replace(truth.program, loss=loss)
    optimum = optimum_of(program)
    assert abs(optimum.margin) < 1e-9 and truth.gate_index[0] in optimum.gate_index
    in_outputs, _ = random_scalar(program)
    along = optimum.pullback(outputs=in_outputs).targets
    derivative, h = np.vdot(along, along), 1e-5
    sides = [
        np.vdot(in_outputs, optimum_of(replace(program, loss=replace(loss, targets=loss.targets + t * along))).outputs
                - optimum.outputs) / t
        for t in (h, -h)
    ]  # fmt: skip
    errors = sorted(abs(np.array(sides) / derivative - 1))
    assert errors[0] < 1e-4 < 1e-3 < errors[1]


def test_what_cannot_be_solved_is_refused(monkeypatch):
    program = program_of()
    poor = GroupNewton(tol=1e-5).solve(program_of(seed=5))
    monkeypatch.setattr(
        GroupNewton,
        "solve",
        lambda *_: replace(poor, weights=GateBlocks(poor.weights.gate_index[:1], poor.weights.values[:1])),
    )
    with pytest.raises(FloatingPointError, match="raise weight_decay"):
        optimum_of(program)


@pytest.mark.parametrize("name", sorted({*LOSS_NAMES} - {*SMOOTH}))
def test_losses_without_a_second_derivative_are_refused(name):
    with pytest.raises(TypeError, match="is not differentiated"):
        optimum_of(program_of(name))
