"""The honesty count: wrong results that carry CERTIFIED over runs cut short, perturbed or told by a lying solver.

It must be 0, and it is printed.
"""

import dataclasses
import warnings

import numpy as np
import pytest

from convexbn.certificate.certificate import certify
from convexbn.certificate.question import Question
from convexbn.certificate.status import Status
from convexbn.program.gated import GateBlocks, GatedProgram, gated_operator
from convexbn.program.gates import gate_patterns
from convexbn.program.losses import SquaredLoss
from convexbn.program.network import BatchNormNetwork
from convexbn.program.output_bias import WithOutputBias
from convexbn.solvers.gated.group_newton import GroupNewton
from convexbn.solvers.gated.proximal import Proximal
from convexbn.solvers.gated.subspace import Subspace
from instances import neuron_arrays, proof_of_blocks
from planted import planted

TOLERANCE = 1e-6


def problems():
    for seed in range(8):
        yield planted(n=30, d=4, K=1 + seed % 3, n_gates=25, seed=seed)
    for seed, loss in enumerate(("huber", "huber", "squared_hinge", "squared_hinge")):
        yield planted(n=30, d=4, K=1 + seed % 2, n_gates=25, loss=loss, seed=seed)
    for seed, loss in enumerate(("squared", "squared", "huber", "squared_hinge")):
        yield with_intercept(planted(n=30, d=4, K=1 + seed % 2, n_gates=25, loss=loss, seed=10 + seed))


def with_intercept(problem):
    """The same with an output bias, and one more gate that is always open."""
    gates, offsets = np.insert(problem.gates, 0, 0.0, axis=1), np.append(1.0, problem.offsets)
    patterns = gate_patterns(problem.X, problem.whitening.mean, gates, offsets)
    loss = WithOutputBias.with_decay(problem.program.loss, 0.0)
    program = GatedProgram(gated_operator(problem.whitening.rows, patterns), loss, 1.0)
    return dataclasses.replace(problem, program=program, gates=gates, offsets=offsets)


def is_squared(program):
    return isinstance(program.loss.without_bias, SquaredLoss)


def reference(program):
    """Optimum to 1e-11, or 1e-9 for the first-order method."""
    newton = is_squared(program)
    return (GroupNewton(tol=1e-11) if newton else Proximal(tol=1e-9, max_iter=20000)).solve(program)


def lies(program, solution, rng):
    """Wrong answers, each told with success: (gate_index, blocks)."""
    index, blocks = solution.weights.gate_index, solution.weights.values
    noise = rng.standard_normal(blocks.shape)
    size = np.linalg.norm(blocks)
    yield index, blocks * (1 + 3e-3)
    yield index, blocks + 3e-2 * size * noise / np.linalg.norm(noise)
    yield index[1:], blocks[1:]  # a neuron dropped
    yield index, -blocks
    yield (index + 1) % program.n_gates, blocks  # a pattern flipped
    yield index, np.zeros_like(blocks)
    yield index, 1e3 * blocks
    yield index, np.full_like(blocks, np.nan)
    yield index, blocks[:, ::-1]  # coordinates mixed up


def cut_short(program):
    for iterations in (0, 1, 2, 3):
        method = GroupNewton if is_squared(program) else Subspace
        yield method(tol=TOLERANCE, max_iter=iterations).solve(program)
    for iterations in (1, 3, 10, 30):
        yield Proximal(tol=TOLERANCE, max_iter=iterations).solve(program)


def is_false(proof, optimum):
    """CERTIFIED, although the objective is further from the optimum than was claimed (or not finite)."""
    proved = proof.status in (Status.CERTIFIED, Status.TRIVIAL)
    wrong = not proof.objective <= optimum * (1 + proof.tolerance) + 1e-12
    bound_broken = proof.lower_bound > optimum * (1 + 1e-10)
    return (proved and wrong) or bound_broken


