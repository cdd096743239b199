"""Every solver on every loss and instance: the same optimum, proved by the same judge, nothing mutated."""

import inspect
from dataclasses import is_dataclass, replace

import numpy as np
import pytest

from convexbn.certificate.status import Status
from convexbn.data.pooling import Regions
from convexbn.data.whitening import whiten
from convexbn.program.gated import GatedProgram, gated_operator
from convexbn.program.losses import LOSSES, SquaredLoss
from convexbn.program.network import BatchNormNetwork
from convexbn.program.rays import NoFormulaError
from convexbn.program.readout import AveragePooling, MaxPooling
from convexbn.program.relu import ReluProgram
from convexbn.solvers.base import Budget
from convexbn.solvers.closed_form import ClosedForm
from convexbn.solvers.gated.conic import Conic
from convexbn.solvers.gated.group_newton import GroupNewton
from convexbn.solvers.gated.proximal import Proximal
from convexbn.solvers.gated.subspace import Subspace
from convexbn.solvers.relu.column_generation import ColumnGeneration
from convexbn.solvers.relu.large_scale import LargeScale
from instances import LOSS_NAMES, proof_of_blocks, targets_for
from planted import planted

SOLVERS = {"group_newton": GroupNewton, "proximal": Proximal, "subspace": Subspace, "conic": Conic}
SQUARED_ONLY = {"group_newton", "conic"}
CASES = [
    (solver, loss, K)
    for solver in SOLVERS
    for loss in LOSS_NAMES
    for K in (1, 3)
    if not (loss == "cross_entropy" and K == 1) and not (loss != "squared" and solver in SQUARED_ONLY)
]


