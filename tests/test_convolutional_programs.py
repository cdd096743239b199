"""Programs of convolutional networks: brute force over all patterns, training and dual bound agree (mathematics, 3)."""

import functools

import numpy as np
import pytest

from convexbn import bounds
from convexbn.bounds.local_search import hidden_norms, hidden_units, linear_parts
from convexbn.certificate import dual_bounds
from convexbn.certificate.certificate import certify
from convexbn.certificate.dual_bounds import ReluDualBounds
from convexbn.certificate.question import Question
from convexbn.data.convolution import Convolution
from convexbn.data.patches import PatchMatrix
from convexbn.data.whitening import whiten
from convexbn.program.arrangement import count_bound, enumerate_max_regions, enumerate_patterns
from convexbn.program.gated import GatedProgram, gated_operator
from convexbn.program.gates import gate_patterns, sample_gates
from convexbn.program.losses import CrossEntropyLoss, SquaredLoss
from convexbn.program.network import BatchNormNetwork
from convexbn.program.readout import readout_of
from convexbn.program.relu import ReluProgram
from convexbn.solvers.gated.conic import Conic
from convexbn.solvers.gated.group_newton import GroupNewton
from convexbn.solvers.gated.proximal import Proximal
from convexbn.solvers.gated.subspace import Subspace
from convexbn.solvers.relu.column_generation import ColumnGeneration
from convexbn_studies.peers.conic_relu import ConicRelu
from instances import proof_of_blocks


class Instance:
    """Small images, their patches, loss and whitened rows; the weight decay is a fraction of the largest."""

    def __init__(self, layer, n=5, K=1, fraction=0.1, loss=SquaredLoss, seed=0):
        rng = np.random.default_rng(seed)
        self.layer, self.rng = layer, rng
        self.X = PatchMatrix(rng.standard_normal((n, layer.geometry.n_features)), layer.geometry)
        targets = np.eye(K)[rng.integers(K, size=n)] if loss is CrossEntropyLoss else rng.standard_normal((n, K))
        self.loss, self.readout = loss(targets, rng.uniform(1, 2, n)), readout_of(layer)
        self.row_weights = self.readout.row_weights(self.loss.weights)
        self.whitening = whiten(self.X, self.row_weights)
        self.rows, self.fraction = self.whitening.rows, fraction

    @functools.cached_property
    def beta(self):
        zero = self.loss.negative_gradient(np.zeros_like(self.loss.targets))
        free = ReluProgram(self.rows, self.loss, 0.0, self.readout)
        prover = ReluDualBounds(free, np.zeros((0, self.rows.shape[1])))
        return self.fraction * prover.dual_norm(zero, proved=False)[0]

    @functools.cached_property
    def program(self):
        return ReluProgram(self.rows, self.loss, self.beta, self.readout)

    def outputs(self, neurons):
        """Outputs of the images, hidden units and pooling in one piece."""
        return self.readout.outputs(np.maximum(self.rows @ neurons.first, 0), neurons.output)

    def objective(self, neurons):
        return self.loss.value(self.outputs(neurons)) + self.beta * neurons.norms.sum()

    def proof(self, neurons, tol=1e-5):
        network = BatchNormNetwork.from_neurons(self.whitening, neurons, self.layer)
        return certify(Question(self.X, self.whitening.mean, self.program, tol), network)


def tiny(h, K=1, *, n=5, locations=3, seed=0, **pooling):
    """The shapes of the mathematics: five signals of three patches."""
    return Instance(Convolution(h, input_shape=(locations + h - 1, 1), **pooling), n=n, K=K, seed=seed)


AGREEING = {
    "average h=1": lambda: tiny(1),
    "average h=1, 2 outputs": lambda: tiny(1, 2),
    "average h=2": lambda: tiny(2, n=4),
    "flattened h=1": lambda: tiny(1, regions="all"),
    "regions h=1": lambda: tiny(1, n=4, locations=4, regions=2),
    "max h=1": lambda: tiny(1, pooling="max"),
    "max h=2": lambda: tiny(2, pooling="max", n=4, seed=3),
    "average 2-D, padded": lambda: Instance(Convolution((1, 2), padding=(0, 1), input_shape=(2, 2, 1)), n=3),
    "max 2-D, padded": lambda: Instance(
        Convolution((2, 1), padding=(1, 0), stride=(2, 1), pooling="max", input_shape=(2, 3, 1)), n=3
    ),
}


