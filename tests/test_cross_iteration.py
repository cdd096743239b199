"""Cross-iteration batch norm against the paper's formulas, batch norm itself, and the truth on earlier batches."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parameters_to_vector

from convexbn.companions.cross_iteration import (
    CrossIterationBatchNorm1d,
    CrossIterationBatchNorm2d,
    convert_cross_iteration_batch_norm,
)

torch.set_num_threads(1)

#: A layer, its inputs' shape, and the batch norm behind it.
LAYERS = {
    "linear": (lambda: nn.Linear(6, 4, bias=False), (5, 6), CrossIterationBatchNorm1d),
    "linear with bias": (lambda: nn.Linear(6, 4), (5, 6), CrossIterationBatchNorm1d),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1, stride=2), (5, 3, 7), CrossIterationBatchNorm1d),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 6), CrossIterationBatchNorm2d),
    "groups": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2, dilation=(1, 2)), (2, 4, 5, 6), CrossIterationBatchNorm2d),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 5, 6), CrossIterationBatchNorm2d),
}
PLAIN = {CrossIterationBatchNorm1d: nn.BatchNorm1d, CrossIterationBatchNorm2d: nn.BatchNorm2d}
ORDERS = ["linear", "exact"]


def made(name, seed=0, dtype=torch.float64, **settings):
    """Layer and its batch norm, with random scale and shift."""
    torch.manual_seed(seed)
    make, shape, kind = LAYERS[name]
    layer = make().to(dtype)
    norm = kind(layer, **settings)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, -0.5, 0.5)
    return layer, norm, shape


def plain(norm):
    """Torch's batch norm with the same parameters."""
    kind = PLAIN[type(norm)]
    twin = kind(norm.num_features, eps=norm.eps, momentum=norm.momentum, dtype=norm.weight.dtype)
    twin.load_state_dict(
        {name: tensor.clone() for name, tensor in norm.state_dict().items() if name in twin.state_dict()}
    )
    return twin