@pytest.mark.parametrize(("solver", "loss", "K"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_planted_optimum_is_found_and_proved(solver, loss, K, seed):
    weights = np.random.default_rng(seed).uniform(0.2, 3.0, 40) if seed else np.ones(40)
    problem = planted(K=K, loss=loss, weights=weights, n_active=1, seed=seed)
    solution = SOLVERS[solver](tol=1e-8).solve(problem.program)
    proof = proof_of_blocks(problem.program, solution.weights, 1e-8, solution.stopped_by)
    assert proof.status is Status.CERTIFIED, proof.sentence
    assert proof.objective == pytest.approx(problem.objective, rel=2e-8)
    assert proof.lower_bound <= problem.objective * (1 + 1e-12)


@pytest.mark.parametrize("n_active", [2, 4])
@pytest.mark.parametrize("K", [1, 2])
def test_several_planted_gates(n_active, K):
    found = 0
    for seed in range(12):
        try:
            problem = planted(n=60, d=8, K=K, n_gates=20, n_active=n_active, seed=seed)
        except AssertionError:  # the draw has no such dual point
            continue
        found += 1
        solution = GroupNewton(tol=1e-10).solve(problem.program)
        assert solution.history[-1].objective == pytest.approx(problem.objective, rel=1e-9)
        assert set(problem.gate_index) <= set(solution.weights.gate_index)
    assert found >= 2


@pytest.mark.parametrize("exponent", [-150, -3, 3, 150])
@pytest.mark.parametrize("solver", ["group_newton", "proximal", "subspace"])
def test_planted_optimum_at_every_scale_of_the_data(solver, exponent):
    reference = planted(seed=1)
    problem = planted(seed=1, scale=10.0**exponent)
    assert problem.objective == pytest.approx(reference.objective, rel=1e-10)
    solution = SOLVERS[solver]().solve(problem.program)
    assert solution.stopped_by == "tolerance"
    assert solution.history[-1].objective == pytest.approx(reference.objective, rel=2e-6)
    network = BatchNormNetwork.from_blocks(problem.whitening, solution.weights, problem.gates, problem.offsets)
    expected = problem.program.outputs(solution.weights.gate_index, solution.weights.values)
    assert np.abs(network.predict(problem.X) - expected).max() <= 1e-10 * np.abs(expected).max()


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_agree_on_unplanted_programs(solver):
    rng = np.random.default_rng(5)
    problem = planted(K=2, seed=3)
    loss = type(problem.program.loss)(rng.standard_normal((40, 2)), problem.program.loss.weights)
    program = replace(problem.program, loss=loss, weight_decay=1.0)
    program = program.with_weight_decay(0.1 * program.max_weight_decay())
    reference = GroupNewton(tol=1e-10).solve(program).history[-1].objective
    solution = SOLVERS[solver](tol=1e-8).solve(program)
    value = program.loss.value(program.outputs(solution.weights.gate_index, solution.weights.values))
    value += program.weight_decay * np.linalg.norm(solution.weights.values, axis=(1, 2)).sum()
    assert value == pytest.approx(reference, rel=1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_input_is_not_mutated_and_repeats_bit_for_bit(solver):
    problem = planted(K=2, seed=0)
    program = problem.program
    copies = [
        a.copy() for a in (program.operator.rows, program.operator.patterns, program.loss.targets, program.loss.weights)
    ]
    first, second = (SOLVERS[solver]().solve(program) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first.weights, second.weights, strict=True))
    for before, now in zip(
        copies,
        (program.operator.rows, program.operator.patterns, program.loss.targets, program.loss.weights),
        strict=True,
    ):
        assert np.array_equal(before, now)


@pytest.mark.parametrize("solver", ["group_newton", "proximal", "subspace"])
def test_warm_start_reaches_the_cold_optimum_in_fewer_iterations(solver):
    program = planted(n=60, d=6, K=1, seed=2).program
    program = program.with_weight_decay(0.2 * program.max_weight_decay())
    cold = SOLVERS[solver](tol=1e-8).solve(program)
    warm = SOLVERS[solver](tol=1e-8).solve(program, start=cold.weights)
    assert warm.history[-1].objective == pytest.approx(cold.history[-1].objective, rel=1e-8)
    assert warm.n_iter < cold.n_iter


@pytest.mark.parametrize("solver", ["group_newton", "proximal", "subspace"])
def test_budgets_end_the_solve_with_their_name(solver):
    program = planted(n=60, d=6, seed=2).program
    program = program.with_weight_decay(0.01 * program.max_weight_decay())
    method = SOLVERS[solver](tol=1e-12)
    assert SOLVERS[solver](tol=1e-12, max_iter=1).solve(program).stopped_by == "max_iter"
    assert method.solve(program, budget=Budget(time_limit=0.0)).stopped_by == "time_limit"
    assert method.solve(program, budget=Budget(callback=lambda p: p.iteration >= 2)).stopped_by == "callback"
    with pytest.raises(ZeroDivisionError):
        method.solve(program, budget=Budget(callback=lambda p: 1 / 0))


# -- one signature for all: gated and ReLU --

EVERY = {**SOLVERS, "closed_form": ClosedForm, "column_generation": ColumnGeneration, "large_scale": LargeScale}


def relu_program(solver, loss="squared", K=2, n=12):
    """A program that a ReLU solver takes: of full rank for the formula."""
    rng = np.random.default_rng(4)
    X = rng.standard_normal((n, n if solver == "closed_form" else 3))
    bound = LOSSES[loss](targets_for(loss, n, K, rng), rng.uniform(0.5, 2, n))
    program = ReluProgram(whiten(X, bound.weights).rows, bound, 0.1)
    largest = np.linalg.norm(program.unit_dual(program.dual(program.no_neurons)), axis=0).max()
    return X, replace(program, weight_decay=0.2 * float(largest))


@pytest.mark.parametrize("solver", EVERY)
def test_every_solver_takes_program_start_budget_and_rng(solver):
    method = EVERY[solver]()
    assert [*inspect.signature(method.solve).parameters] == ["program", "start", "budget", "rng"]
    assert is_dataclass(method) and method.__dataclass_params__.frozen


@pytest.mark.parametrize("solver", ["closed_form", "column_generation", "large_scale"])
def test_relu_solvers_leave_their_arguments_and_repeat_bit_for_bit(solver):
    _, program = relu_program(solver, K=1)
    arrays = (program.rows, program.loss.targets, program.loss.weights)
    copies = [array.copy() for array in arrays]
    first, second = (EVERY[solver]().solve(program, rng=np.random.default_rng(0)) for _ in range(2))
    assert np.array_equal(first.weights.first, second.weights.first)
    assert np.array_equal(first.weights.output, second.weights.output)
    assert all(np.array_equal(a, b) for a, b in zip(copies, arrays, strict=True))


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_relu_solvers_agree_and_their_bounds_are_no_larger(loss):
    """The formula is the reference at full rank; elsewhere the best network is."""
    K = 3 if loss == "cross_entropy" else 1
    _, square = relu_program("closed_form", loss, K)
    exact = square.objective(ClosedForm().solve(square).weights)
    searched = ColumnGeneration().solve(square)
    assert square.objective(searched.weights) == pytest.approx(exact, rel=1e-5)
    assert searched.history[-1].lower_bound <= exact * (1 + 1e-9)
    _, program = relu_program("column_generation", loss, K, n=30)
    best = ColumnGeneration().solve(program)
    value = program.objective(best.weights)
    assert best.history[-1].objective == pytest.approx(value, rel=1e-12)
    again = ColumnGeneration().solve(program, best.weights)
    assert program.objective(again.weights) <= value * (1 + 1e-12)
    descended = LargeScale(width=40).solve(program)
    assert program.objective(descended.weights) >= value * (1 - 1e-5)


@pytest.mark.parametrize("solver", ["column_generation", "large_scale"])
def test_budgets_end_relu_solvers_with_their_name(solver):
    _, program = relu_program(solver, n=40)
    method = EVERY[solver]()
    assert method.solve(program, budget=Budget(time_limit=0.0)).stopped_by == "time_limit"
    assert method.solve(program, budget=Budget(callback=lambda p: True)).stopped_by == "callback"
    with pytest.raises(ZeroDivisionError):
        method.solve(program, budget=Budget(callback=lambda p: 1 / 0))


def test_what_a_solver_does_not_take_is_said_before_work():
    maxima = MaxPooling(Regions((1, 2), (1, 1)))
    X, program = relu_program("column_generation", K=1)
    pooled = ReluProgram(program.rows, SquaredLoss(np.ones((6, 1)), np.ones(6)), 0.1, maxima)
    with pytest.raises(NoFormulaError, match="not square"):
        ClosedForm().solve(program)
    with pytest.raises(TypeError, match="max pooling"):
        _ = pooled.on_rows
    patterns = np.ones((len(X), 2), dtype=bool)
    regions = gated_operator(program.rows, patterns, AveragePooling(Regions((1, 2), (1, 2))))
    for solver, words in (("group_newton", "dense data"), ("subspace", "dense data"), ("conic", "Frobenius")):
        with pytest.raises(TypeError, match=words):
            EVERY[solver]().solve(GatedProgram(regions, SquaredLoss(np.ones((6, 1)), np.ones(6)), 0.1))


@pytest.mark.parametrize("loss", ["huber", "squared_hinge", "logistic"])
@pytest.mark.parametrize("solver", ["group_newton", "conic"])
def test_other_losses_are_refused_before_work(solver, loss):
    with pytest.raises(TypeError, match="proximal"):
        SOLVERS[solver]().solve(planted(loss=loss).program)


@pytest.mark.parametrize("solver", ["group_newton", "proximal", "subspace"])
def test_zero_is_returned_from_the_largest_weight_decay_on(solver):
    program = planted(seed=4).program
    solution = SOLVERS[solver]().solve(program.with_weight_decay(program.max_weight_decay()))
    proof = proof_of_blocks(
        program.with_weight_decay(program.max_weight_decay()), solution.weights, 1e-6, solution.stopped_by
    )
    assert len(solution.weights.gate_index) == 0 and proof.status is Status.TRIVIAL
    below = SOLVERS[solver](tol=1e-9).solve(program.with_weight_decay(0.99 * program.max_weight_decay()))
    assert len(below.weights.gate_index) > 0


def test_newton_iterations_stay_few():
    """Counts guard the speed: 8 iterations and factorisations solve each of these today."""
    counts = []
    for seed in range(10):
        program = planted(n=120, d=10, n_gates=100, seed=seed).program
        program = program.with_weight_decay(0.05 * program.max_weight_decay())
        solution = GroupNewton().solve(program)
        counts.append(solution.n_factorizations)
        assert solution.stopped_by == "tolerance"
    assert max(counts) <= 14, counts
