"""The judge: bounds valid in 50 digits, honest statuses and sentences, and networks judged by their own batch norm."""

import dataclasses

import mpmath as mp
import numpy as np
import pytest

from convexbn import ConvexBNRegressor
from convexbn.certificate import certificate
from convexbn.certificate.certificate import Found, certify, judge, lower_bound
from convexbn.certificate.dual_bounds import NOTHING_KNOWN, DualBound
from convexbn.certificate.question import Question
from convexbn.certificate.status import STOPPED_BY, Scope, Status
from convexbn.data.whitening import whiten
from convexbn.program.gated import GateBlocks, GatedProgram, gated_operator
from convexbn.program.gates import first_of_each_pattern, gate_patterns, sample_gates
from convexbn.program.losses import LOSSES, CrossEntropyLoss, LogisticLoss, SquaredLoss
from convexbn.program.network import BatchNormNetwork
from convexbn.program.neurons import Neurons
from convexbn.program.relu import ReluProgram
from convexbn.solvers.closed_form import ClosedForm
from convexbn.solvers.gated.group_newton import GroupNewton
from convexbn.solvers.gated.proximal import Proximal
from instances import (
    EPS,
    THRESHOLD,
    best_multiple_in_digits,
    conditioned,
    gate_norm_in_digits,
    labels,
    orthant_in_digits,
    proof_of_blocks,
    proof_of_gates,
    proof_of_outputs,
    proof_of_relu,
    residual,
    targets_for,
)

TOLERANCE = 1e-6
GATED, ALL = "these gates", "all patterns"


def solved(loss="squared", K=2, fraction=0.1, seed=0, weights=None, rank=None, n=30, d=5, tol=1e-9):
    """A gated program on raw rows, its solution as blocks and as a network."""
    rng = np.random.default_rng(seed)
    weights = np.ones(n) if weights is None else weights
    X = rng.standard_normal((n, d)) * np.geomspace(1, 0.2, d) + 1
    whitening = whiten(X, weights, rank=rank)
    gates, offsets = sample_gates("whitened", 25, whitening, np.random.RandomState(seed))
    kept = first_of_each_pattern(gate_patterns(X, whitening.mean, gates, offsets))
    gates, offsets = gates[:, kept], offsets[kept]
    bound = LOSSES[loss](targets_for(loss, n, K, rng), weights)
    program = GatedProgram(gated_operator(whitening.rows, gate_patterns(X, whitening.mean, gates, offsets)), bound, 1.0)
    program = program.with_weight_decay(fraction * program.max_weight_decay())
    solver = GroupNewton(tol=tol) if loss == "squared" else Proximal(tol=tol, max_iter=20000)
    solution = solver.solve(program)
    network = BatchNormNetwork.from_blocks(whitening, solution.weights, gates, offsets)
    return program, X, whitening, solution, network


def judged(program, X, network, tolerance=TOLERANCE):
    return proof_of_gates(program, X, network, tolerance)


def judge_of(outputs, targets, *, bound=1.0, weight_decay=0.1, tolerance=TOLERANCE, **words):
    """Judge outputs of a squared loss with a dual norm of our own."""
    outputs, targets = (np.asarray(a, dtype=float).reshape(-1, 1) for a in (outputs, targets))
    loss = SquaredLoss(targets, np.ones(len(targets)))
    return proof_of_outputs(loss, outputs, weight_decay, bound=bound, tol=tolerance, **words)


# --- validity in 50 digits ---