def batches(shape, number, dtype=torch.float64, seed=1):
    """Batches whose channels have means far from 0, as after a ReLU."""
    return 1 + torch.randn(number, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def axes(x):
    return [0, *range(2, x.ndim)]


def nudge(layer, size, seed):
    """A step of the weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


# --- it is batch norm where it should be ---


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "settings", [{"window": 1}, {"window": 4, "burn_in": 100}, {"window": 1, "momentum": None}], ids=str
)
def test_a_window_of_one_and_the_burn_in_are_batch_norm_bit_for_bit(name, settings):
    layer, norm, shape = made(name, dtype=torch.float32, **settings)
    twin_layer, twin = copy.deepcopy(layer), plain(norm)
    for t, x in enumerate(batches(shape, 4, torch.float32)):
        outputs, expected = norm(layer(x)), twin(twin_layer(x))
        assert torch.equal(outputs, expected)
        outputs.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(layer.weight.grad, twin_layer.weight.grad) and torch.equal(
            norm.weight.grad, twin.weight.grad
        )
        nudge(layer, 0.1, t)
        nudge(twin_layer, 0.1, t)
    for buffer in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(norm, buffer), getattr(twin, buffer))
    assert torch.equal(norm.eval()(outputs), twin.eval()(outputs))


@pytest.mark.parametrize("name", LAYERS)
def test_the_first_batch_of_a_window_is_batch_norm(name):
    layer, norm, shape = made(name, window=4)
    twin = plain(norm)
    x = layer(batches(shape, 1)[0]).detach().requires_grad_()
    outputs = norm(layer(batches(shape, 1)[0]))
    expected = twin(x)
    assert torch.allclose(outputs, expected, rtol=1e-12, atol=1e-13)
    weight = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)
    (outputs * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.allclose(norm.weight.grad, twin.weight.grad, rtol=1e-11)
    (gradient,) = torch.autograd.grad(layer(batches(shape, 1)[0]), layer.weight, x.grad)
    assert torch.allclose(layer.weight.grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("second_moment", ORDERS)
@pytest.mark.parametrize("name", LAYERS)
def test_without_steps_it_is_batch_norm_over_the_union_of_the_batches(name, second_moment):
    layer, norm, shape = made(name, window=3, second_moment=second_moment)
    twin, data = plain(norm), batches(shape, 6)
    for t, x in enumerate(data):
        outputs = norm(layer(x))
        union = layer(torch.cat(list(data[max(0, t - 2) : t + 1].flip(0))))
        assert torch.allclose(outputs, copy.deepcopy(twin)(union)[: len(x)], rtol=1e-12, atol=1e-12)
        variance, mean = torch.var_mean(union, axes(x), correction=0)
        assert torch.allclose(norm.mean, mean, rtol=1e-12) and torch.allclose(norm.variance, variance, rtol=1e-12)
    norm.eval()(layer(x))
    assert norm.mean is norm.variance is None


@pytest.mark.parametrize("second_moment", ORDERS)
def test_running_statistics_and_eval_mode_are_those_of_batch_norm(second_moment):
    layer, norm, shape = made("linear with bias", window=3, second_moment=second_moment)
    twin, data = plain(norm), batches(shape, 5)
    for t, x in enumerate(data):
        norm(layer(x))
        twin(layer(x))
        nudge(layer, 0.3, t)
    for buffer in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.allclose(getattr(norm, buffer), getattr(twin, buffer), rtol=1e-13)
    outputs = layer(data[0])
    assert torch.allclose(norm.eval()(outputs), twin.eval()(outputs), rtol=1e-12, atol=1e-12)


# --- the correction ---


def history(name, second_moment, size=0.3, window=4):
    """Compensated statistics of past batches, and the layer with its present weights."""
    layer, norm, shape = made(name, window=window, second_moment=second_moment)
    data = batches(shape, window)
    for t, x in enumerate(data[:-1]):
        norm(layer(x))
        nudge(layer, size, t)
    return layer, norm, data, norm._compensate()


def truth(layer, data):
    """Means and variances (steps, C) of the outputs without their bias."""
    bias = 0 if layer.bias is None else layer.bias.detach()
    found = [torch.var_mean(layer(x).detach(), axes(x), correction=0) for x in data]
    return torch.stack([mean - bias for _, mean in found]), torch.stack([variance for variance, _ in found])


@pytest.mark.parametrize("second_moment", ORDERS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_corrected_mean_is_exact(name, second_moment):
    layer, _, data, (means, _) = history(name, second_moment)
    assert torch.allclose(means, truth(layer, data[:-1])[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_the_exact_second_moment_is_exact(name):
    layer, _, data, (_, variances) = history(name, "exact")
    assert torch.allclose(variances, truth(layer, data[:-1])[1], rtol=1e-11)


@pytest.mark.parametrize("name", LAYERS)
def test_what_the_linear_second_moment_leaves_out_is_the_curvature(name):
    """True nu minus the first order is d'Cd >= 0, C the second moment of the patches, where nothing is clamped."""
    layer, norm, data, (means, variances) = history(name, "linear", size=0.02)
    step = (norm._by_group(layer.weight.detach()) - norm.past_weight).flatten(1, 2)  # (steps, C, patch)
    left_out = []
    for x, moved in zip(data[:-1], step, strict=True):
        with torch.no_grad():
            response = functional.linear(x, moved) if isinstance(layer, nn.Linear) else layer._conv_forward(
                x, moved.reshape(layer.weight.shape), None
            )  # fmt: skip
        left_out.append(response.square().mean(axes(x)))
    true_mean, true_variance = truth(layer, data[:-1])
    residual = true_variance + true_mean.square() - variances - means.square()
    assert (variances > 0).all() and torch.allclose(residual, torch.stack(left_out), rtol=1e-8, atol=1e-13)
    assert (residual > 0).all()


def paper(layer, inputs, weights, x, norm):
    """The formulas of the paper as they stand, for the present batch x and earlier inputs with their weights."""
    means, seconds = [], []
    for z, weight in zip([*inputs, x], [*weights, layer.weight], strict=True):
        old = copy.deepcopy(layer)
        old.weight = nn.Parameter(weight.detach().clone())
        out = layer(z) if z is x else old(z)
        if layer.bias is not None:
            out = out - layer.bias.detach().reshape(1, -1, *[1] * (out.ndim - 2))
        mean, second = out.mean(axes(z)), out.square().mean(axes(z))
        if z is not x:
            step = (layer.weight - weight).detach()
            (d_mean,) = torch.autograd.grad(mean.sum(), old.weight, retain_graph=True)
            (d_second,) = torch.autograd.grad(second.sum(), old.weight)
            mean = mean.detach() + (d_mean * step).flatten(1).sum(1)
            second = second.detach() + (d_second * step).flatten(1).sum(1)
        means.append(mean)
        seconds.append(torch.maximum(second, mean.square()))
    mean, second = torch.stack(means).mean(0), torch.stack(seconds).mean(0)
    shape = (1, -1, *[1] * (x.ndim - 2))
    scaled = (out - mean.reshape(shape)) / (second - mean.square() + norm.eps).sqrt().reshape(shape)
    return scaled * norm.weight.reshape(shape) + norm.bias.reshape(shape)


@pytest.mark.parametrize("size", [0.01, 0.6], ids=["small steps", "clamped"])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_the_papers_formulas(name, size):
    layer, norm, shape = made(name, window=3)
    data, weights = batches(shape, 5), []
    for t, x in enumerate(data):
        outputs = norm(layer(x))
        expected = paper(layer, data[max(0, t - 2) : t], weights[max(0, t - 2) : t], x, norm)
        assert torch.allclose(outputs, expected, rtol=1e-10, atol=1e-11)
        slope = torch.linspace(-1, 1, outputs.numel(), dtype=x.dtype).reshape(outputs.shape)
        found, wanted = [torch.autograd.grad((out * slope).sum(), layer.weight)[0] for out in (outputs, expected)]
        assert torch.allclose(found, wanted, rtol=1e-8, atol=1e-10)
        weights.append(layer.weight.detach().clone())
        nudge(layer, size, t)
    _, variances = norm._compensate()
    assert bool((variances == 0).any()) == (size > 0.1)


# --- a training run ---


def network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)]
    layers += [nn.ReLU(), nn.Flatten(), nn.Linear(96, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)]
    return nn.Sequential(*layers).to(dtype)


