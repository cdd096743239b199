"""Networks as torch modules and back: the same function to rounding, or a refusal that names what stands in the way."""

import copy
import re
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch import nn

from convexbn import ConvexBNRegressor
from convexbn.data.whitening import whiten
from convexbn.nn import GatedModule, from_module, read_last_layers, to_module
from convexbn.program.gated import GateBlocks
from convexbn.program.gates import sample_gates
from convexbn.program.losses import SquaredLoss
from convexbn.program.network import BatchNormNetwork
from convexbn.program.neurons import Neurons
from convexbn.program.output_check import probe_rows
from instances import conditioned, neuron_arrays, proof_of_relu

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def single(X):
    """Numbers that float32 holds: only the network is measured, not the rounding of its rows."""
    return X.astype(np.float32).astype(np.float64)


def relu_network(seed=0, n=50, d=6, m=7, K=3, condition=10.0, offset=1.0, weights=None):
    """Raw rows and a random ReLU network on them."""
    rng = np.random.default_rng(seed)
    X = single(conditioned(n, d, condition, rng) * np.sqrt(n) + offset)
    whitening = whiten(X, weights)
    first, output = rng.standard_normal((whitening.rank + 1, m)), rng.standard_normal((m, K))
    return X, BatchNormNetwork.from_neurons(whitening, Neurons(first, output))


def gated_network(seed=0, n=50, d=6, K=2, condition=10.0):
    rng = np.random.default_rng(seed)
    X = single(conditioned(n, d, condition, rng) * np.sqrt(n) + 1)
    whitening = whiten(X)
    gates, offsets = sample_gates("whitened", 9, whitening, np.random.RandomState(seed))
    blocks = rng.standard_normal((9, whitening.rank + 1, K))
    return X, BatchNormNetwork.from_blocks(whitening, GateBlocks(np.arange(9), blocks), gates, offsets)


def outputs_of(module, X, *, train=False):
    """Outputs in float64 of a module in its own type, on a copy."""
    module = copy.deepcopy(module).train(train)
    dtype = next(module.parameters()).dtype
    with torch.no_grad():
        return module(torch.tensor(np.asarray(X), dtype=dtype)).double().numpy()


def difference(expected, found):
    return np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-300)


def attempt(network, **settings):
    """The module, or the sentence that refuses it."""
    try:
        return to_module(network, **settings), None
    except ValueError as refusal:
        return None, str(refusal)