@pytest.mark.parametrize("loss", ["squared", "huber", "squared_hinge", "logistic"])
@pytest.mark.parametrize("seed", range(4))
def test_lower_bound_of_gates_is_never_above_the_exact_one(loss, seed):
    """The best feasible multiple of the residual, in exact arithmetic, bounds the number from above and closely."""
    rng = np.random.default_rng(seed)
    program, _, _, solution, _ = solved(loss, 1 + seed % 2, 0.2, seed, rng.uniform(0.2, 3, 7), n=7, d=2)
    noise = 1e-3 * rng.standard_normal(solution.weights.values.shape)
    for blocks in (solution.weights.values, solution.weights.values + noise, 0 * solution.weights.values):
        proof = proof_of_blocks(program, GateBlocks(solution.weights.gate_index, blocks), TOLERANCE, "tolerance")
        dual = program.loss.negative_gradient(program.outputs(solution.weights.gate_index, blocks))
        with mp.workdps(50):
            norm = gate_norm_in_digits(program, dual)
            exact = best_multiple_in_digits(program.loss, dual, norm, program.weight_decay)
            assert mp.mpf(proof.lower_bound) <= exact
            assert exact - mp.mpf(proof.lower_bound) <= 1e-12 * proof.objective


@pytest.mark.parametrize("loss", ["squared", "huber", "squared_hinge", "logistic"])
@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_lower_bound_of_all_patterns_is_never_above_the_exact_one(loss, K, seed):
    """Any outputs: the bound must stay below what the exact norm over the orthant gives."""
    rng = np.random.default_rng(seed)
    n = 5
    bound = LOSSES[loss](targets_for(loss, n, K, rng), rng.uniform(0.2, 3, n))
    X = rng.standard_normal((n, n))
    hidden, output = rng.standard_normal((n, 3)), 0.3 * rng.standard_normal((3, K))
    network = BatchNormNetwork.from_neurons(whiten(X, bound.weights), Neurons(hidden, output))
    proof = proof_of_relu(bound, X, 0.2, network, TOLERANCE)
    dual = bound.negative_gradient(network.predict(X))
    with mp.workdps(50):
        norm = orthant_in_digits(dual / np.sqrt(bound.weights)[:, None])
        exact = best_multiple_in_digits(bound, dual, norm, 0.2)
        assert mp.mpf(proof.lower_bound) <= exact * (1 + 100 * mp.mpf(EPS))  # outputs here and there differ by rounding
        assert K > 1 or exact - mp.mpf(proof.lower_bound) <= 1e-12 * proof.objective  # exact for one output


def optimum_in_digits(name, counts, weight_decay):
    """``p*`` of the closed forms of mathematics 2e at mpmath's precision, for classes of these sizes."""
    beta, K, total = mp.mpf(weight_decay), len(counts), mp.mpf(0)
    shrink = mp.sqrt(mp.mpf(K - 1) / K) if name == "cross_entropy" else mp.mpf(1)
    for n in counts:
        root = mp.sqrt(n)
        tau = beta / root * shrink  # 1 - p of the own class
        dead, nothing = (tau >= mp.mpf(K - 1) / K, mp.log(K)) if name == "cross_entropy" else (tau >= 0.5, mp.log(2))
        odds = (K - 1 if name == "cross_entropy" else 1) * (1 - tau) / tau
        total += n * nothing if dead else -n * mp.log(1 - tau) + beta * root * mp.log(odds) * shrink
    return total


@pytest.mark.parametrize("name", ["logistic", "cross_entropy"])
@pytest.mark.parametrize("weight_decay", [1.0, 1e-2, 1e-4, 1e-6, 1e-8, 1e-9, 1e-10, 1e-12, 1e-14])
def test_certificates_of_tiny_weight_decays_hold(name, weight_decay):
    """Small losses: the objective and the bound must stay on either side of ``p*``."""
    proof, counts = _proof_of_the_formula(name, weight_decay)
    with mp.workdps(50):
        optimum = optimum_in_digits(name, counts, weight_decay)
        assert mp.mpf(proof.lower_bound) <= optimum
        assert mp.mpf(proof.objective) >= optimum * (1 - THRESHOLD * 12 * mp.mpf(EPS))
        assert (mp.mpf(proof.objective) - optimum) / optimum <= 1e-9


@pytest.mark.parametrize("name", ["logistic", "cross_entropy"])
@pytest.mark.parametrize("weight_decay", [1.0, 1e-3, 1e-6, 1e-9, 1e-12])
def test_the_formula_is_proved_for_tiny_weight_decays(name, weight_decay):
    proof, _ = _proof_of_the_formula(name, weight_decay)
    assert proof.status is Status.CERTIFIED, proof.sentence


