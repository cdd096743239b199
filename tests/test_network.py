"""Networks as ordinary weights: balanced, normalised, row by row, and the blocks they came from."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convexbn.data.preactivations import PreActivations
from convexbn.data.whitening import whiten
from convexbn.program import network as module
from convexbn.program.gated import GateBlocks, GatedProgram, block_norms, gated_operator
from convexbn.program.gates import gate_patterns, sample_gates
from convexbn.program.losses import SquaredLoss
from convexbn.program.network import BatchNormNetwork
from convexbn.program.neurons import Neurons
from instances import THRESHOLD, neuron_arrays, residual


def draw(n=60, d=5, K=2, P=9, seed=0, weighted=False, rank=None, scale=1.0):
    """Raw rows, their whitening, gates and random blocks."""
    rng = np.random.default_rng(seed)
    X = (rng.standard_normal((n, d)) + 1) * scale
    weights = rng.uniform(0.2, 3, n) if weighted else np.ones(n)
    whitening = whiten(X, weights, rank=rank)
    gates, offsets = sample_gates("whitened", P, whitening, np.random.RandomState(seed))
    blocks = rng.standard_normal((P, whitening.rank + 1, K))
    program = GatedProgram(
        gated_operator(whitening.rows, gate_patterns(X, whitening.mean, gates, offsets)),
        SquaredLoss(np.zeros((n, K)), weights),
        1.0,
    )
    return X, whitening, gates, offsets, blocks, program


def gated(case, index=None, blocks=None):
    _, whitening, gates, offsets, all_blocks, _ = case
    index = np.arange(len(all_blocks)) if index is None else index
    return BatchNormNetwork.from_blocks(
        whitening, GateBlocks(index, all_blocks[index] if blocks is None else blocks), gates, offsets
    )


def relu(case, m=7):
    rng = np.random.default_rng(5)
    whitening = case[1]
    first, output = rng.standard_normal((whitening.rank + 1, m)), rng.standard_normal((m, case[4].shape[2]))
    return BatchNormNetwork.from_neurons(whitening, Neurons(first, output)), first, output


# --- weights ---


@pytest.mark.parametrize("kind", ["gated", "relu"])
def test_arrays_are_contiguous_copies(kind):
    case = draw()
    network = gated(case) if kind == "gated" else relu(case)[0]
    strided = {field.name: getattr(network, field.name) for field in dataclasses.fields(network)}
    strided = {k: v[..., ::-1][..., ::-1] if isinstance(v, np.ndarray) else v for k, v in strided.items()}
    for copied in (network, BatchNormNetwork(**strided)):
        arrays = [value for value in vars(copied).values() if isinstance(value, np.ndarray)]
        assert len(arrays) == (9 if kind == "gated" else 6)
        assert all(array.flags.c_contiguous and array.flags.owndata for array in arrays)
    assert not np.shares_memory(network.mean, case[1].mean)


@pytest.mark.parametrize("kind", ["gated", "relu"])
@pytest.mark.parametrize("weighted", [False, True])
def test_norms_are_balanced_and_responses_have_unit_variance(kind, weighted):
    case = draw(weighted=weighted)
    network = gated(case) if kind == "gated" else relu(case)[0]
    inner = np.hypot(network.gamma, network.shift)
    outer = np.linalg.norm(network.output, axis=1)
    assert residual(inner / outer - 1, 10) < THRESHOLD and np.all(network.gamma >= 0)
    X, weights = case[0], case[5].loss.weights
    response = X @ network.weight
    response = response - weights @ response / weights.sum()
    variance = weights @ response**2 / weights.sum()
    assert residual(variance - 1, 60, 10) < THRESHOLD
    assert network.n_effective == weights.sum() and np.array_equal(network.mean, case[1].mean)


def test_relu_network_has_the_function_of_its_neurons():
    """``sum_j (A s_j)_+ c_j``, and the balanced weight decay ``sum_j ||s_j|| ||c_j||``."""
    case = draw()
    network, first, output = relu(case)
    expected = np.maximum(case[1].rows @ first, 0) @ output
    assert residual(network.predict(case[0]) - expected, 60, 10) < THRESHOLD
    plain = 0.5 * (np.sum(network.gamma**2) + np.sum(network.shift**2) + np.sum(network.output**2))
    assert plain == pytest.approx(np.linalg.norm(first, axis=0) @ np.linalg.norm(output, axis=1), rel=1e-13)
    assert residual(network.hidden(case[0]) @ network.output - network.predict(case[0]), 60) < THRESHOLD


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("rank", [None, 3])
def test_predict_is_hidden_times_output_is_the_blocks(weighted, K, rank):
    case = draw(K=K, weighted=weighted, rank=rank)
    X, blocks, program = case[0], case[4], case[5]
    network = gated(case)
    scale = np.abs(blocks).max() * len(blocks)
    assert residual(network.predict(X) - network.hidden(X) @ network.output, 60, scale) < THRESHOLD
    assert residual(network.predict(X) - program.outputs(np.arange(len(blocks)), blocks), 60, scale) < THRESHOLD


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e150, 1e300])
def test_predictions_do_not_depend_on_the_units(scale):
    plain, scaled = draw(), draw(scale=scale)
    first, second = gated(plain), gated(scaled, blocks=plain[4])
    assert np.isfinite(second.weight).all()
    reference = first.predict(plain[0])
    assert residual(second.predict(scaled[0]) - reference, 60, np.abs(reference).max()) < 10 * THRESHOLD


def test_statistics_stored_are_those_of_batch_norm():
    """A forward pass with batch statistics gives the predictions from the stored ones."""
    case = draw(weighted=True)
    X, weights, network = case[0], case[5].loss.weights, gated(case)
    normalized = PreActivations.compute(X, network.weight, weights).normalized
    opened = gate_patterns(X, network.mean, network.gates, network.gate_offsets)
    outputs = (opened * (network.gamma * normalized + network.shift / np.sqrt(weights.sum()))) @ network.output
    assert residual(network.predict(X) - outputs, 60, 10 * np.abs(outputs).max()) < THRESHOLD


# --- blocks and neurons ---


@pytest.mark.parametrize("K", [1, 2, 4])
def test_blocks_become_as_many_neurons_as_their_rank(K):
    rng = np.random.default_rng(0)
    case = draw(K=K, P=6)
    q = case[1].rank + 1
    ranks = [min(r, K) for r in (1, 2, 3, 4, 1, 0)]
    blocks = np.stack([rng.standard_normal((q, r)) @ rng.standard_normal((r, K)) for r in ranks])
    network = gated(case, np.arange(6), blocks)
    assert np.bincount(network.gate_index, minlength=6).tolist() == ranks
    assert network.n_neurons == sum(ranks)
    assert np.array_equal(network.gates, case[2][:, network.gate_index])
    assert np.array_equal(network.gate_offsets, case[3][network.gate_index])
    rebuilt = _blocks_of(network, case, 6)
    assert residual(rebuilt - blocks, q, np.abs(blocks).max()) < THRESHOLD
    assert residual(block_norms(rebuilt).sum() - block_norms(blocks).sum(), q, block_norms(blocks).sum()) < THRESHOLD
    nuclear = np.linalg.svd(blocks, compute_uv=False).sum()
    plain = 0.5 * (np.sum(network.gamma**2) + np.sum(network.shift**2) + np.sum(network.output**2))
    assert plain == pytest.approx(nuclear, rel=1e-13)


def _blocks_of(network, case, P):
    """``S_i = sum_j s_j c_j'`` over the neurons of a gate, read off the weights through batch norm."""
    coordinates = (
        case[1].rows[:, :-1].T @ PreActivations.compute(case[0], network.weight, np.ones(len(case[0]))).normalized
    )
    first = np.vstack([network.gamma * coordinates, network.shift])
    blocks = np.zeros((P, len(first), network.output.shape[1]))
    np.add.at(blocks, network.gate_index, first.T[:, :, None] * network.output[:, None, :])
    return blocks


