"""Weight rescaling, and the identities of scale-invariant weights on which it rests."""

import copy

import pytest
import torch
from torch import nn

from convexbn.companions.weight_rescaling import WeightRescaling

torch.set_num_threads(1)


def network(eps=1e-5, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6, eps=eps), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(6, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8, eps=eps), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, 3)).to(dtype)


def batch(dtype=torch.float64, seed=0, n=32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=generator, dtype=dtype), torch.randint(3, (n,), generator=generator)


def step(module, optimizer, seed=0, dtype=torch.float64):
    X, y = batch(dtype, seed)
    optimizer.zero_grad()
    nn.functional.cross_entropy(module(X), y).backward()
    optimizer.step()


def filters(module):
    return [module[place].weight.detach().flatten(1).clone() for place in (0, 4)]


# --- the identities of scale-invariant weights ---


def test_the_gradient_is_orthogonal_to_each_filter():
    module = network(eps=1e-300)
    for place in (0, 4):
        module[place].weight.data *= 3
    step(module, torch.optim.SGD(module.parameters(), lr=0.1))
    for place in (0, 4):
        gradient, weight = module[place].weight.grad.flatten(1), module[place].weight.detach().flatten(1)
        weight = weight + 0.1 * gradient
        cosine = (weight * gradient).sum(1) / weight.norm(dim=1) / gradient.norm(dim=1)
        assert cosine.abs().max() < 1e-12


def test_the_gradient_is_inverse_to_the_length():
    one, three = network(eps=1e-300), network(eps=1e-300)
    three[0].weight.data *= 3
    for module in (one, three):
        step(module, torch.optim.SGD(module.parameters(), lr=0.0))
    assert torch.allclose(one[0].weight.grad, 3 * three[0].weight.grad, rtol=1e-9, atol=1e-14)


def test_a_step_adds_its_square_to_the_squared_norm_of_each_filter():
    """||w + s||^2 = ||w||^2 + ||s||^2 for plain SGD, so that no norm ever falls."""
    module = network(eps=1e-300)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    for t in range(10):
        before = filters(module)
        step(module, optimizer, seed=t)
        for place, old, new in zip((0, 4), before, filters(module), strict=True):
            grown = new.square().sum(1) - old.square().sum(1)
            expected = 0.09 * module[place].weight.grad.flatten(1).square().sum(1)
            assert torch.allclose(grown, expected, rtol=1e-6, atol=1e-13) and (grown > 0).all()


def orthogonal_part(weight, X):
    """Component of each row outside of the span of the centred rows of X."""
    centred = X - X.mean(dim=0)
    basis = torch.linalg.svd(centred, full_matrices=False)[2][: len(X) - 1]
    return weight - weight @ basis.T @ basis


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_the_component_outside_of_the_data_moves_by_weight_decay_alone(weight_decay):
    torch.manual_seed(0)
    X, y = torch.randn(20, 50, dtype=torch.float64), torch.randint(3, (20,))
    module = nn.Sequential(nn.Linear(50, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=weight_decay)
    start = orthogonal_part(module[0].weight.detach(), X)
    moved = module[0].weight.detach().clone()
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(X), y).backward()
        optimizer.step()
    end = orthogonal_part(module[0].weight.detach(), X)
    assert (module[0].weight - moved).norm() > 0.1 and start.norm() > 1
    assert (end - start * (1 - 0.1 * weight_decay) ** 50).abs().max() < 1e-14