def _proof_of_the_formula(name, weight_decay):
    counts = (7, 5) if name == "logistic" else (6, 4, 2)
    one_hot = np.eye(len(counts))[labels(counts)]
    targets = one_hot[:, :1] - one_hot[:, 1:] if name == "logistic" else one_hot
    X, loss = np.random.default_rng(0).standard_normal((12, 12)), LOSSES[name](targets, np.ones(12))
    whitening = whiten(X)
    network = BatchNormNetwork.from_neurons(
        whitening, ClosedForm().solve(ReluProgram(whitening.rows, loss, weight_decay)).weights
    )
    return proof_of_relu(loss, X, weight_decay, network, TOLERANCE), counts


# --- the network's own batch norm ---


@pytest.mark.parametrize("loss", ["squared", "logistic", "cross_entropy"])
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_network_has_the_certificate_of_its_blocks(loss, K, weighted):
    weights = np.random.default_rng(1).uniform(0.2, 3, 30) if weighted else None
    K += loss == "cross_entropy" and K == 1
    program, X, _, solution, network = solved(loss, K, weights=weights, tol=1e-7)
    blocks = proof_of_blocks(program, solution.weights, TOLERANCE, solution.stopped_by)
    own = judged(program, X, network)
    assert blocks.status is own.status is Status.CERTIFIED
    for name in ("objective", "lower_bound", "weight_decay_objective"):
        assert residual(getattr(own, name) - getattr(blocks, name), 30, 10 * blocks.objective) < THRESHOLD
    assert own.objective <= own.weight_decay_objective * (1 + 1e-14)
    assert own.sentence == blocks.sentence or own.gap != blocks.gap


def test_units_and_offsets_of_the_raw_data_do_not_matter():
    program, X, _, _, network = solved()
    plain = judged(program, X, network)
    for exponent in (-900, 900):
        scaled = dataclasses.replace(
            network,
            weight=np.ldexp(network.weight, -exponent),
            gates=np.ldexp(network.gates, -exponent),
            mean=np.ldexp(network.mean, exponent),
        )
        assert judged(program, np.ldexp(X, exponent), scaled).objective == plain.objective
    shifted = judged(program, X + 1e6, dataclasses.replace(network, mean=network.mean + 1e6))
    assert residual(shifted.objective - plain.objective, 30, 1e6 * plain.objective) < THRESHOLD


def test_length_of_the_weights_does_not_matter():
    program, X, _, _, network = solved()
    longer = dataclasses.replace(network, weight=network.weight * np.random.default_rng(0).uniform(0.1, 9, 1))
    assert judged(program, X, longer).objective == pytest.approx(judged(program, X, network).objective, rel=1e-13)


def test_unbalanced_neurons_raise_only_the_weight_decay_objective():
    program, X, _, _, network = solved()
    t = np.random.default_rng(0).uniform(0.5, 3, network.n_neurons)
    unbalanced = dataclasses.replace(
        network, gamma=network.gamma * t, shift=network.shift * t, output=network.output / t[:, None]
    )
    plain, other = judged(program, X, network), judged(program, X, unbalanced)
    assert other.objective == pytest.approx(plain.objective, rel=1e-13) and other.status is Status.CERTIFIED
    raw = 0.5 * (np.sum((network.gamma * t) ** 2 + (network.shift * t) ** 2) + np.sum((network.output.T / t) ** 2))
    expected = program.loss.value(network.predict(X)) + program.weight_decay * raw
    assert other.weight_decay_objective == pytest.approx(expected, rel=1e-12)
    assert other.weight_decay_objective > 1.01 * plain.weight_decay_objective


def test_neurons_that_share_a_gate_are_one_block():
    """The penalty of the program is one Frobenius norm a gate, however the block is split."""
    program, X, whitening, solution, network = solved(K=2)
    halves = BatchNormNetwork.from_blocks(
        whitening,
        GateBlocks(np.repeat(solution.weights.gate_index, 2), np.repeat(solution.weights.values / 2, 2, axis=0)),
        *_gates_of(program, network),
    )
    assert halves.n_neurons == 2 * network.n_neurons
    plain, split = judged(program, X, network), judged(program, X, halves)
    assert split.objective == pytest.approx(plain.objective, rel=1e-12)
    assert split.weight_decay_objective == pytest.approx(plain.weight_decay_objective, rel=1e-12)