def test_blocks_on_some_gates_keep_their_gates():
    case = draw(P=9)
    index = np.array([7, 2, 4])
    network = gated(case, index)
    assert set(network.gate_index) == set(index)
    expected = case[5].outputs(index, case[4][index])
    assert residual(network.predict(case[0]) - expected, 60, 30) < THRESHOLD


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(-120, 120))
def test_blocks_of_every_size_come_back(seed, K, magnitude):
    case = draw(n=20, d=3, K=K, P=4, seed=seed)
    blocks = 10.0**magnitude * case[4]
    rebuilt = _blocks_of(gated(case, np.arange(4), blocks), case, 4)
    condition = np.linalg.cond(case[0] - case[0].mean(axis=0))
    assert residual(rebuilt / 10.0**magnitude - case[4], 20, 10 * condition) < THRESHOLD


def test_dead_and_empty_neurons():
    case = draw(K=2)
    whitening = case[1]
    first, output = np.ones((whitening.rank + 1, 3)), np.ones((3, 2))
    first[:, 0], output[1] = 0, 0
    assert BatchNormNetwork.from_neurons(whitening, Neurons(first, output)).n_neurons == 1
    for network in (
        BatchNormNetwork.from_neurons(whitening, Neurons(first[:, :0], output[:0])),
        gated(case, np.zeros(0, dtype=np.intp)),
        gated(case, np.arange(3), np.zeros((3, whitening.rank + 1, 2))),
    ):
        assert network.n_neurons == 0 and network.predict(case[0]).shape == (60, 2)
        assert not network.predict(case[0]).any() and network.hidden(case[0]).shape == (60, 0)