def test_no_wrong_result_is_certified(capsys):
    rng = np.random.default_rng(0)
    runs = refused = false = 0
    for problem in problems():
        base = problem.program
        for fraction in (0.5, 0.05):
            program = base.with_weight_decay(fraction * base.max_weight_decay())
            best = reference(program)
            optimum = best.history[-1].lower_bound
            answers = [s.weights for s in cut_short(program)]
            answers += list(lies(program, best, rng))
            for index, blocks in answers:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)  # NaN blocks
                    proof = proof_of_blocks(program, GateBlocks(index, blocks), TOLERANCE, "tolerance")
                runs += 1
                refused += proof.status not in (Status.CERTIFIED, Status.TRIVIAL)
                false += is_false(proof, optimum)
    with capsys.disabled():
        print(f"\nhonesty count: {false} wrong results CERTIFIED over {runs} runs ({refused} refused)")
    assert runs >= 200 and refused >= 150
    assert false == 0


def network_of(problem, program, blocks):
    network = BatchNormNetwork.from_blocks(problem.whitening, blocks, problem.gates, problem.offsets)
    return dataclasses.replace(network, output_bias=program.loss.best_bias(program.outputs(*blocks)))


def with_swapped_targets(program):
    inner = program.loss.without_bias
    swapped = dataclasses.replace(inner, targets=inner.targets[::-1])
    if inner is not program.loss:
        swapped = WithOutputBias.with_decay(swapped, program.loss.bias_decay)
    return dataclasses.replace(program, loss=swapped)


def perturbed_networks(network, rng):
    replace = dataclasses.replace
    yield "weight", replace(network, weight=network.weight + 0.03 * rng.standard_normal(network.weight.shape))
    yield "output", replace(network, output=network.output * (1 + 3e-3))
    yield "gamma", replace(network, gamma=network.gamma * (1 + 3e-3))
    yield "shift", replace(network, shift=network.shift + 0.03)
    half = {k: (v[:, ::2] if k in ("weight", "gates") else v[::2]) for k, v in neuron_arrays(network).items()}
    yield "neurons dropped", replace(network, **half)
    if network.output_bias.any():
        yield "output bias", replace(network, output_bias=network.output_bias + 0.03)
        yield "no output bias", replace(network, output_bias=0 * network.output_bias)


def test_no_perturbed_network_is_certified(capsys):
    """The same through ordinary weights: perturb, drop neurons, swap the targets, change the question."""
    rng = np.random.default_rng(1)
    runs = false = 0
    for problem in problems():
        program = problem.program.with_weight_decay(0.05 * problem.program.max_weight_decay())
        best = reference(program)
        network = network_of(problem, program, best.weights)
        proof = _judge(program, problem, network)
        assert proof.status is Status.CERTIFIED, proof.sentence
        for name, wrong in perturbed_networks(network, rng):
            runs += 1
            proof = _judge(program, problem, wrong)
            assert proof.status is Status.GAP_OPEN, (name, proof.sentence)
            false += is_false(proof, best.history[-1].lower_bound)
        for question in (with_swapped_targets(program), program.with_weight_decay(0.5 * program.weight_decay)):
            runs += 1
            proof = _judge(question, problem, network)
            false += is_false(proof, reference(question).history[-1].lower_bound)
    with capsys.disabled():
        print(f"\nhonesty count (networks): {false} wrong results CERTIFIED over {runs} runs")
    assert false == 0


def test_a_network_on_other_gates_is_refused():
    problem = next(problems())
    best = reference(problem.program)
    network = BatchNormNetwork.from_blocks(problem.whitening, best.weights, problem.gates, problem.offsets)
    other = dataclasses.replace(network, gate_index=(network.gate_index + 1) % problem.program.n_gates)
    with pytest.raises(ValueError, match="does not follow the gate"):
        _judge(problem.program, problem, other)


def _judge(program, problem, network):
    return certify(Question(problem.X, problem.whitening.mean, program, TOLERANCE), network)