# --- to torch ---


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("eps", [1e-5, 1e-1])
@pytest.mark.parametrize("kind", [relu_network, gated_network])
@pytest.mark.parametrize("seed", range(5))
def test_train_mode_on_the_whole_batch_is_eval_mode_is_predict(kind, eps, dtype, seed):
    X, network = kind(seed)
    module = to_module(network, eps=eps, dtype=dtype, X=X)
    expected = network.predict(X)
    assert not module.training
    assert difference(expected, outputs_of(module, X)) < TOLERANCE[dtype]
    assert difference(expected, outputs_of(module, X, train=True)) < TOLERANCE[dtype]
    assert difference(expected, outputs_of(to_module(network, dtype=dtype, fold=True), X)) < TOLERANCE[dtype]
    new = single(np.random.default_rng(seed).standard_normal((40, 6)))
    assert difference(network.predict(new), outputs_of(module, new)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("fold", [False, True])
def test_ill_conditioned_data_are_converted_or_refused_with_the_error(condition, offset, dtype, fold):
    X, network = relu_network(3, condition=condition, offset=offset)
    expected = network.predict(X)
    loose = difference(expected, outputs_of(to_module(network, dtype=dtype, fold=fold, tol=np.inf), X))
    module, refusal = attempt(network, dtype=dtype, fold=fold, X=X)
    if module is not None:
        assert difference(expected, outputs_of(module, X)) < TOLERANCE[dtype]
        return
    measured = float(re.search(r"differ by (\S+) of their scale", refusal).group(1))
    assert measured >= TOLERANCE[dtype] and ("float64, " in refusal) == (dtype == torch.float32)
    assert condition * (1 + offset) >= 100  # nothing easy is refused
    if "rows of X" in refusal:
        assert measured == pytest.approx(loose, rel=0.1)


def test_the_module_is_plain_and_what_it_says():
    X, network = relu_network()
    module = to_module(network, eps=0.5, dtype=torch.float64)
    assert [type(layer) for layer in module] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    linear, batch_norm, _, output = module
    assert output.bias is None and batch_norm.momentum == 0.0 and batch_norm.eps == 0.5
    assert batch_norm.num_batches_tracked == 1 and (batch_norm.running_var == 1).all()
    assert batch_norm.running_mean.abs().max() < 1e-15
    assert all(parameter.requires_grad for parameter in module.parameters())
    responses = linear(torch.tensor(X))
    assert responses.mean(0).abs().max() < 1e-14 and (responses.var(0, correction=0) - 1).abs().max() < 1e-13
    state = copy.deepcopy(module.state_dict())
    module.train()(torch.randn(20, 6, dtype=torch.float64) * 7)
    for name, tensor in module.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(tensor, state[name])
    assert [type(layer) for layer in to_module(network, fold=True)] == [nn.Linear, nn.ReLU, nn.Linear]


def test_rounding_of_the_first_layer_is_stored_in_its_statistics():
    _, network = relu_network(offset=1000.0)
    linear, batch_norm, *_ = to_module(network, dtype=torch.float32, tol=np.inf).double()
    with torch.no_grad():
        left = linear(torch.tensor(network.mean)) - batch_norm.running_mean
    assert 0 < batch_norm.running_mean.abs().max() < 1e-2 and left.abs().max() < 1e-9


def test_weighted_statistics_are_stored_in_the_module():
    weights = np.random.default_rng(0).integers(1, 4, 50).astype(float)
    X, network = relu_network(weights=weights)
    module = to_module(network, dtype=torch.float64)
    assert difference(network.predict(X), outputs_of(module, X)) < 1e-13
    repeated = np.repeat(X, weights.astype(int), axis=0)
    assert difference(network.predict(repeated), outputs_of(module, repeated, train=True)) < 1e-13


@pytest.mark.parametrize("kind", [relu_network, gated_network])
def test_a_module_shares_no_memory_with_the_network(kind):
    _, network = kind()
    network = replace(network, output_bias=np.ones(network.n_outputs))
    arrays = {"mean": network.mean, "output_bias": network.output_bias, **neuron_arrays(network)}
    copies = {name: array.copy() for name, array in arrays.items()}
    for fold in (False, True):
        module = to_module(network, dtype=torch.float64, fold=fold)
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.zero_()
    assert all(np.array_equal(array, copies[name]) for name, array in arrays.items())


def test_the_type_is_torchs_default_and_its_global_state_is_left_alone():
    _, network = relu_network()
    state = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    module = to_module(network)
    from_module(module, n_effective=50)
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    torch.set_default_dtype(torch.float64)
    try:
        assert next(to_module(network).parameters()).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        from_module(module, n_effective=50)
        from_module(module, relu_network()[0])
        assert {tensor.device.type for tensor in to_module(network).state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("kind", [relu_network, gated_network])
@pytest.mark.parametrize("fold", [False, True])
def test_a_network_without_neurons_is_one_dead_neuron(kind, fold):
    X, network = kind()
    neurons = {name: array[..., :0] for name, array in neuron_arrays(network).items() if name != "output"}
    empty = BatchNormNetwork(**neurons, output=network.output[:0], mean=network.mean, n_effective=50.0)
    module = to_module(empty, fold=fold)
    for train in (False, True):
        assert not outputs_of(module, X, train=train).any()
        assert outputs_of(module, X, train=train).shape == network.predict(X).shape
    if kind is relu_network and not fold:
        assert not from_module(module, X).predict(X).any()


def test_gates_stay_exact_in_float32_and_survive_a_state_dict():
    X, network = gated_network(condition=100.0)
    rows = single(np.random.default_rng(0).standard_normal((5000, 6))) + 1
    module = to_module(network, dtype=torch.float32)
    assert isinstance(module, GatedModule) and module.gates.dtype == torch.float64
    assert difference(network.predict(rows), outputs_of(module, rows)) < 1e-5
    other = to_module(gated_network(seed=1, condition=100.0)[1], dtype=torch.float32)
    other.load_state_dict(module.state_dict())
    assert np.array_equal(outputs_of(other, X), outputs_of(module, X))
    assert np.isfinite(outputs_of(module.float(), X)).all()


def test_modules_export_and_train():
    X, network = relu_network()
    for module in (to_module(network), to_module(gated_network()[1])):
        rows = torch.tensor(X, dtype=torch.float32)
        exported = torch.export.export(module, (rows,)).module()
        assert torch.allclose(exported(rows), module(rows))
        module.train()(rows).square().sum().backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
        ({"eps": float("nan")}, ValueError, "eps must be positive"),
        ({"eps": float("inf")}, ValueError, "eps must be positive"),
        ({"dtype": torch.float16}, TypeError, "float32 or torch.float64, got torch.float16"),
        ({"X": np.zeros((3, 5))}, ValueError, r"X must have shape \(n, 6\), got \(3, 5\)"),
        ({"X": np.zeros(6)}, ValueError, r"X must have shape \(n, 6\)"),
        ({"tol": 0.0}, ValueError, r"in float32 the outputs on probe rows differ by .*more than 0.0e\+00"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_are_refused(settings, error, words):
    with pytest.raises(error, match=words):
        to_module(relu_network()[1], **settings)


def test_only_networks_are_converted():
    with pytest.raises(TypeError, match=r"such as model.network_; got ConvexBNRegressor"):
        to_module(ConvexBNRegressor())


@pytest.mark.parametrize("scale", [1e-50, 1e50])
def test_numbers_beyond_float32_are_refused(scale):
    _, network = relu_network()
    tiny = BatchNormNetwork(
        **{**neuron_arrays(network), "weight": network.weight / scale}, mean=network.mean * scale, n_effective=50.0
    )
    with pytest.raises(ValueError, match=r"in float32 the outputs on probe rows differ by .*convert to float64"):
        to_module(tiny)
    rows = relu_network()[0] * scale
    assert difference(tiny.predict(rows), outputs_of(to_module(tiny, dtype=torch.float64), rows)) < 1e-12


def test_probes_have_the_size_of_the_data():
    """PreActivations of size 1 whatever the units, and the features vary about as much as those of the data."""
    X, network = relu_network(m=40, condition=100.0)
    units = np.array([1e-30, 1e-3, 1.0, 1e3, 1e6, 1e30])
    rows = probe_rows(network.weight / units[:, None], network.mean * units) / units
    responses = (rows - network.mean) @ network.weight
    assert np.sqrt(np.mean(responses**2)) == pytest.approx(1, rel=1e-9)
    ratio = rows.std(axis=0) / X.std(axis=0)
    assert ratio.max() < 4 and ratio.min() > 0.25


# --- from torch ---


def trained(m=8, d=5, K=2, seed=0, dtype=torch.float32, **settings):
    """Layers after passes in train mode; batch norm has negative scales too."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(64, d, generator=generator) * 3 + 2
    linear, batch_norm = nn.Linear(d, m), nn.BatchNorm1d(m, **settings)
    output = nn.Linear(m, K, bias=False)
    with torch.no_grad():
        for parameter in (*linear.parameters(), *batch_norm.parameters(), *output.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for _ in range(3):
            batch_norm(linear(X[torch.randperm(64, generator=generator)[:32]]))
    return X.to(dtype), [layer.to(dtype) for layer in (linear, batch_norm, nn.ReLU(), output)]


class WithAttributes(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.relu = layers[2]
        self.fc1, self.bn, self.fc2 = layers[0], layers[1], layers[3]
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.fc2(self.dropout(self.relu(self.bn(self.fc1(x)))))


class Functional(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.body = nn.ModuleDict({"fc1": layers[0], "bn": layers[1]})
        self.head = layers[3]

    def forward(self, x):
        return self.head(functional.relu(self.body["bn"](self.body["fc1"](x.flatten(1)))))


class Noisy(WithAttributes):
    def forward(self, x):
        return super().forward(x) + 0 * torch.rand(1, dtype=x.dtype)


NESTINGS = {
    "noisy": Noisy,
    "sequential": lambda layers: nn.Sequential(*layers),
    "nested": lambda layers: nn.Sequential(nn.Sequential(nn.Sequential(*layers[:2]), layers[2]), *layers[3:]),
    "named": lambda layers: nn.Sequential(OrderedDict(zip(("in", "norm", "act", "out"), layers, strict=True))),
    "attributes": WithAttributes,
    "functional": Functional,
    "no_ops": lambda layers: nn.Sequential(
        nn.Flatten(),
        nn.Identity(),
        *layers[:2],
        nn.Dropout(0.1),
        layers[2],
        nn.AlphaDropout(),
        layers[3],
        nn.Identity(),
    ),
    "parallel": lambda layers: nn.DataParallel(nn.Sequential(*layers)),
    "compiled": lambda layers: torch.compile(nn.Sequential(*layers)),
    "averaged": lambda layers: torch.optim.swa_utils.AveragedModel(nn.Sequential(*layers)),
    "inplace": lambda layers: nn.Sequential(*layers[:2], nn.ReLU(inplace=True), layers[3]),
}


def expected_outputs(layers, X, *, train=False):
    """The reference: the layers in order, in float64."""
    return outputs_of(nn.Sequential(*layers).double(), X.double().numpy(), train=train)


@pytest.mark.parametrize("nesting", NESTINGS)
def test_usual_nestings_are_read(nesting):
    X, layers = trained()
    module = NESTINGS[nesting](layers)
    network = from_module(module, X)
    new = np.random.default_rng(0).standard_normal((30, 5)) * 5
    reference = copy.deepcopy(layers)
    assert difference(expected_outputs(reference, X), network.predict(X.double().numpy())) < 1e-13
    assert difference(expected_outputs(reference, torch.tensor(new)), network.predict(new)) < 1e-13
    batch = from_module(module, X, statistics="batch")
    assert difference(expected_outputs(reference, X, train=True), batch.predict(X.double().numpy())) < 1e-13
    without = from_module(module, n_effective=64)
    assert difference(network.predict(new), without.predict(new)) < 1e-12


@pytest.mark.parametrize("statistics", ["stored", "batch"])
@pytest.mark.parametrize("settings", [{}, {"eps": 0.1}, {"momentum": None}, {"momentum": 1.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_network_that_was_read_is_normalised_on_its_rows(statistics, settings, dtype):
    X, layers = trained(dtype=dtype, **settings)
    network = from_module(nn.Sequential(*layers), X, statistics=statistics)
    rows = X.double().numpy()
    expected = expected_outputs(copy.deepcopy(layers), X, train=statistics == "batch")
    assert difference(expected, network.predict(rows)) < 1e-12
    assert np.abs(np.var(rows @ network.weight, axis=0) - 1).max() < 1e-12 and (network.gamma >= 0).all()
    assert np.allclose(network.mean, rows.mean(axis=0), rtol=1e-14) and network.n_effective == 64.0
    again = to_module(network, dtype=torch.float64, eps=0.01)
    assert difference(expected, outputs_of(again, rows, train=True)) < 1e-12


@pytest.mark.parametrize("statistics", ["stored", "batch"])
def test_the_bias_of_the_last_linear_is_the_output_bias(statistics):
    X, layers = trained(dtype=torch.float64)
    layers[3] = nn.Linear(8, 2).double()
    network = from_module(nn.Sequential(*layers), X, statistics=statistics)
    assert network.output_bias.any() and np.array_equal(network.output_bias, layers[3].bias.detach().numpy())
    expected = expected_outputs(copy.deepcopy(layers), X, train=statistics == "batch")
    assert difference(expected, network.predict(X.numpy())) < 1e-12


@pytest.mark.parametrize("kind", [relu_network, gated_network])
@pytest.mark.parametrize("fold", [False, True])
def test_an_output_bias_becomes_that_of_the_last_linear(kind, fold):
    X, network = kind()
    bias = np.arange(1.0, network.n_outputs + 1)
    module = to_module(replace(network, output_bias=bias), dtype=torch.float64, fold=fold)
    assert difference(network.predict(X) + bias, outputs_of(module, X)) < 1e-13
    if kind is relu_network and not fold:
        for given in ({"X": X}, {"X": X, "statistics": "batch"}, {"n_effective": 50}):
            assert np.array_equal(from_module(module, **given).output_bias, bias)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("eps", [1e-5, 1e-1])
def test_round_trips_give_the_network_back(seed, eps):
    X, network = relu_network(seed, condition=100.0)
    module = to_module(network, eps=eps, dtype=torch.float64)
    for again in (from_module(module, X), from_module(module, X, statistics="batch")):
        for name, array in {"mean": network.mean, **neuron_arrays(network)}.items():
            found = getattr(again, name)
            assert np.abs(found - array).max() < 1e-11 * np.abs(array).max(), name
    without = from_module(module, n_effective=network.n_effective)
    for name, array in neuron_arrays(network).items():
        assert np.abs(getattr(without, name) - array).max() < 1e-11 * np.abs(array).max(), name
    assert difference(network.predict(X), without.predict(X)) < 1e-12
    single = from_module(to_module(network, dtype=torch.float32), X)
    assert difference(network.predict(X), single.predict(X)) < 1e-4  # the weights were rounded to float32


def test_gamma_and_shift_are_the_papers():
    """``g = sqrt(n) weight rho`` and ``a = sqrt(n) bias`` with full-batch statistics: what a certificate judges."""
    X, layers = trained(K=1, eps=0.3)
    network = from_module(nn.Sequential(*layers), X, statistics="batch")
    rows, (linear, batch_norm, _, output) = X.double().numpy(), [copy.deepcopy(layer).double() for layer in layers]
    deviation = linear(X.double()).std(0, correction=0).detach().numpy()
    gamma = np.sqrt(64) * np.abs(batch_norm.weight.detach().numpy()) * deviation / np.hypot(deviation, np.sqrt(0.3))
    shift = np.sqrt(64) * batch_norm.bias.detach().numpy()
    assert np.allclose(network.gamma, gamma, rtol=1e-13) and np.allclose(network.shift, shift, rtol=1e-13)
    loss = SquaredLoss(rows[:, :1], np.ones(64))
    proof = proof_of_relu(loss, rows, 0.7, network, 1e-3)
    value = 0.5 * np.sum((expected_outputs(layers, X, train=True) - rows[:, :1]) ** 2)
    plain = 0.5 * (gamma @ gamma + shift @ shift + np.sum(output.weight.detach().numpy() ** 2))
    assert proof.weight_decay_objective == pytest.approx(value + 0.7 * plain, rel=1e-12)


@pytest.mark.parametrize("nesting", NESTINGS)
def test_the_module_is_left_as_it_was(nesting):
    X, layers = trained()
    module = NESTINGS[nesting](layers)
    module.train()
    outputs_of(nn.Sequential(*layers), X)
    (nn.Sequential(*layers)(X) ** 2).sum().backward()
    state, rng = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    grads = [copy.deepcopy(parameter.grad) for parameter in module.parameters()]
    network = from_module(module, X)
    for array in (network.output_bias, *neuron_arrays(network).values()):
        array[...] = 0  # no memory is shared
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    for parameter, grad in zip(module.parameters(), grads, strict=True):
        assert parameter.grad is grad is None or torch.equal(parameter.grad, grad)
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in module.parameters())
    assert module.training and torch.equal(rng, torch.get_rng_state())
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_dead_neurons_are_kept_and_those_that_do_not_vary_refused():
    X, layers = trained()
    with torch.no_grad():
        layers[0].weight[1] = 0  # a constant: relu of its bias through the stored statistics
        layers[1].weight[2] = 0
        layers[3].weight[:, 3] = 0
    network = from_module(nn.Sequential(*layers), X)
    assert network.n_neurons == 8 and network.gamma[1] == network.gamma[2] == 0
    assert difference(expected_outputs(layers, X), network.predict(X.double().numpy())) < 1e-13
    with torch.no_grad():
        layers[0].weight[4, 1:] = 0  # a neuron of the first feature alone
    X = X.double()
    X[:, 0] = torch.tensor(1e8 * (1 + 2.3e-16 * (np.arange(64) % 2)))  # constant but for rounding
    with pytest.raises(ValueError, match=r"1 neurons \(the first is 4\) do not vary over the rows"):
        from_module(nn.Sequential(*layers), X)


def test_statistics_of_rows_far_from_zero():
    _, layers = trained()
    stored = read_last_layers(nn.Sequential(*layers)).layers
    rows = np.random.default_rng(0).standard_normal((5000, 5)) + 1e12
    deviations = rows - 1e12
    assert np.abs(stored.network(rows).mean - 1e12 - deviations.mean(axis=0)).max() < 3e-4  # spacing of floats: 1.2e-4
    found = stored.with_statistics_of(rows)
    assert np.allclose(found.running_var, (deviations @ found.weight).var(axis=0), rtol=1e-6)


def test_images_are_flattened():
    X, layers = trained(d=12)
    images = X.reshape(64, 3, 2, 2)
    for module in (nn.Sequential(nn.Flatten(), *layers), Functional(layers)):
        network = from_module(module, images)
        assert difference(expected_outputs(layers, X), network.predict(X.double().numpy())) < 1e-13


@pytest.mark.parametrize("kind", [list, np.asarray, lambda X: X.requires_grad_(True), lambda X: X.numpy()[::-1]])
def test_rows_are_arrays_tensors_or_lists(kind):
    X, layers = trained()
    module = nn.Sequential(*layers)
    given = X.tolist() if kind is list else kind(X.clone())
    assert from_module(module, given).n_effective == 64.0


def replaced(place, layer, *, names=False):
    def change(layers):
        layers = list(layers)
        layers[place] = layer(layers[place])
        return nn.Sequential(*layers)

    return change


def with_values(place, name, value):
    def change(layers):
        with torch.no_grad():
            tensor = getattr(layers[place], name)
            tensor.copy_(torch.full_like(tensor, value))
        return nn.Sequential(*layers)

    return change


class Scaled(Functional):
    def forward(self, x):
        return super().forward(x / 255)


class Softplus(Functional):
    def forward(self, x):
        return self.head(functional.softplus(self.body["bn"](self.body["fc1"](x)), beta=50))


class Clipped(Functional):
    def forward(self, x):
        return self.head(functional.hardtanh(self.body["bn"](self.body["fc1"](x)), 0, 60))


class Residual(Functional):
    def forward(self, x):
        hidden = self.body["fc1"](x)
        return self.head(functional.relu(hidden + self.body["bn"](hidden)))


class Unused(Functional):
    def forward(self, x):
        return x[:, :2]


class Several(Functional):
    def forward(self, x):
        return super().forward(x), x


REFUSALS = {
    "untrained": (replaced(1, lambda layer: nn.BatchNorm1d(8)), "BatchNorm1d '1' is untrained"),
    "no scale": (replaced(1, lambda layer: nn.BatchNorm1d(8, affine=False)), "BatchNorm1d '1' has no scale and shift"),
    "no statistics": (
        replaced(1, lambda layer: nn.BatchNorm1d(8, track_running_stats=False)),
        "BatchNorm1d '1' has no stored statistics",
    ),
    "layer norm": (replaced(1, lambda layer: nn.LayerNorm(8)), "layer '1' is a LayerNorm where a BatchNorm1d is"),
    "sync": (replaced(1, nn.SyncBatchNorm.convert_sync_batchnorm), "layer '1' is a SyncBatchNorm"),
    "tanh": (replaced(2, lambda layer: nn.Tanh()), "layer '2' is a Tanh where a BatchNorm1d is expected"),
    "relu6": (replaced(2, lambda layer: nn.ReLU6()), "layer '2' is a ReLU6"),
    "no relu": (replaced(2, lambda layer: nn.Identity()), "does not use '0', '1' and '3' as Linear, BatchNorm1d, ReLU"),
    "lazy": (replaced(1, lambda layer: nn.LazyBatchNorm1d()), r"layer '1' is a LazyBatchNorm1d \(run a batch"),
    "lazy linear": (replaced(0, lambda layer: nn.LazyLinear(8)), r"layer '0' is a LazyLinear \(run a batch"),
    "parametrised": (
        replaced(0, nn.utils.parametrizations.weight_norm),
        "is a ParametrizationList where|is a _WeightNorm where",
    ),
    "convolution": (lambda layers: nn.Sequential(nn.Conv1d(1, 1, 1), *layers), "Conv1d '0' comes before Linear '1'"),
    "input norm": (lambda layers: nn.Sequential(nn.BatchNorm1d(5), *layers), "BatchNorm1d '0' comes before Linear '1'"),
    "softmax": (lambda layers: nn.Sequential(*layers, nn.Softmax(1)), "layer '4' is a Softmax where a Linear is"),
    "norm last": (lambda layers: nn.Sequential(layers[0], *layers[:0:-1]), "is a BatchNorm1d where a Linear"),
    "norm after relu": (
        lambda layers: nn.Sequential(layers[0], layers[2], layers[1], layers[3]),
        "one after the other",
    ),
    "relu first": (lambda layers: nn.Sequential(nn.ReLU(), *layers), "changes its inputs before Linear '1'"),
    "scaled": (Scaled, "the forward of the Scaled changes its inputs before Linear 'body.fc1'"),
    "softplus": (Softplus, "the forward of the Softplus does not use 'body.fc1', 'body.bn' and 'head'"),
    "clipped": (Clipped, "the forward of the Clipped does not use"),
    "residual": (Residual, "the forward of the Residual does not use"),
    "unused": (Unused, "the forward of the Unused does not use"),
    "several": (Several, r"a copy of the Several does not run in float64 on rows of shape \(5,\)"),
    "too short": (lambda layers: nn.Sequential(*layers[1:]), "the Sequential has no Linear before its last 2"),
    "one layer": (lambda layers: layers[3], "the Linear has no BatchNorm1d before its last 1"),
    "empty": (lambda layers: nn.Sequential(), "layer '' is a Sequential where a Linear is expected"),
    "sizes": (replaced(3, lambda layer: nn.Linear(9, 2, bias=False)), "they have 8, 8 and 9 features"),
    "NaN": (with_values(0, "weight", float("nan")), "weight of Linear '0' is not finite"),
    "infinity": (with_values(1, "running_mean", float("inf")), "running_mean of BatchNorm1d '1' is not finite"),
    "negative variance": (
        with_values(1, "running_var", -1.0),
        "BatchNorm1d '1' has a running_var that is no variance",
    ),
    "complex": (
        replaced(0, lambda layer: nn.Linear(5, 8, dtype=torch.complex64)),
        "weight of Linear '0' holds no real",
    ),
    "meta": (lambda layers: nn.Sequential(*layers).to("meta"), "weight of Linear '0' holds no real .* on device meta"),
    "gated": (
        lambda layers: to_module(gated_network(d=5)[1]),
        "the forward of the GatedModule does not use 'hidden.0'",
    ),
    "no module": (lambda layers: layers, "module must be a torch.nn.Module, got list"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_no_network_is_is_refused_by_name(case):
    X, layers = trained()
    change, words = REFUSALS[case]
    with pytest.raises((TypeError, ValueError), match=words) as refusal:
        from_module(change(layers), X)
    assert str(refusal.value).endswith(".") and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "a module does not hold its training rows: give X, or n_effective"),
        ({"n_effective": 5.0, "statistics": "batch"}, "give X"),
        ({"n_effective": 0.0}, "n_effective must be a positive number of rows, got 0.0"),
        ({"n_effective": float("nan")}, "n_effective must be a positive number"),
        ({"X": torch.ones(4, 5), "n_effective": 4.0}, "give X or n_effective, not both"),
        ({"X": torch.ones(4, 6)}, r"X must have two rows or more, of 5 features; got shape \(4, 6\)"),
        ({"X": torch.ones(1, 5)}, "two rows or more"),
        ({"X": torch.ones(5)}, "two rows or more"),
        ({"X": torch.full((4, 5), float("nan"))}, "X must be finite"),
        ({"X": torch.ones(4, 5)}, "do not vary over the rows"),
        ({"X": torch.ones(4, 5), "statistics": "running"}, "'stored' or 'batch', got 'running'"),
    ],
    ids=str,
)
def test_rows_that_cannot_be_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        from_module(nn.Sequential(*trained()[1]), **given)


# --- deep networks ---


def deep(K=3):
    torch.manual_seed(0)
    backbone = [
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 6),
    ]
    module = nn.Sequential(nn.Sequential(*backbone, nn.ReLU()), *trained(d=6, K=K)[1])
    images = torch.randn(1030, 1, 8, 8)
    module(images)
    return images, module


def test_the_tail_of_a_deep_network_and_its_features():
    images, module = deep()
    module[-1] = nn.Linear(8, 3)
    tail = read_last_layers(module)
    assert (tail.linear, tail.batch_norm, tail.output) == ("1", "2", "4")
    assert tail.before == ("0.0", "0.1", "0.3", "0.5")
    assert np.array_equal(tail.layers.output_bias, module[-1].bias.detach().double().numpy())
    state = copy.deepcopy(module.state_dict())
    features = tail.features(images)
    reference = copy.deepcopy(module).double().eval()
    with torch.no_grad():
        assert difference(reference[0](images.double()).numpy(), features) < 1e-13
        assert difference(reference(images.double()).numpy(), tail.layers.predict(features)) < 1e-13
    assert module.training and all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    with pytest.raises(ValueError, match=r"Conv2d '0.0' comes before Linear '1'"):
        from_module(module, images)
    with pytest.raises(ValueError, match=r"does not run in float64 on rows of shape \(4,\)"):
        tail.features(images.reshape(-1, 4))


def test_rows_are_not_written_to():
    images, module = deep()
    images = images.double()
    before = images.clone()
    read_last_layers(nn.Sequential(nn.ReLU(inplace=True), module)).features(images)
    assert torch.equal(images, before)


def test_a_tail_that_the_forward_does_not_end_with_is_refused():
    images, module = deep()

    class Negated(nn.Sequential):
        def forward(self, x):
            return -super().forward(x)

    with pytest.raises(ValueError, match="the forward of the Negated does not use '1', '2' and '4'"):
        read_last_layers(Negated(*module)).features(images)