def _gates_of(program, network):
    """Directions and offsets of all gates, as far as the network knows them."""
    gates, offsets = np.zeros((len(network.weight), program.n_gates)), np.zeros(program.n_gates)
    gates[:, network.gate_index], offsets[network.gate_index] = network.gates, network.gate_offsets
    return gates, offsets


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_rows_on_the_hyperplane_of_a_gate_do_not_refuse_an_honest_network(seed, offset):
    """Symmetric data: the row at the mean lies on every gate without offset, on whichever side rounding puts it."""
    rng = np.random.default_rng(seed)
    half = rng.standard_normal((8, 3))
    X = np.vstack([half, -half, np.zeros((1, 3))]) + offset
    whitening = whiten(X)
    gates, offsets = sample_gates("data", 20, whitening, np.random.RandomState(seed))
    patterns = gate_patterns(X, whitening.mean, gates, offsets)
    program = GatedProgram(
        gated_operator(whitening.rows, patterns), SquaredLoss(rng.standard_normal((17, 1)), np.ones(17)), 0.1
    )
    solution = GroupNewton(tol=1e-8).solve(program)
    network = BatchNormNetwork.from_blocks(whitening, solution.weights, gates, offsets)
    assert judged(program, X, network).status is Status.CERTIFIED


def test_zero_network_is_trivial_only_where_it_is_optimal():
    program, X, whitening, _, _ = solved()
    none = np.zeros((0, *program.block_shape))
    empty = BatchNormNetwork.from_blocks(
        whitening, GateBlocks(np.zeros(0, dtype=np.intp), none), np.zeros((5, 0)), np.zeros(0)
    )
    largest = program.with_weight_decay(program.max_weight_decay())
    proof = judged(largest, X, empty)
    assert proof.status is Status.TRIVIAL and "lower it" in proof.sentence
    assert judged(program, X, empty).status is Status.GAP_OPEN
    nearly = program.with_weight_decay(0.99 * program.max_weight_decay())
    proof = judged(nearly, X, empty, tolerance=0.5)  # close enough for the caller, but not the optimum
    assert proof.status is Status.CERTIFIED and 0 < proof.relative_gap < 0.5


def test_only_the_gradient_at_zero_proves_that_zero_is_optimal():
    """Another dual point may close the gap to a tolerance; the zero network is not the optimum by that."""
    loss = SquaredLoss(np.array([[1.0], [1.5]]), np.ones(2))
    norm = float(np.linalg.norm(loss.targets))
    points = [(loss.targets, 2 * norm, 1e-14, "orthant"), (0.99 * loss.targets, 0.99 * norm, 0.0, "chosen dual point")]

    class Points:
        known, remark = NOTHING_KNOWN, ""

        def bounded(self, dual):
            return [DualBound(*point) for point in points]

        def estimate(self, dual):
            return None

    nothing = Found(np.zeros((2, 1)), 0.0, 0.0)
    proof = judge(loss, nothing, 0.99 * norm, Points(), Scope(ALL), 1e-3, "formula")
    assert 0 < proof.relative_gap <= 1e-3 and proof.bound == "chosen dual point"
    assert proof.status is Status.CERTIFIED, proof.sentence


# --- what a network may not be ---


@pytest.mark.parametrize("angle", [1.0, 0.1, 0.01, 2e-3])
@pytest.mark.parametrize("tolerance", [TOLERANCE, 1e9])
def test_a_direction_outside_the_rank_cut_is_refused(angle, tolerance):
    """Not a network of the truncated program: no tolerance certifies it."""
    program, X, _, _, network = solved(rank=3)
    assert judged(program, X, network).status is Status.CERTIFIED
    proof = judged(program, X, _turned_out(X, network, angle), tolerance)
    assert proof.status is Status.NUMERICAL and "rank cut" in proof.sentence


