"""Which layers a batch norm follows directly: by torch.fx, and by the autograd graph of an example."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from convexbn.companions.normalised_layer import normalised_layers

torch.set_num_threads(1)


class Branching(nn.Module):
    """Its forward looks at its data, which torch.fx cannot follow."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x if x.sum() > -1e9 else -x)


class Block(nn.Module):
    """A residual block; ``after`` puts the second batch norm behind the addition."""

    def __init__(self, after=False, reads_twice=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.after, self.reads_twice = after, reads_twice

    def forward(self, x):
        y = self.conv1(x)
        z = functional.relu_(self.bn1(y))
        if self.reads_twice:
            z = z + y
        z = self.conv2(z)
        return torch.relu(self.bn2(z + x) if self.after else self.bn2(z) + x)


class Shared(nn.Module):
    """One weight in two places: called twice, or read by a function."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm1, self.norm2 = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.how = how
        if how == "tied":
            self.second.weight = self.first.weight

    def forward(self, x):
        x = self.norm1(self.first(x))
        if self.how == "function":
            return functional.linear(x, self.first.weight)
        if self.how == "same batch norm":
            return self.norm1(self.second(x))
        if self.how == "tied":
            return self.second(x)
        return self.norm2(self.first(x))


def chain():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4),
        nn.Flatten(), nn.Linear(16, 5), nn.Dropout(0.5), nn.BatchNorm1d(5), nn.Linear(5, 3, bias=False),
        nn.BatchNorm1d(3), nn.Linear(3, 2),
    )  # fmt: skip


IMAGES, ROWS = torch.randn(2, 3, 6, 6), torch.randn(5, 4)
CASES = {
    "chain": (chain, IMAGES, [("0", "1"), ("10", "11")]),
    "residual": (Block, IMAGES, [("conv1", "bn1"), ("conv2", "bn2")]),
    "batch norm behind the addition": (lambda: Block(after=True), IMAGES, [("conv1", "bn1")]),
    "output read twice": (lambda: Block(reads_twice=True), IMAGES, [("conv2", "bn2")]),
    "layer called twice": (lambda: Shared("layer"), ROWS, []),
    "weight read by a function": (lambda: Shared("function"), ROWS, []),
    "batch norm called twice": (lambda: Shared("same batch norm"), ROWS, []),
    "tied weights": (lambda: Shared("tied"), ROWS, []),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("by_example", [False, True])
def test_layers_that_a_batch_norm_follows_directly(name, by_example):
    make, example, expected = CASES[name]
    found = normalised_layers(make(), example if by_example else None)
    assert [(pair.layer, pair.batch_norm) for pair in found] == expected


def test_a_forward_that_cannot_be_traced_needs_an_example():
    module = Branching(Block())
    with pytest.raises(TypeError, match="give an example"):
        normalised_layers(module)
    assert [pair.layer for pair in normalised_layers(module, IMAGES)] == ["inner.conv1", "inner.conv2"]
    assert len(normalised_layers(module, (IMAGES,))) == 2
    with pytest.raises(ValueError, match="does not run on the example"):
        normalised_layers(module, ROWS)


def test_frozen_layers_are_found_and_outputs_may_be_structures():
    class Several(Block):
        def forward(self, x):
            return {"out": [super().forward(x)], "none": None}

    module = Several().requires_grad_(False)
    with torch.no_grad():
        assert len(normalised_layers(module, IMAGES)) == 2


@pytest.mark.parametrize("example", [None, IMAGES], ids=["traced", "run"])
def test_the_module_and_the_random_state_are_left_alone(example):
    module = nn.Sequential(nn.Dropout(0.5), chain()).eval()
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    normalised_layers(module, example)
    assert torch.equal(torch.get_rng_state(), state) and not any(layer.training for layer in module.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())
    assert not any(layer._forward_hooks for layer in module.modules())