def train(module, optimizer, steps):
    for t in steps:
        x = batches((3, 1, 8, 8), 1, seed=t, dtype=module[0].weight.dtype)[0]
        optimizer.zero_grad()
        functional.cross_entropy(module(x), torch.arange(3)).backward()
        optimizer.step()


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize("second_moment", ORDERS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(second_moment):
    settings = {"window": 3, "burn_in": 2, "second_moment": second_moment}
    whole = convert_cross_iteration_batch_norm(network(), **settings)
    optimizer = sgd(whole)
    train(whole, optimizer, range(6))
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    assert all(isinstance(value, torch.Tensor) for value in saved[0].values())
    train(whole, optimizer, range(6, 12))
    resumed = convert_cross_iteration_batch_norm(network(seed=1), **settings)
    optimizer = sgd(resumed)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(resumed, optimizer, range(6, 12))
    for (name, one), two in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert resumed[1].batches == 12 and resumed[1].stored == 10


@pytest.mark.parametrize("second_moment", ORDERS)
def test_copies_train_on_their_own(second_moment):
    one = convert_cross_iteration_batch_norm(network(), window=3, second_moment=second_moment)
    train(one, sgd(one), range(3))
    two = copy.deepcopy(one)
    assert two[1].layer is two[0] and two[1].layer is not one[0]
    before = copy.deepcopy(one.state_dict())
    train(two, sgd(two), range(3, 6))
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.state_dict().items())
    train(one, sgd(one), range(3, 6))
    assert torch.equal(parameters_to_vector(one.parameters()), parameters_to_vector(two.parameters()))


def test_it_adds_no_parameter_and_learns():
    module = convert_cross_iteration_batch_norm(network(), window=4, burn_in=5)
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in network().named_parameters()]
    optimizer, x = sgd(module), batches((3, 1, 8, 8), 1, dtype=torch.float32)[0]
    for _ in range(60):
        optimizer.zero_grad()
        loss = functional.cross_entropy(module(x), torch.arange(3))
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_passes_without_gradients_use_the_batch_alone_and_are_not_stored():
    layer, norm, shape = made("conv2d", window=3)
    twin, data = plain(norm), batches(shape, 3)
    norm(layer(data[0]))
    twin(layer(data[0]))
    with torch.no_grad():
        assert torch.allclose(norm(layer(data[1])), twin(layer(data[1])))
    assert norm.stored == norm.batches == 1
    norm(layer(data[2]))
    assert norm.stored == 2


def test_a_frozen_layer_needs_no_correction():
    layer, norm, shape = made("conv2d", window=3)
    layer.requires_grad_(False)
    twin, data = plain(norm), batches(shape, 3)
    for x in data:
        outputs = norm(layer(x))
    union = torch.cat(list(data.flip(0)))
    assert torch.allclose(outputs, twin(layer(union))[: len(x)], rtol=1e-12, atol=1e-12)


def test_half_precision_has_its_history_in_single():
    layer, norm, shape = made("conv2d", dtype=torch.bfloat16, window=3)
    for x in batches(shape, 3, torch.bfloat16):
        outputs = norm(layer(x))
    assert outputs.dtype == torch.bfloat16 and norm.past_mean.dtype == torch.float32 and outputs.isfinite().all()