@pytest.mark.parametrize("angle", [1e-3, 1e-5])
def test_an_accepted_direction_counts_with_its_whole_gamma(angle):
    """What lies outside by rounding may be accepted, but may not make the penalty smaller than the network's."""
    program, X, _, _, network = solved(K=1, rank=3)
    turned = _turned_out(X, network, angle)
    proof = judged(program, X, turned)
    assert len(set(turned.gate_index)) == turned.n_neurons
    penalty = np.hypot(turned.gamma, turned.shift) @ np.abs(turned.output[:, 0])
    value = program.loss.value(_own_outputs(X, turned))
    assert residual(proof.objective - value - program.weight_decay * penalty, 30, proof.objective) < THRESHOLD


def _turned_out(X, network, angle):
    """First-layer directions turned by an angle into a direction that the truncation left out."""
    _, values, right = np.linalg.svd(X - X.mean(axis=0), full_matrices=False)
    outside = right[-1] / values[-1] * np.sqrt(len(X))
    return dataclasses.replace(network, weight=network.weight + np.tan(angle) * outside[:, None])


@pytest.mark.parametrize("angle", [1e-3, 1e-5])
def test_the_penalty_of_leaning_neurons_is_that_of_the_weights_as_stored(angle):
    """Neurons of one gate that lean to both sides of the whitened directions nearly cancel inside them."""
    program, X, _, _, network = solved(K=1, rank=3)
    leaning = [_turned_out(X, network, side * angle) for side in (1, -1)]
    pair = {
        name: np.concatenate([getattr(n, name) for n in leaning], axis=-1)
        for name in ("weight", "gamma", "shift", "gates", "gate_offsets", "gate_index")
    }
    pair = dataclasses.replace(network, **pair, output=np.vstack([50 * network.output, -50 * network.output]))
    proof = judged(program, X, pair)
    z = (X - X.mean(axis=0)) @ pair.weight
    first = np.vstack([pair.gamma * z / np.linalg.norm(z, axis=0), pair.shift])  # in the rows' own coordinates
    blocks = [first[:, pair.gate_index == i] @ pair.output[pair.gate_index == i] for i in set(pair.gate_index)]
    value = program.loss.value(_own_outputs(X, pair))
    penalty = sum(np.linalg.norm(block) for block in blocks)
    assert penalty > 10 * angle * np.abs(network.output).max() * network.gamma.max()
    assert proof.objective == pytest.approx(value + program.weight_decay * penalty, rel=1e-10)


