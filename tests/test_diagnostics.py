"""Diagnostics of torch modules: each against its definition by loops, hand-made cases, or a law; nothing is changed."""

import copy
from math import comb

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional

from convexbn.companions import diagnostics
from convexbn.companions.diagnostics import FussCatalan, GradientNoise

torch.set_num_threads(1)
LOSS = nn.CrossEntropyLoss()


def network(batch_norm=True, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 2)]
    layers += [nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 3)]
    kept = [layer for layer in layers if batch_norm or not isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    return nn.Sequential(*kept).to(dtype)


def batch(n=12, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 5, 5, generator=generator, dtype=dtype), torch.randint(3, (n,), generator=generator)


X, Y = batch()

MEASURES = {
    "moments": lambda module: diagnostics.channel_moments(module, X),
    "step": lambda module: diagnostics.gradient_step(module, X, Y, LOSS, 0.1),
    "losses": lambda module: diagnostics.relative_losses(module, X, Y, LOSS, [0.1, 1]),
    "kurtosis": lambda module: diagnostics.gradient_kurtosis(module, X, Y, LOSS),
    "agreement": lambda module: diagnostics.sign_agreement(module, X, Y, LOSS),
    "noise": lambda module: diagnostics.gradient_noise(module, X, Y, LOSS),
    "sampled": lambda module: diagnostics.sampled_noise(module, X, Y, LOSS, batch_size=4, draws=2),
}


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_changed(name, training):
    module = nn.Sequential(*network(), nn.Dropout(0.3)).train(training)
    module[1].eval()  # a mode of its own
    LOSS(module(X), Y).backward()
    hooks = [dict(layer._forward_hooks) for layer in module.modules()]
    gradients = [parameter.grad.clone() for parameter in module.parameters()]
    before, modes = copy.deepcopy(module.state_dict()), [layer.training for layer in module.modules()]
    state = torch.get_rng_state()
    with torch.no_grad():
        first = MEASURES[name](module)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert [layer.training for layer in module.modules()] == modes
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), gradients, strict=True))
    assert hooks == [dict(layer._forward_hooks) for layer in module.modules()]
    if isinstance(first, dict):
        assert first == MEASURES[name](module)  # dropout too is that of the same random state


# --- channel moments ---


def test_moments_are_those_of_each_layer():
    module = network()
    found = diagnostics.channel_moments(module, X)
    assert [moments.layer for moments in found] == [str(k) for k in range(10)]
    assert [moments.kind for moments in found[:3]] == ["Conv2d", "BatchNorm2d", "ReLU"]
    out = X
    for moments, layer in zip(found, copy.deepcopy(module), strict=True):
        out = layer(out.clone())
        channels = out.detach().transpose(0, 1).flatten(1).numpy()
        assert moments.mean == pytest.approx(channels.mean(axis=1), abs=1e-13)
        assert moments.std == pytest.approx(channels.std(axis=1), abs=1e-13)
    assert found[1].mean == pytest.approx(0, abs=1e-12) and found[1].std == pytest.approx(1, abs=1e-3)


def test_moments_of_eval_mode_are_those_of_the_stored_statistics():
    module = network()
    module[1].running_var.fill_(4)
    found = diagnostics.channel_moments(module, X, training=False)
    assert found[1].std == pytest.approx(found[0].std / 2, rel=1e-5)


def test_residual_networks_grow_with_depth_unless_normalised():
    """Each He-initialised branch doubles the variance of its sum: exponential without batch norm, 1 with it."""

    class Residual(nn.Module):
        def __init__(self, width, batch_norm):
            super().__init__()
            self.linear = nn.Linear(width, width)
            nn.init.kaiming_normal_(self.linear.weight)
            self.norm = nn.BatchNorm1d(width) if batch_norm else nn.Identity()

        def forward(self, x):
            return x + self.norm(self.linear(torch.relu(x)))

    def growth(batch_norm):
        torch.manual_seed(0)
        module = nn.Sequential(*[Residual(64, batch_norm) for _ in range(12)])
        found = diagnostics.channel_moments(module, torch.randn(128, 64))
        branch = [moments.std.mean() for moments in found if moments.layer.endswith("norm")]
        return branch[-1] / branch[0]

    assert growth(False) > 20 and growth(True) == pytest.approx(1, abs=1e-3)