def test_it_runs_under_autocast():
    layer, norm, shape = made("conv2d", dtype=torch.float32, window=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x in batches(shape, 3, torch.float32):
            outputs = norm(layer(x))
    outputs.float().sum().backward()
    assert outputs.dtype == torch.bfloat16 and layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("second_moment", ORDERS)
def test_all_tensors_are_on_the_device_of_the_layer(second_moment):
    norm = CrossIterationBatchNorm2d(nn.Conv2d(2, 3, 3, device="meta"), second_moment=second_moment)
    assert all(tensor.is_meta for tensor in (*norm.parameters(), *norm.buffers()))


# --- conversion ---


def test_a_converted_module_has_the_same_names_and_the_same_eval_mode():
    module = network()
    train(module, sgd(module), range(4))
    before = copy.deepcopy(module.state_dict())
    converted = convert_cross_iteration_batch_norm(module, window=4)
    assert [type(converted[k]) for k in (1, 4, 8)] == [
        CrossIterationBatchNorm2d, CrossIterationBatchNorm2d, CrossIterationBatchNorm1d
    ]  # fmt: skip
    x = batches((3, 1, 8, 8), 1, dtype=torch.float32)[0]
    assert set(before) < set(converted.state_dict())
    train(converted, sgd(converted), range(4, 6))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    converted = convert_cross_iteration_batch_norm(module.eval(), window=4)
    assert torch.equal(converted(x), module(x))


class Residual(nn.Module):
    """Two convolutions in a branch, one in the shortcut, and a batch norm behind the addition."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.shortcut = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.after = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.after(self.branch(x) + self.shortcut(x))


@pytest.mark.parametrize("example", [None, torch.randn(2, 1, 5, 5)], ids=["traced", "run"])
def test_batch_norms_that_no_layer_precedes_stay(example):
    converted = convert_cross_iteration_batch_norm(Residual(), example=example)
    assert isinstance(converted.branch[1], CrossIterationBatchNorm2d) and type(converted.after) is nn.BatchNorm2d
    assert converted.shortcut[1].layer is converted.shortcut[0]
    converted(torch.randn(2, 1, 5, 5)).sum().backward()


# --- errors ---


def test_a_module_without_batch_norm_is_refused():
    with pytest.raises(ValueError, match="nothing to replace"):
        convert_cross_iteration_batch_norm(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.BatchNorm1d(3)))


@pytest.mark.parametrize("second_moment", ORDERS)
def test_an_input_that_the_layer_did_not_compute_is_refused(second_moment):
    norm = CrossIterationBatchNorm1d(nn.Linear(3, 4), second_moment=second_moment)
    with pytest.raises(ValueError, match="directly behind that layer"):
        norm(nn.Linear(3, 4)(torch.randn(5, 3)))


@pytest.mark.parametrize(
    ("kind", "layer", "settings", "error", "words"),
    [
        (CrossIterationBatchNorm2d, nn.Linear(2, 3), {}, TypeError, "layer must be a Conv2d"),
        (CrossIterationBatchNorm1d, nn.Conv2d(2, 3, 3), {}, TypeError, "Linear or Conv1d"),
        (CrossIterationBatchNorm1d, nn.Linear(2, 3), {"window": 0}, ValueError, "window must be 1 or more"),
        (CrossIterationBatchNorm1d, nn.Linear(2, 3), {"burn_in": -1}, ValueError, "burn_in 0 or more"),
        (CrossIterationBatchNorm1d, nn.Linear(2, 3), {"second_moment": "square"}, ValueError, "'linear' or 'exact'"),
        (
            CrossIterationBatchNorm2d, nn.Conv2d(2, 3, 3, padding="same"), {"second_moment": "exact"}, ValueError,
            "padded by zeros",
        ),
    ],
)  # fmt: skip
def test_other_layers_and_settings_are_refused(kind, layer, settings, error, words):
    with pytest.raises(error, match=words):
        kind(layer, **settings)


@pytest.mark.parametrize(("shape", "words"), [((1, 4), "more than 1 value"), ((2, 4, 1, 1), "expected 2D or 3D")])
def test_single_values_and_wrong_shapes_are_refused(shape, words):
    layer = nn.Linear(3, 4)
    norm = CrossIterationBatchNorm1d(layer)
    with pytest.raises(ValueError, match=words):
        norm(layer(torch.randn(2, 3))[:1] if shape == (1, 4) else torch.zeros(shape))