@pytest.mark.parametrize("name", AGREEING)
def test_brute_force_training_and_dual_bound_agree(name):
    pytest.importorskip("cvxpy")
    case = AGREEING[name]()
    best = ConicRelu().solve(case.program)
    assert case.objective(best.weights) == pytest.approx(best.value, rel=1e-6)
    proof = case.proof(best.weights)
    assert proof.objective == pytest.approx(best.value, rel=1e-6)
    assert best.value * (1 - 2e-5) <= proof.lower_bound <= best.value * (1 + 1e-7)
    linear = case.readout.linear
    solver = ColumnGeneration(width=30, max_iter=None if linear else 6)
    trained = case.objective(solver.solve(case.program, rng=case.rng).weights)
    assert best.value * (1 - 1e-7) <= trained <= best.value * (1 + (1e-6 if linear else 1e-3))


SEVERAL = {
    "average, 2 outputs, h=2": lambda: tiny(2, K=2),
    "flattened, h=2": lambda: tiny(2, regions="all"),
    "cross-entropy, 3 classes": lambda: Instance(
        Convolution(2, input_shape=(4, 1)), n=9, K=3, loss=CrossEntropyLoss, fraction=0.3
    ),
    "2-D, padded, regions, 2 outputs": lambda: Instance(
        Convolution((1, 2), padding=(0, 1), regions=(1, 2), input_shape=(2, 3, 1)), n=4, K=2, fraction=0.3
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_pricing_is_proved_where_there_is_no_brute_force(name):
    case = SEVERAL[name]()
    proof = case.proof(ColumnGeneration(width=30).solve(case.program, rng=case.rng).weights, 1e-3)
    assert proof.status == "CERTIFIED" and "this convolution and pooling" in proof.sentence


@pytest.mark.parametrize("kind", ["average", "max"])
def test_max_pooling_with_regions_has_a_valid_bound(kind):
    """The dual point is feasible to the bound: no direction of a dense sample has a larger image."""
    case = Instance(Convolution(2, pooling=kind, regions=2, input_shape=(6, 1)), n=6, K=2, fraction=0.3)
    neurons = ColumnGeneration(width=20, max_iter=2).solve(case.program, rng=case.rng).weights
    root = np.sqrt(case.loss.weights)[:, None]
    dual = case.loss.negative_gradient(case.outputs(neurons))
    A = case.readout.arranged(np.sqrt(case.row_weights)[:, None] * case.rows)
    V = case.readout.spread(dual / root)
    sample = case.rng.standard_normal((4000, A.shape[-1]))
    sample /= np.linalg.norm(sample, axis=1)[:, None]
    largest = hidden_norms(sample, V, A).max()
    prover = ReluDualBounds(case.program, neurons.first.T, tol=1e-2)
    found = list(prover.bounded(dual))
    assert {point.name for point in found} >= {"orthant", "branch and bound"}
    assert all(point.bound >= largest for point in found)
    assert found[1].bound <= 1.05 * max(largest, case.beta)


def test_hundreds_of_patches_are_certified_over_all_patterns():
    """One channel, three taps: rank 3, so that branch and bound looks everywhere."""
    layer = Convolution(3, input_shape=(22, 1))
    case = Instance(layer, n=18, fraction=0.5)
    assert len(case.X) == 360 and case.rows.shape[1] == 4
    solution = ColumnGeneration(width=20, max_iter=3).solve(case.program, rng=case.rng)
    proof = case.proof(solution.weights, 1e-4)
    assert proof.status == "CERTIFIED" and proof.scope == "all patterns" and proof.bound == "branch and bound"


@pytest.mark.parametrize("shape", [(4, 3, 2), (3, 2, 3)])
def test_regions_of_max_pooling_are_all_there_and_linear(shape):
    rng = np.random.default_rng(0)
    groups = rng.standard_normal(shape)
    regions = enumerate_max_regions(groups)
    sample = rng.standard_normal((5000, shape[2]))
    response = sample @ groups.reshape(-1, shape[2]).T
    response = response.reshape(-1, *shape[:2])
    members = np.where(response.max(axis=2) > 0, response.argmax(axis=2), -1)
    known = {tuple(row) for row in regions.members}
    assert {tuple(row) for row in members} <= known and len(known) == len(regions.members)
    n, G, q = shape
    assert len(known) <= count_bound(n * (G * (G - 1) // 2 + G), q)
    region, walls = regions.walls(groups)
    inside = np.einsum("mq,mq->m", walls, regions.directions[region])
    assert (inside > 0).all()
    of_one = enumerate_max_regions(groups[:, :1]).members
    assert len(of_one) == len(enumerate_patterns(groups[:, 0]).patterns)


@pytest.mark.parametrize("q", [2, 3])
@pytest.mark.parametrize("K", [1, 2])
def test_branch_and_bound_encloses_the_maximum_over_groups(q, K):
    rng = np.random.default_rng(q + K)
    rows = np.linalg.qr(rng.standard_normal((24, q)))[0]
    groups, V = rows.reshape(8, 3, q), rng.standard_normal((8, K))
    found = bounds.branch_and_bound(V, groups, tol=1e-3)
    sample = rng.standard_normal((20_000, q))
    sample /= np.linalg.norm(sample, axis=1)[:, None]
    largest = hidden_norms(sample, V, groups).max()
    assert largest <= found.value <= 1.02 * largest
    assert hidden_norms(found.maximiser[None], V, groups)[0] == pytest.approx(found.lower, rel=1e-12)


def test_hidden_units_of_groups_are_their_largest_and_their_gradient_the_chosen_row():
    rng = np.random.default_rng(0)
    groups, directions = rng.standard_normal((5, 3, 4)), rng.standard_normal((7, 4))
    weights = rng.standard_normal((7, 5))
    hidden = hidden_units(directions, groups)
    np.testing.assert_allclose(hidden, np.maximum((groups @ directions.T).max(axis=1), 0).T)
    parts = linear_parts(directions, weights, groups)
    np.testing.assert_allclose(np.sum(parts * directions, axis=1), np.sum(weights * hidden, axis=1))
    alone = groups[:, :1]
    np.testing.assert_allclose(
        linear_parts(directions, weights, alone), linear_parts(directions, weights, alone[:, 0]), rtol=1e-12
    )


def gated(regions, K=2, n=6, n_gates=5):
    case = Instance(Convolution((2, 1), padding=(1, 0), regions=regions, input_shape=(3, 2, 1)), n=n, K=K)
    gates, offsets = sample_gates("whitened", n_gates, case.whitening, np.random.RandomState(0))
    patterns = gate_patterns(case.X, case.whitening.mean, gates, offsets)
    program = GatedProgram(gated_operator(case.rows, patterns, case.readout), case.loss, 1.0)
    return case, program.with_weight_decay(0.1 * program.max_weight_decay())


@pytest.mark.parametrize("regions", [1, (4, 1), "all"])
def test_the_pooled_program_is_the_gated_program_of_the_patches(regions):
    """Its kernels are those of dense data on the patch rows, pooled; and adjoint to each other."""
    case, program = gated(regions)
    rows, patterns = program.operator.rows, program.operator.patterns
    dense = GatedProgram(gated_operator(rows, patterns), case.readout.composed(case.loss), program.weight_decay)
    index = np.array([3, 0, 2])
    blocks = case.rng.standard_normal((3, *program.block_shape))
    assert program.block_shape == dense.block_shape
    expected = case.readout.gather(dense.outputs(index, blocks))
    np.testing.assert_allclose(program.outputs(index, blocks), expected, rtol=1e-12, atol=1e-13)
    dual = case.rng.standard_normal(program.loss.targets.shape)
    spread = dense.correlations(case.readout.spread(dual), index)
    np.testing.assert_allclose(program.correlations(dual, index), spread, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(program.correlations(dual)[index], spread, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("regions", [1, (4, 1), "all"])
@pytest.mark.parametrize("K", [1, 2])
def test_gated_programs_equal_brute_force(regions, K):
    """One region has a Frobenius norm a gate, several have the nuclear norm of filters times regions and outputs."""
    cvxpy = pytest.importorskip("cvxpy")
    _, program = gated(regions, K)
    (q, width), P = program.block_shape, program.n_gates
    blocks = [cvxpy.Variable((q, width)) for _ in range(P)]
    R = program.operator.readout.n_regions
    fitted = sum(
        program.operator.gate(i).reshape(-1, q, R)[:, :, r] @ blocks[i][:, r * K : (r + 1) * K]
        for i in range(P)
        for r in range(R)
    )
    residual = cvxpy.multiply(np.sqrt(program.loss.weights)[:, None], fitted - program.loss.targets)
    penalty = sum(cvxpy.normNuc(S) if R > 1 else cvxpy.norm(S, "fro") for S in blocks)
    problem = cvxpy.Problem(cvxpy.Minimize(0.5 * cvxpy.sum_squares(residual) + program.weight_decay * penalty))
    problem.solve("CLARABEL")
    solution = Proximal(tol=1e-9, max_iter=20_000).solve(program)
    proof = proof_of_blocks(program, solution.weights, 1e-6, "tolerance")
    assert proof.status == "CERTIFIED" and proof.objective == pytest.approx(problem.value, rel=1e-6)
    if R == 1:
        found = Conic().solve(program)
        conic = proof_of_blocks(program, found.weights, 1e-6, "tolerance")
        assert conic.objective == pytest.approx(problem.value, rel=1e-6)


def test_the_zero_network_is_optimal_exactly_from_the_largest_weight_decay_on():
    _, program = gated((4, 1))
    largest = program.max_weight_decay()
    assert len(Proximal().solve(program.with_weight_decay(largest)).weights.values) == 0
    assert len(Proximal(max_iter=50).solve(program.with_weight_decay(0.99 * largest)).weights.values) > 0


def test_the_proximal_map_of_the_nuclear_norm_is_its_minimiser():
    case, program = gated((4, 1))
    blocks = case.rng.standard_normal((4, *program.block_shape))
    shrunk = program.norm.prox(blocks, 0.5)

    def value(candidate):
        return 0.5 * np.sum((candidate - blocks) ** 2) + 0.5 * program.norm.of(candidate).sum()

    for _ in range(20):
        assert value(shrunk) < value(shrunk + 1e-3 * case.rng.standard_normal(blocks.shape))
    inner = program.norm.dual(blocks - shrunk)
    np.testing.assert_allclose(inner[program.norm.of(shrunk) > 0], 0.5)


def test_what_a_solver_or_program_does_not_take_is_refused():
    pytest.importorskip("clarabel")
    _, program = gated((4, 1))
    with pytest.raises(TypeError, match="one Frobenius norm a gate"):
        Conic().solve(program)
    for solver in (GroupNewton(), Subspace()):
        with pytest.raises(TypeError, match="is for dense data: use 'proximal'"):
            solver.solve(program)
    largest = Instance(Convolution(2, pooling="max", input_shape=(4, 1)))
    patterns = np.ones((len(largest.rows), 1), dtype=bool)
    with pytest.raises(ValueError, match="max pooling is not"):
        GatedProgram(gated_operator(largest.rows, patterns, largest.readout), largest.loss, 1.0)
    with pytest.raises(TypeError, match="max pooling is not linear"):
        largest.readout.gather(np.zeros((len(largest.rows), 1)))
    with pytest.raises(TypeError, match="max pooling is not linear"):
        largest.readout.composed(largest.loss)


def test_of_many_patches_some_images_tell_the_largest_weight_decay(monkeypatch):
    case = Instance(Convolution(2, input_shape=(6, 1)), n=400, K=2)
    zero = case.loss.negative_gradient(np.zeros_like(case.loss.targets)) + 1.0
    prover = ReluDualBounds(ReluProgram(case.rows, case.loss, 0.0, case.readout), np.zeros((0, 3)))
    value, _ = prover.dual_norm(zero, proved=False)
    monkeypatch.setattr(dual_bounds, "_SPREAD_ENTRIES", 100)
    monkeypatch.setattr(dual_bounds, "_MANY_ENTRIES", 3000)
    some, upper = prover.dual_norm(zero)
    assert 0.5 * value <= some <= 2 * value and value <= upper
    assert [point.name for point in prover.bounded(zero)] == ["orthant"] and prover.estimate(zero) is None