# --- the loss along the gradient ---


def test_a_step_moves_all_parameters_against_the_gradient():
    module = network()
    stepped = diagnostics.gradient_step(module, X, Y, LOSS, 0.1)
    twin = copy.deepcopy(module)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    LOSS(twin(X), Y).backward()
    optimizer.step()
    assert all(torch.allclose(a, b) for a, b in zip(stepped.parameters(), twin.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(stepped.buffers(), module.buffers(), strict=True))
    frozen = network()
    frozen[0].requires_grad_(False)
    stepped = diagnostics.gradient_step(frozen, X, Y, LOSS, 0.1)
    assert torch.equal(stepped[0].weight, frozen[0].weight) and not torch.equal(stepped[3].weight, frozen[3].weight)


@pytest.mark.parametrize("training", [True, False])
def test_relative_losses_are_those_after_the_steps(training):
    module, steps = network().train(training), [0, 1e-3, 0.1, 3.0]
    with torch.no_grad():
        start = LOSS(copy.deepcopy(module)(X), Y)
        expected = [
            LOSS(diagnostics.gradient_step(module, X, Y, LOSS, step, training=training)(X), Y) / start for step in steps
        ]
    found = diagnostics.relative_losses(module, X, Y, LOSS, steps, training=training)
    assert found == pytest.approx([float(value) for value in expected], rel=1e-12)
    assert found[0] == 1 and found[1] < 1


def test_a_loss_that_overflows_is_infinite_and_one_of_zero_is_refused():
    module, rows = nn.Linear(2, 1), torch.ones(3, 2)
    assert diagnostics.relative_losses(module, rows, torch.ones(3, 1), nn.MSELoss(), [1e30])[0] == np.inf
    with pytest.raises(ValueError, match="positive and finite"):
        diagnostics.relative_losses(module, rows, module(rows).detach(), nn.MSELoss(), [1.0])


# --- gradients ---


def test_kurtosis_is_that_of_the_weight_gradients():
    module = network()
    found = diagnostics.gradient_kurtosis(module, X, Y, LOSS)
    twin = copy.deepcopy(module)
    LOSS(twin(X), Y).backward()
    assert list(found) == ["0", "3", "6", "9"]
    for name, value in found.items():
        entries = twin[int(name)].weight.grad.flatten().numpy()
        entries = entries - entries.mean()
        assert value == pytest.approx((entries**4).mean() / (entries**2).mean() ** 2)


def test_kurtosis_of_normal_and_of_heavy_tailed_gradients():
    """The gradient of sum(w * z) is z."""
    draws = np.random.default_rng(0)
    for values, expected in ((draws.standard_normal(20_000), 3), (draws.standard_t(3, 20_000), None)):
        z = torch.from_numpy(values)[None]
        module = nn.Sequential(nn.Linear(20_000, 1, bias=False)).double()
        (found,) = diagnostics.gradient_kurtosis(module, z, None, lambda outputs, _: outputs.sum()).values()
        assert found == pytest.approx(stats.kurtosis(values, fisher=False))
        assert found == pytest.approx(expected, abs=0.2) if expected else found > 6


@pytest.mark.parametrize("kind", [nn.ReLU, nn.Sigmoid])
def test_sign_agreement_is_that_of_the_sum_over_samples_and_positions(kind):
    """The definition, by loops over batch, positions and kernel."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 3, (3, 2), stride=2, padding=1), kind(), nn.Flatten(), nn.Linear(27, 3)
    ).double()
    if kind is nn.ReLU:
        module[1].inplace = True
    found = diagnostics.sign_agreement(module, X, Y, LOSS)
    out = module[0](X).detach().requires_grad_()
    hidden = torch.relu(out) if kind is nn.ReLU else torch.sigmoid(out)
    LOSS(module[3](hidden.flatten(1)), Y).backward()
    padded, d = functional.pad(X, (1, 1, 1, 1)), {}
    for b, o, x, y in np.ndindex(*out.shape):
        patch = padded[b, :, 2 * x : 2 * x + 3, 2 * y : 2 * y + 2]
        for i, u, v in np.ndindex(*patch.shape):
            d.setdefault((o, i, u, v), []).append(float(out.grad[b, o, x, y] * patch[i, u, v]))
    absolute = np.mean([np.abs(values).sum() for values in d.values()])
    summed = np.mean([abs(np.sum(values)) for values in d.values()])
    assert found["0"].absolute == pytest.approx(absolute) and found["0"].summed == pytest.approx(summed)
    assert found["0"].ratio == pytest.approx(absolute / summed) and found["0"].ratio > 1
    assert list(found) == ["0", "3"]


@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_sum_of_the_summands_is_the_gradient(batch_norm):
    module = network(batch_norm)
    twin = copy.deepcopy(module)
    LOSS(twin(X), Y).backward()
    for name, agreement in diagnostics.sign_agreement(module, X, Y, LOSS).items():
        assert agreement.summed == pytest.approx(float(twin[int(name)].weight.grad.abs().mean()))
        assert agreement.absolute >= agreement.summed


def test_a_layer_that_is_called_twice_has_the_summands_of_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3, bias=False)

        def forward(self, x):
            return self.layer(x) - self.layer(x)

    (found,) = diagnostics.sign_agreement(Twice(), torch.ones(2, 3), None, lambda out, _: out.sum()).values()
    assert found.absolute == 4 and found.summed == 0 and found.ratio == np.inf


def test_layers_that_the_loss_does_not_reach_are_left_out():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[0].requires_grad_(False)
    for measure in (diagnostics.sign_agreement, diagnostics.gradient_kurtosis):
        assert list(measure(module, torch.ones(2, 3), None, lambda outputs, _: outputs.sum())) == ["1"]


# --- noise ---


def gradient(module, rows, *, training):
    twin = copy.deepcopy(module).train(training)
    return torch.cat([g.flatten() for g in torch.autograd.grad(LOSS(twin(X[rows]), Y[rows]), list(twin.parameters()))])


def sample_gradients(module):
    return torch.stack([gradient(module, [k], training=False) for k in range(len(X))])


@pytest.mark.parametrize("chunk_size", [5, 64])
def test_the_variance_is_that_of_the_sample_gradients(chunk_size):
    module = network()
    found, gradients = diagnostics.gradient_noise(module, X, Y, LOSS, chunk_size=chunk_size), sample_gradients(module)
    expected = (gradients - gradients.mean(dim=0)).square().sum(dim=1).mean()
    assert found.variance == pytest.approx(float(expected)) and found.n_samples == len(X)


def test_noise_of_every_batch_without_replacement_is_as_expected():
    """All batches of two and of five of six samples: no sampling error."""
    from itertools import combinations

    gradients = sample_gradients(network())[:6]
    noise = GradientNoise(float((gradients - gradients.mean(dim=0)).square().sum(dim=1).mean()), 6)
    for size in (1, 2, 5, 6):
        batches = torch.stack([gradients[list(rows)].mean(dim=0) for rows in combinations(range(6), size)])
        measured = float((0.3 * (batches - gradients.mean(dim=0))).square().sum(dim=1).mean())
        assert measured == pytest.approx(noise.expected(0.3, size), abs=1e-15)
        assert measured <= noise.bound(0.3, size) * (1 + 1e-12)


def test_noise_of_every_batch_with_replacement_is_the_bound():
    gradients = sample_gradients(network())[:5]
    noise = GradientNoise(float((gradients - gradients.mean(dim=0)).square().sum(dim=1).mean()), 5)
    pairs = torch.stack([(gradients[i] + gradients[j]) / 2 for i, j in np.ndindex(5, 5)])
    measured = float((pairs - gradients.mean(dim=0)).square().sum(dim=1).mean())
    assert measured == pytest.approx(noise.bound(1.0, 2))
    assert noise.bound(0.5, 4) == pytest.approx(noise.bound(1.0, 1) / 16)  # the rate counts twice


@pytest.mark.parametrize("batch_size", [2, 6, 11])
def test_sampled_noise_is_the_expected_one_in_eval_mode(batch_size):
    module = network()
    expected = diagnostics.gradient_noise(module, X, Y, LOSS).expected(1.0, batch_size)
    found = diagnostics.sampled_noise(module, X, Y, LOSS, batch_size=batch_size, draws=200, training=False)
    assert found == pytest.approx(expected, rel=0.2)


def test_sampled_noise_in_train_mode_is_the_variance_about_the_mean_of_the_draws():
    module = network()
    found = diagnostics.sampled_noise(module, X, Y, LOSS, batch_size=4, draws=5, random_state=3)
    generator = torch.Generator().manual_seed(3)
    draws = [torch.randperm(len(X), generator=generator)[:4] for _ in range(5)]
    gradients = [gradient(module, rows, training=True) for rows in draws]
    assert found == pytest.approx(float(torch.stack(gradients).var(dim=0, correction=1).sum()))
    assert diagnostics.sampled_noise(module, X, Y, LOSS, batch_size=len(X), draws=3) == pytest.approx(0, abs=1e-20)


def test_a_loss_that_is_not_the_mean_has_no_bound():
    for loss in (nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 30]).double())):
        with pytest.raises(ValueError, match="mean over the samples"):
            diagnostics.gradient_noise(network(), X, Y, loss)


@pytest.mark.parametrize("batch_size", [0, 13])
def test_batches_that_there_are_not_are_refused(batch_size):
    with pytest.raises(ValueError, match="batch_size must be 1 to 12"):
        diagnostics.sampled_noise(network(), X, Y, LOSS, batch_size=batch_size)
    with pytest.raises(ValueError, match="draws must be 2"):
        diagnostics.sampled_noise(network(), X, Y, LOSS, batch_size=2, draws=1)


# --- products of Gaussian matrices ---


@pytest.mark.parametrize("factors", [1, 2, 3, 5, 10])
def test_density_has_the_moments_of_fuss_and_catalan(factors):
    """Moments by quadrature in x, after x = edge * t^(2 (M + 1)): the density is like x^(-M / (M + 1)) at zero."""
    law = FussCatalan(factors)
    t, weights = np.polynomial.legendre.leggauss(400)
    t, power = (t + 1) / 2, 2 * (factors + 1)
    x = law.edge * t**power
    mass = law.density(x) * law.edge * power * t ** (power - 1) * weights / 2
    for order in range(5):
        assert (mass * x**order).sum() == pytest.approx(law.moment(order), rel=2e-4)
    assert law.moment(0) == law.moment(1) == 1


def test_one_factor_is_the_law_of_marchenko_and_pastur():
    x = np.linspace(0.01, 3.99, 50)
    assert FussCatalan(1).density(x) == pytest.approx(np.sqrt((4 - x) / x) / (2 * np.pi), rel=1e-9)
    assert [FussCatalan(1).moment(p) for p in range(6)] == [comb(2 * p, p) // (p + 1) for p in range(6)]


def test_outside_of_the_support_there_is_no_density():
    law = FussCatalan(2)
    assert law.density([-1.0, law.edge, law.edge + 1]).tolist() == [0, 0, 0] and law.density(0.0) == np.inf
    with pytest.raises(ValueError, match="factors must be 1 or more"):
        FussCatalan(0)


@pytest.mark.parametrize("factors", [1, 2, 4])
def test_the_spectrum_of_a_product_tends_to_the_law(factors):
    law = FussCatalan(factors)
    values = np.concatenate([diagnostics.product_spectrum(factors, 200, seed) for seed in range(4)])
    assert values.mean() == pytest.approx(1, abs=0.02) and (values**2).mean() == pytest.approx(law.moment(2), rel=0.05)
    assert values.max() == pytest.approx(law.edge, rel=0.1)
    t = (np.arange(4000) + 0.5) / 4000
    grid = law.edge * t ** (2 * (factors + 1))
    cumulative = np.cumsum(law.density(grid) * law.edge * 2 * (factors + 1) * t ** (2 * factors + 1) / 4000)
    distance = np.abs(np.searchsorted(np.sort(values), grid) / len(values) - cumulative).max()
    assert distance < 0.02


def test_more_factors_have_a_worse_condition_and_a_seed_is_a_draw():
    conditions = [float(np.ptp(np.log10(diagnostics.product_spectrum(factors, 100)))) for factors in (1, 2, 3, 5)]
    assert conditions == sorted(conditions) and conditions[-1] > conditions[0] + 3
    assert np.array_equal(diagnostics.product_spectrum(2, 20, 7), diagnostics.product_spectrum(2, 20, 7))