@pytest.mark.parametrize("times", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("activation", ["gated", "relu"])
@pytest.mark.parametrize("wrong", ["n_effective", "mean", "weight"])
def test_wrong_statistics_are_refused_however_unbalanced_the_neurons_are(times, activation, wrong):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((24, 2))
    y = np.maximum(X[:, 0], 0) + 0.1 * rng.standard_normal(24)
    limits = {"max_iter": 50, "proof_time": 0.0} if activation == "relu" else {}
    model = ConvexBNRegressor(activation=activation, n_gates=10, random_state=0, weight_decay=0.3, **limits).fit(X, y)
    net = model.network_
    model.network_ = dataclasses.replace(
        net, gamma=times * net.gamma, shift=times * net.shift, output=net.output / times
    )
    assert model.certify(X, y, time_limit=0).status is not Status.NUMERICAL
    change = {"n_effective": 2 * net.n_effective, "mean": net.mean + 0.3, "weight": 1.5 * net.weight}[wrong]
    model.network_ = dataclasses.replace(model.network_, **{wrong: change})
    assert model.certify(X, y, time_limit=0).status is Status.NUMERICAL


@pytest.mark.parametrize("stretch", [1.0, 1.1, 2.0])
def test_the_departure_from_orthonormal_columns_enters_the_bound(stretch):
    """A dual norm that is larger by a factor is that of a weight decay that is smaller by it."""
    program, X, _, _, network = solved()
    question = Question(X, network.mean, program, TOLERANCE, stretch=stretch)
    proof = certify(question, network)
    dual = program.loss.negative_gradient(_own_outputs(X, network))
    exact = lower_bound(program.loss, dual, stretch * program.dual_norm_bound(dual)[0], program.weight_decay)
    assert proof.lower_bound == pytest.approx(exact, rel=1e-9)
    assert (proof.status is Status.CERTIFIED) == (stretch == 1)


def _own_outputs(X, network):
    """Forward pass with batch statistics, written out."""
    z = (X - X.mean(axis=0)) @ network.weight
    opened = (X - network.mean) @ network.gates + network.gate_offsets >= 0
    return (opened * (network.gamma * z / np.linalg.norm(z, axis=0) + network.shift / np.sqrt(len(X)))) @ network.output


def test_gates_that_do_not_belong_are_refused():
    program, X, _, _, network = solved()
    other = dataclasses.replace(network, gate_index=(network.gate_index + 1) % program.n_gates)
    with pytest.raises(ValueError, match="does not follow the gate"):
        judged(program, X, other)
    with pytest.raises(ValueError, match="does not follow the gate"):
        judged(program, X, dataclasses.replace(network, gate_offsets=network.gate_offsets + 0.3))


# --- statuses and sentences ---


def test_relative_gap_and_gap_are_those_of_the_numbers():
    proof = judge_of([0.5, 1.0], [1.0, 1.5], bound=0.5)
    assert proof.objective == 0.25 + 0.1 and proof.gap == proof.objective - proof.lower_bound > 0
    assert proof.relative_gap == proof.gap / proof.objective
    assert judge_of([0.0], [0.0], penalty=0.0).relative_gap == 0.0


@pytest.mark.parametrize(("tolerance", "status"), [(0.5, Status.CERTIFIED), (0.01, Status.GAP_OPEN)])
def test_status_is_the_gap_against_the_tolerance(tolerance, status):
    proof = judge_of([0.5, 1.0], [1.0, 1.5], bound=0.5, tolerance=tolerance)
    assert 0.01 < proof.relative_gap < 0.5 and proof.status is status and proof.tolerance == tolerance


def test_the_tolerance_itself_is_enough():
    gap = judge_of([0.5, 1.0], [1.0, 1.5], bound=0.5).relative_gap
    assert judge_of([0.5, 1.0], [1.0, 1.5], bound=0.5, tolerance=gap).status is Status.CERTIFIED
    below = np.nextafter(gap, 0)
    assert judge_of([0.5, 1.0], [1.0, 1.5], bound=0.5, tolerance=below).status is Status.GAP_OPEN


@pytest.mark.parametrize("stopped_by", STOPPED_BY)
def test_why_the_solver_stopped_never_upgrades(stopped_by):
    open_gap = judge_of([0.5, 1.0], [1.0, 1.5], bound=0.5, stopped_by=stopped_by)
    refused = {"callback": Status.INTERRUPTED, "numerical": Status.NUMERICAL, "outside": Status.NUMERICAL}
    expected = refused.get(stopped_by, Status.GAP_OPEN)
    assert open_gap.status is expected and open_gap.stopped_by == stopped_by
    assert STOPPED_BY[stopped_by] in open_gap.sentence
    closed = judge_of([0.5, 1.0], [1.0, 1.5], bound=0.5, stopped_by=stopped_by, tolerance=0.5)
    assert closed.status is (Status.NUMERICAL if stopped_by == "outside" else Status.CERTIFIED)


@pytest.mark.parametrize(("scope", "words"), [(GATED, "networks with these gates"), (ALL, "networks of any width")])
@pytest.mark.parametrize("tolerance", [0.5, 0.01])
def test_sentences_name_the_scope_the_numbers_and_the_remedy(scope, words, tolerance):
    proof = judge_of([0.5, 1.0], [1.0, 1.5], bound=0.5, scope=scope, tolerance=tolerance, stopped_by="max_iter")
    assert proof.scope == scope and words in proof.sentence
    assert f"{proof.objective:.9g}" in proof.sentence and f"{proof.relative_gap:.2g}" in proof.sentence
    assert ("raise max_iter" in proof.sentence) == (tolerance == 0.01)


def test_scopes_of_the_doors():
    program, X, _, solution, network = solved()
    assert judged(program, X, network).scope == GATED
    proof = proof_of_blocks(program, solution.weights, 1.0, "tolerance")
    assert proof.scope == GATED
    assert proof_of_relu(program.loss, X, 0.1, network, 1.0).scope == ALL


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 1e200])
def test_values_that_are_not_finite_are_numerical(wrong):
    with np.errstate(all="ignore"):
        for proof in (
            judge_of([wrong, 1.0], [1.0, 1.5]),
            judge_of([0.5, 1.0], [1.0, 1.5], penalty=wrong if wrong != 1e200 else np.inf),
            judge_of([wrong, 1.0], [1.0, 1.5], stopped_by="numerical", tolerance=np.inf),
        ):
            assert proof.status is Status.NUMERICAL and proof.lower_bound == -np.inf
            assert "No valid bound" in proof.sentence