def test_a_neuron_of_the_constant_alone():
    """``gamma = 0`` keeps a direction on which the data vary, so that batch norm stays defined."""
    case = draw(K=1)
    first = np.zeros((case[1].rank + 1, 1))
    first[-1] = 3.0
    network = BatchNormNetwork.from_neurons(case[1], Neurons(first, np.array([[2.0]])))
    assert network.gamma[0] == 0 and network.weight.any() and np.isfinite(network.weight).all()
    assert residual(np.var(case[0] @ network.weight) - 1, 60, 10) < THRESHOLD
    assert residual(network.predict(case[0]) - 6 / np.sqrt(60), 60) < THRESHOLD


def test_neurons_are_what_a_certificate_takes():
    case = draw()
    assert set(neuron_arrays(gated(case))) == {
        "weight", "gamma", "shift", "output", "gates", "gate_offsets", "gate_index"
    }  # fmt: skip
    assert set(neuron_arrays(relu(case)[0])) == {"weight", "gamma", "shift", "output"}


# --- prediction ---


@pytest.mark.parametrize("kind", ["gated", "relu"])
def test_rows_are_independent(kind):
    """A subset of the rows, each row alone and repeated rows give the outputs of the whole batch."""
    case = draw()
    network = gated(case) if kind == "gated" else relu(case)[0]
    X = np.vstack([case[0], 1e3 * np.random.default_rng(9).standard_normal((20, 5))])
    whole = network.predict(X)
    scale = np.abs(whole).max()
    order = np.random.default_rng(0).permutation(80)
    assert residual(network.predict(X[order]) - whole[order], 10, scale) < THRESHOLD
    assert residual(network.predict(X[::3]) - whole[::3], 10, scale) < THRESHOLD
    assert residual(np.vstack([network.predict(row[None]) for row in X]) - whole, 10, scale) < THRESHOLD
    assert residual(network.predict(np.repeat(X, 3, axis=0)) - np.repeat(whole, 3, axis=0), 10, scale) < THRESHOLD
    assert network.predict(X[:0]).shape == (0, 2)


def test_a_row_far_away_does_not_spoil_the_others():
    case = draw()
    network = gated(case)
    far = np.vstack([case[0], np.full((1, 5), 1e308)])
    with np.errstate(over="ignore", invalid="ignore"):
        outputs = network.predict(far)[:-1]
    reference = network.predict(case[0])
    assert residual(outputs - reference, 60, np.abs(reference).max()) < THRESHOLD


@pytest.mark.parametrize("entries", [1, 50, 1000])
def test_chunks_of_rows_give_the_same(monkeypatch, entries):
    case = draw()
    network = gated(case)
    whole = network.predict(case[0])
    monkeypatch.setattr(module, "_CHUNK_ENTRIES", entries)
    assert residual(network.predict(case[0]) - whole, 10, np.abs(whole).max()) < THRESHOLD


def test_gates_open_on_their_hyperplane_and_relu_does_not_care():
    """A row exactly at the mean with offset zero: the gate is open, the activation is the shift."""
    whitening = whiten(np.array([[-1.0], [0.0], [1.0]]))
    blocks = np.array([[[0.0], [1.0]]])
    network = BatchNormNetwork.from_blocks(whitening, GateBlocks(np.array([0]), blocks), np.array([[1.0]]), np.zeros(1))
    expected = np.array([[0.0], [1.0], [1.0]]) / np.sqrt(3)
    assert residual(network.predict(np.array([[-1.0], [0.0], [1.0]])) - expected, 3) < THRESHOLD


def test_activations_are_not_negative_zero_or_negative():
    case = draw()
    hidden = relu(case)[0].hidden(case[0])
    assert hidden.min() == 0 and not np.signbit(hidden).any()


def test_prediction_changes_nothing_and_repeats():
    case = draw()
    X, network = case[0], gated(case)
    arrays = [X, network.mean, *neuron_arrays(network).values()]
    copies = [a.copy() for a in arrays]
    first = network.predict(X)
    assert np.array_equal(first, network.predict(X))
    assert all(np.array_equal(a, b) for a, b in zip(arrays, copies, strict=True))
    with pytest.raises(dataclasses.FrozenInstanceError):
        network.gamma = network.gamma * 2


def test_new_rows_are_the_whitened_rows_of_the_training_statistics():
    case = draw()
    network, first, output = relu(case)
    new = np.random.default_rng(3).standard_normal((15, 5)) * 4
    expected = np.maximum(case[1].transform(new) @ first, 0) @ output
    assert residual(network.predict(new) - expected, 15, np.abs(expected).max() + 1) < THRESHOLD
