"""The seam where other back ends enter: kernels of one block in torch as in numpy, and rows that are somewhere else."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from convexbn.data.blocks import BlockSize
from convexbn.data.kernels import positive_part, projected, weighted_gram
from convexbn.data.moments import moments
from convexbn.data.pooling import Regions
from convexbn.data.preactivations import PreActivations
from convexbn.data.row_matrix import DenseRows, HostRows, ProjectedRows, row_matrix
from convexbn.data.whitening import whiten
from convexbn.program import kernels
from convexbn.program.gated import GatedProgram, gated_operator
from convexbn.program.gates import gate_patterns
from convexbn.program.losses import LOSSES, Loss
from convexbn.program.neurons import Neurons
from convexbn.program.readout import AveragePooling, MaxPooling, Readout
from convexbn.program.relu import ReluProgram
from convexbn.solvers.relu.lbfgs import lbfgs
from instances import LOSS_NAMES, targets_for

RNG = np.random.default_rng(0)
READOUTS = {
    "rows": Readout(),
    "averages": AveragePooling(Regions((2, 3), (1, 3))),
    "overlapping averages": AveragePooling(Regions((1, 6), (1, 4))),
    "maxima": MaxPooling(Regions((2, 3), (2, 1))),
    "overlapping maxima": MaxPooling(Regions((1, 6), (1, 4))),
}


def tensor(value):
    """An argument of a kernel as torch has it."""
    if isinstance(value, Loss):
        return replace(value, targets=torch.as_tensor(value.targets), weights=torch.as_tensor(value.weights))
    return torch.as_tensor(value) if isinstance(value, np.ndarray) else value


def normal(*shape):
    return RNG.standard_normal(shape)


def loss_of(name, n, K=3):
    K = 1 if name == "logistic" else K
    return LOSSES[name](targets_for(name, n, K, RNG), RNG.uniform(0.5, 2, n))


def cases():
    """Kernel and its arguments."""
    block, patterns, index = normal(24, 5), normal(24, 7) > 0, np.array([6, 0, 2])
    gates, mean = normal(5, 7), normal(5)
    block[3] = mean  # on every hyperplane without an offset
    lengths = np.linalg.norm(gates, axis=0)
    yield "gram", weighted_gram, (block, RNG.uniform(1, 2, 24), mean)
    yield "gram of bytes", weighted_gram, (RNG.integers(0, 256, (24, 5)).astype(np.uint8), np.ones(24), mean)
    yield "projection", projected, (block, mean, normal(5, 2), np.ldexp(1.0, np.arange(5)))
    yield "gates", kernels.open_gates, (block, mean, gates, np.array([0.0] * 3 + [0.3] * 4), lengths)
    yield "gated outputs", kernels.masked_outputs, (block, patterns, normal(3, 2, 5), index)
    yield "outputs of all gates", kernels.masked_outputs, (block, patterns, normal(7, 2, 5))
    yield "correlations", kernels.masked_correlations, (block, patterns, normal(24, 2), index)
    for name, readout in READOUTS.items():
        first, output, bias = normal(5, 4), normal(4, readout.n_regions * 3), normal(3)
        hidden, regional, dual = positive_part(block @ first), readout.by_region(output), normal(len(block), 3)
        dual = dual[: len(block) // readout.rows_per_case]
        yield f"relu, {name}", kernels.relu_outputs, (block, first, output, readout)
        yield f"ascent, {name}", kernels.relu_ascent, (block, hidden, readout.pool(hidden), dual, regional, readout)
        loss = loss_of("squared", 24 // readout.rows_per_case)
        yield f"loss and ascent, {name}", kernels.loss_and_ascent, (block, loss, first, output, bias, readout)


CASES = {name: (kernel, arguments) for name, kernel, arguments in cases()}


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_is_the_same_in_torch(name):
    kernel, arguments = CASES[name]
    expected, found = kernel(*arguments), kernel(*map(tensor, arguments))
    pairs = zip(expected, found, strict=True) if isinstance(expected, tuple) else [(expected, found)]
    for ours, theirs in pairs:
        assert isinstance(theirs, (torch.Tensor, float))
        np.testing.assert_allclose(np.asarray(theirs), ours, rtol=1e-12, atol=1e-12 * np.abs(ours).max())


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", LOSS_NAMES)
def test_a_loss_is_the_same_in_torch(name, soft):
    K = 1 if name == "logistic" else 3
    loss, outputs = LOSSES[name](targets_for(name, 30, K, RNG, soft), RNG.uniform(0.5, 2, 30)), 3 * normal(30, K)
    theirs = tensor(loss)
    assert theirs.value(torch.as_tensor(outputs)) == pytest.approx(loss.value(outputs), rel=1e-13)
    dual = loss.negative_gradient(outputs)
    np.testing.assert_allclose(theirs.negative_gradient(torch.as_tensor(outputs)), dual, rtol=1e-12, atol=1e-15)
    assert theirs.dual_value(torch.as_tensor(dual)) == pytest.approx(loss.dual_value(dual), rel=1e-12)
    assert theirs.dual_value(torch.as_tensor(100 * dual)) == pytest.approx(loss.dual_value(100 * dual), rel=1e-12)


def test_positive_parts_keep_what_is_not_a_number():
    for array in (np.array([-1.0, 2, np.nan]), torch.tensor([-1.0, 2, float("nan")])):
        assert np.array_equal(np.asarray(positive_part(array)), [0, 2, np.nan], equal_nan=True)


class Elsewhere:
    """Rows in pieces of another array library, which the host never sees; small arrays go there, and come back."""

    def __init__(self, array, count=3):
        self.pieces = [torch.as_tensor(piece) for piece in np.array_split(array, count)]
        self.shape, self.dtype, self.size = array.shape, array.dtype, array.size
        self.sent = 0

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, part):
        raise AssertionError("the rows were read")

    def min(self, axis=None, initial=np.inf):
        return min(float(piece.min()) for piece in self.pieces)

    def max(self, axis=None, initial=-np.inf):
        return max(float(piece.max()) for piece in self.pieces)

    def results(self, kernel, size, along, shared):
        self.sent += sum(array.size for array in shared if isinstance(array, np.ndarray))
        shared, done = [tensor(array) for array in shared], 0
        for piece in self.pieces:
            part = size.cases(slice(done, done + len(piece)))
            done += len(piece)
            found = kernel(piece, *(tensor(array[part]) for array in along), *shared)
            yield tuple(np.asarray(a) for a in found) if isinstance(found, tuple) else np.asarray(found)

    def map(self, kernel, size, *, along=(), shared=(), out=None, parallel=False):
        found = np.concatenate(list(self.results(kernel, size, along, shared)))
        if out is not None:
            out[:] = found
        return found

    def reduce(self, kernel, size, *, along=(), shared=()):
        return tuple(sum(terms) for terms in zip(*self.results(kernel, size, along, shared), strict=True))


def test_gates_and_gated_programs_on_rows_elsewhere():
    X, gates, offsets = normal(50, 4), normal(4, 9), normal(9)
    patterns = gate_patterns(X, X.mean(axis=0), gates, offsets)
    assert np.array_equal(gate_patterns(Elsewhere(X), X.mean(axis=0), gates, offsets), patterns)
    loss, rows = loss_of("squared", 50), whiten(X).rows
    here, there = (GatedProgram(gated_operator(a, patterns), loss, 0.1) for a in (rows, Elsewhere(rows)))
    index, blocks = np.array([8, 1]), normal(2, 5, 3)
    np.testing.assert_allclose(there.outputs(index, blocks), here.outputs(index, blocks), rtol=1e-12)
    dual = loss.negative_gradient(here.outputs(index, blocks))
    np.testing.assert_allclose(there.correlations(dual), here.correlations(dual), rtol=1e-10, atol=1e-12)
    assert there.max_weight_decay() == pytest.approx(here.max_weight_decay(), rel=1e-12)


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_relu_networks_are_trained_on_rows_elsewhere(name):
    loss, rows = loss_of(name, 60), whiten(normal(60, 3)).rows
    here, there = (ReluProgram(a, loss, 0.3) for a in (rows, Elsewhere(rows)))
    start = Neurons(normal(4, 6), normal(6, loss.targets.shape[1])).balanced()
    assert there.objective(start) == pytest.approx(here.objective(start), rel=1e-13)
    one, other = (lbfgs(program, start, max_iter=5) for program in (here, there))
    np.testing.assert_allclose(other.first, one.first, rtol=1e-6, atol=1e-9)
    assert there.rows.sent < 40 * rows.size  # layers, never the rows


@pytest.mark.parametrize("rows", [DenseRows(normal(37, 3)), None])
def test_map_and_reduce_do_not_depend_on_the_blocks(rows):
    if rows is None:
        rows = ProjectedRows(DenseRows(normal(37, 5)), normal(5), normal(5, 2), 0.3)
    weights, mean = RNG.uniform(1, 2, 37), normal(3)
    whole = rows.reduce(weighted_gram, BlockSize(1, 1000), along=[weights], shared=[mean])
    parts = rows.reduce(weighted_gram, BlockSize(1, 5), along=[weights], shared=[mean])
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-12)
    out = np.empty((37, 2))
    for parallel in (False, True):
        found = rows.map(projected, BlockSize(1, 5), shared=[mean, normal(3, 2)], out=out, parallel=parallel)
        assert found is out
    assert isinstance(row_matrix(np.eye(2)), HostRows) and row_matrix(rows) is rows


def test_moments_by_reduction_are_those_of_the_host():
    X, weights = normal(80, 4) + 3, RNG.uniform(1, 2, 80)
    found = moments(X, weights)
    gram, sums = DenseRows(X).reduce(weighted_gram, BlockSize(4, 64), along=[weights], shared=[X.mean(axis=0)])
    centred = gram - np.outer(sums, sums) / weights.sum()
    scale = np.ldexp(1.0, found.exponents)
    np.testing.assert_allclose(scale * found.gram * scale[:, None], centred, rtol=1e-10, atol=1e-10)
    responses = PreActivations.compute(X, np.eye(4), weights)
    np.testing.assert_allclose(responses.norms, np.sqrt(centred.diagonal()), rtol=1e-12)