def test_a_bound_above_the_objective_is_numerical():
    """A wrong dual norm would put the bound above what was reached: no claim may follow."""
    proof = judge_of([0.5, 1.0], [1.0, 1.5], bound=1e-3, weight_decay=0.01)
    assert proof.gap < 0 and proof.status is Status.NUMERICAL and "No valid bound" in proof.sentence


@pytest.mark.parametrize("tolerance", [0.0, 1e-20, 1e-17])
def test_a_tolerance_below_the_floor_says_so_and_is_never_claimed(tolerance):
    program, X, _, solution, network = solved(tol=1e-12)
    proofs = [
        judged(program, X, network, tolerance),
        proof_of_blocks(program, solution.weights, tolerance, "stalled"),
        proof_of_relu(*_full_rank_scalar(), tolerance),
    ]
    for proof in proofs:
        assert proof.status is Status.GAP_OPEN and 0 < proof.relative_gap < 1e-10
        assert f"tol={tolerance:.1g} is below what float64 can prove" in proof.sentence


def _full_rank_scalar():
    rng = np.random.default_rng(0)
    X, loss = rng.standard_normal((9, 10)), SquaredLoss(rng.standard_normal((9, 1)), np.ones(9))
    whitening = whiten(X)
    return (
        loss,
        X,
        0.3,
        BatchNormNetwork.from_neurons(whitening, ClosedForm().solve(ReluProgram(whitening.rows, loss, 0.3)).weights),
    )