# --- rescaling ---


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.LBFGS])
def test_norms_are_set_at_once_and_after_each_step_of_any_optimiser(kind):
    module = network()
    optimizer = kind(module.parameters(), lr=0.1)
    rescaling = WeightRescaling(module, optimizer)
    assert [pair.layer for pair in rescaling.layers] == ["0", "4"]
    for t in range(3):
        assert all(torch.allclose(w.norm(dim=1), torch.ones(len(w)).double(), atol=1e-14) for w in filters(module))
        before = filters(module)[0]
        X, y = batch(seed=t)

        def closure(X=X, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(module(X), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        assert not torch.equal(before, filters(module)[0])


def test_a_layer_has_one_norm_and_keeps_its_proportions():
    module = network()
    before = filters(module)
    WeightRescaling(module, torch.optim.SGD(module.parameters(), lr=0.1), granularity="layer", norm=2.0)
    for old, new in zip(before, filters(module), strict=True):
        assert torch.allclose(new, old * (2 / old.norm()), rtol=1e-14)


@pytest.mark.parametrize("granularity", ["filter", "layer"])
def test_initial_norms_are_kept(granularity):
    module = network()
    before = filters(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    WeightRescaling(module, optimizer, granularity=granularity, norm="initial")
    assert all(torch.allclose(old, new, rtol=1e-14) for old, new in zip(before, filters(module), strict=True))
    step(module, optimizer)
    axis = 1 if granularity == "filter" else (0, 1)
    for old, new in zip(before, filters(module), strict=True):
        assert torch.allclose(old.norm(dim=axis), new.norm(dim=axis), rtol=1e-14) and not torch.allclose(old, new)


@pytest.mark.parametrize("granularity", ["filter", "layer"])
def test_the_function_is_kept_in_both_modes(granularity):
    module = network(eps=1e-300)
    module[0].weight.data *= 5
    for t in range(3):
        module(batch(seed=t)[0])
    X = batch(seed=9)[0]
    stored = module.eval()(X)
    seen = copy.deepcopy(module).train()(X)
    WeightRescaling(module, torch.optim.SGD(module.parameters(), lr=0.1), granularity=granularity)
    assert torch.allclose(module(X), stored, rtol=1e-10, atol=1e-12)
    assert torch.allclose(module.train()(X), seen, rtol=1e-10, atol=1e-12)


def test_it_is_a_constant_effective_rate():
    """Rescaling after each step of SGD is projected descent: the direction moves by lr times the gradient at norm 1."""
    module = network(eps=1e-300)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    WeightRescaling(module, optimizer)
    old = filters(module)[0]
    step(module, optimizer)
    angle = torch.acos((old * filters(module)[0]).sum(1))
    assert torch.allclose(angle.tan(), 0.1 * module[0].weight.grad.flatten(1).norm(dim=1), rtol=1e-6)


def test_every_few_steps_and_the_state_of_a_checkpoint():
    module = network()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    rescaling = WeightRescaling(module, optimizer, every=3)

    def excess():
        return float((filters(module)[0].norm(dim=1) - 1).abs().max())

    found = []
    for t in range(6):
        step(module, optimizer, seed=t)
        found.append(excess() > 1e-6)
    assert found == [True, True, False] * 2
    step(module, optimizer)
    other = WeightRescaling(module, torch.optim.SGD(module.parameters(), lr=1.0), every=3, norm="initial")
    other.load_state_dict(rescaling.state_dict())
    assert other.steps == 7 and torch.equal(other.state_dict()["targets"]["0"], torch.ones(6).double())
    with pytest.raises(ValueError, match="the state is of layers"):
        other.load_state_dict({"steps": 1, "targets": {"7": torch.ones(1)}})


def test_removed_it_leaves_the_weights():
    module = network()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    WeightRescaling(module, optimizer).remove()
    step(module, optimizer)
    assert (filters(module)[0].norm(dim=1) > 1 + 1e-6).all()


def test_a_filter_of_zeros_and_the_last_layer_stay():
    module = network()
    module[0].weight.data[2] = 0
    last = module[-1].weight.detach().clone()
    WeightRescaling(module, torch.optim.SGD(module.parameters(), lr=1.0))
    assert not filters(module)[0][2].any() and filters(module)[0].isfinite().all()
    assert torch.equal(module[-1].weight, last)


def test_momentum_is_left_as_it_is():
    module = network()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)
    WeightRescaling(module, optimizer)
    step(module, optimizer)
    buffer = optimizer.state[module[0].weight]["momentum_buffer"]
    assert torch.equal(buffer, module[0].weight.grad)


def test_weights_of_other_optimisers_are_left_alone():
    module = network()
    rescaling = WeightRescaling(module, torch.optim.SGD(module[4].parameters(), lr=1.0))
    assert [pair.layer for pair in rescaling.layers] == ["4"]
    assert (filters(module)[0].norm(dim=1) - 1).abs().min() > 1e-4
    with pytest.raises(ValueError, match="nothing to rescale"):
        WeightRescaling(module, torch.optim.SGD(module[-1].parameters(), lr=1.0))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"granularity": "channel"}, "'filter' or 'layer'"),
        ({"norm": 0.0}, "norm must be positive"),
        ({"norm": "unit"}, "norm must be positive or 'initial'"),
        ({"every": 0}, "every must be 1 step"),
    ],
)
def test_other_settings_are_refused(settings, words):
    module = network()
    with pytest.raises(ValueError, match=words):
        WeightRescaling(module, torch.optim.SGD(module.parameters(), lr=1.0), **settings)