def test_no_tolerance_below_the_floor_is_certified_on_ill_conditioned_data():
    """The objective's own rounding may push it below the bound by chance; that proves nothing finer than rounding."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        X = conditioned(12, 11, 10.0 ** rng.uniform(1, 9), rng)
        name = ("squared", "logistic", "cross_entropy")[seed % 3]
        loss = LOSSES[name](targets_for(name, 12, 3 if name == "cross_entropy" else 1, rng), np.ones(12))
        whitening = whiten(X)
        network = BatchNormNetwork.from_neurons(
            whitening, ClosedForm().solve(ReluProgram(whitening.rows, loss, 0.2)).weights
        )
        proof = proof_of_relu(loss, X, 0.2, network, 1e-18)
        assert proof.status is Status.GAP_OPEN and proof.relative_gap > 0


# --- the line search ---


@pytest.mark.parametrize("seed", range(5))
def test_line_search_takes_the_best_feasible_multiple(seed):
    """Squared loss: ``t = <V, Y> / ||V||^2`` cut at ``weight_decay / norm``."""
    rng = np.random.default_rng(seed)
    loss = SquaredLoss(rng.standard_normal((9, 2)), np.ones(9))
    dual = rng.uniform(0.7, 2) * loss.targets + 0.1 * rng.standard_normal((9, 2))
    for norm in (0.05, 0.2, 1.0, 10.0):
        best = np.clip(np.vdot(dual, loss.targets) / np.sum(dual**2), 0, 0.3 / norm)
        exact = best * np.vdot(dual, loss.targets) - 0.5 * best**2 * np.sum(dual**2)
        found = certificate.lower_bound(loss, dual, norm, 0.3)
        assert found <= exact and residual(found - exact, 9, np.abs(dual * loss.targets).sum()) < 4 * THRESHOLD


@pytest.mark.parametrize("loss", [LogisticLoss, CrossEntropyLoss])
def test_line_search_stays_in_the_domain(loss):
    targets = np.eye(2)[[0, 1, 0]] if loss is CrossEntropyLoss else np.ones((3, 2))
    bound = loss(targets, np.ones(3))
    dual = bound.negative_gradient(np.zeros((3, 2)))  # twice this dual point is at the edge of the domain
    assert np.isfinite(certificate.lower_bound(bound, 1.9 * dual, 1e-9, 1.0))
    assert certificate.lower_bound(bound, 100 * dual, 1e-9, 1.0) >= bound.dual_value(0 * dual)
    assert certificate.lower_bound(bound, 0 * dual, 0.0, 1.0) == bound.dual_value(0 * dual)


def test_objective_of_zero_is_certified_with_gap_zero():
    program, _, _, _, _ = solved(K=1)
    loss = SquaredLoss(np.zeros((30, 1)), np.ones(30))
    zero = dataclasses.replace(program, loss=loss)
    none = np.zeros((0, *program.block_shape))
    proof = proof_of_blocks(zero, GateBlocks(np.zeros(0, dtype=np.intp), none), 0.0, "tolerance")
    assert proof.objective == proof.lower_bound == proof.relative_gap == 0 and proof.status is Status.TRIVIAL


def test_certificate_of_relu_is_recomputed_from_its_weights():
    """Loss plus ``weight_decay * sum ||s_j|| ||c_j||`` through the network's own batch norm, written out."""
    loss, X, weight_decay, network = _full_rank_scalar()
    proof = proof_of_relu(loss, X, weight_decay, network, 1e-10)
    z = X @ network.weight
    z = (z - z.mean(axis=0)) / np.linalg.norm(z - z.mean(axis=0), axis=0)
    outputs = np.maximum(network.gamma * z + network.shift / 3, 0) @ network.output
    penalty = np.hypot(network.gamma, network.shift) @ np.linalg.norm(network.output, axis=1)
    expected = 0.5 * np.sum((outputs - loss.targets) ** 2) + weight_decay * penalty
    assert proof.status is Status.CERTIFIED and proof.objective == pytest.approx(expected, rel=1e-13)
    assert proof.weight_decay_objective == pytest.approx(expected, rel=1e-13)  # balanced


def test_certificate_of_blocks_is_the_value_of_the_program():
    program, _, _, solution, _ = solved()
    proof = proof_of_blocks(program, solution.weights, 1.0, "tolerance")
    outputs = np.einsum(
        "nj,nq,jqk->nk",
        program.operator.patterns[:, solution.weights.gate_index] * 1.0,
        program.operator.rows,
        solution.weights.values,
    )
    value = 0.5 * np.sum((outputs - program.loss.targets) ** 2)
    expected = value + program.weight_decay * np.linalg.norm(solution.weights.values, axis=(1, 2)).sum()
    assert proof.objective == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("kind", list(LOSSES))
@pytest.mark.parametrize("size", [1e-9, 1e-2, 1.0])
def test_a_loss_moves_at_most_by_its_bound(kind, size):
    rng = np.random.default_rng(0)
    for _ in range(20):
        outputs, weights = 3 * rng.standard_normal((8, 3)), rng.uniform(0.1, 4, 8)
        loss = LOSSES[kind](targets_for(kind, 8, 3, rng), weights)
        step = size * rng.standard_normal((8, 3))
        moved = abs(loss.value(outputs + step) - loss.value(outputs))
        distance = np.linalg.norm(np.sqrt(weights)[:, None] * step)
        assert moved <= certificate._loss_moves_at_most(loss, Found(outputs, 0.0, 0.0), distance) + 1e-13 * loss.value(
            outputs
        )
