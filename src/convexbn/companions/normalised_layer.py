"""Layers whose outputs go into a batch norm and nowhere else: their weights are scale-invariant.

They are found by following the forward, not the order of definition: by ``torch.fx`` without data or, for a forward
that ``torch.fx`` cannot trace, through the autograd graph of a run on an example.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm

#: Layers with one filter for each output channel, first in the shape of their weight.
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class NormalisedLayer:
    """Names of a Linear or convolution and of the batch norm behind it."""

    layer: str
    batch_norm: str


class _Trace(NamedTuple):
    """Candidate pairs, one for each call, and how often each layer, batch norm and weight is used."""

    pairs: list[NormalisedLayer]
    calls: Counter[str]
    uses: Counter[int]


def normalised_layers(module: nn.Module, example: Any = None) -> list[NormalisedLayer]:
    """Find the Linear and convolution layers that a batch norm follows directly, in the order of the forward.

    Only weights that are certainly scale-invariant count. Left out are layers with something between (an activation, an
    addition) or whose outputs are used a second time, layers and batch norms that are called several times, and weights
    that are shared. The module is not changed: a copy is run.

    Parameters
    ----------
    module : torch.nn.Module
        In any mode, on any device.
    example : Tensor or tuple of Tensor, optional
        Inputs of the module, two rows or more, on which its forward is run. Needed if ``torch.fx`` cannot trace the
        forward, for instance because it branches on its data.

    Raises
    ------
    TypeError, ValueError
        If the forward cannot be traced without an example, or does not run on it.

    Examples
    --------
    >>> module = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    >>> normalised_layers(module)
    [NormalisedLayer(layer='0', batch_norm='1')]
    """
    copied: Any = copy.deepcopy(module).train()
    pairs, calls, uses = _symbolic_trace(copied) if example is None else _run_trace(copied, example)
    once = [pair for pair in pairs if calls[pair.layer] == calls[pair.batch_norm] == 1]
    return [pair for pair in once if uses[id(copied.get_submodule(pair.layer).weight)] == 1]


class _Tracer(fx.Tracer):
    """Tracer that keeps layers and batch norms of every class whole, those of this package too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*_LAYERS, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)


def _symbolic_trace(module: nn.Module) -> _Trace:
    try:
        graph = _Tracer().trace(module)
    except Exception as error:  # a forward can raise anything
        reason = str(error).partition("\n")[0]
        raise TypeError(
            f"the forward of the {type(module).__name__} cannot be traced without data ({reason}): give an example, a "
            "batch of its inputs."
        ) from error
    names = dict(module.named_modules())
    called = [(node, names[str(node.target)]) for node in graph.nodes if node.op == "call_module"]
    pairs = [
        NormalisedLayer(str(node.target), str(following.target))
        for node, layer in called
        if isinstance(layer, _LAYERS) and len(node.users) == 1
        for following in node.users
        if following.op == "call_module" and isinstance(names[str(following.target)], _BatchNorm)
    ]
    uses = Counter(id(parameter) for _, layer in called for parameter in layer.parameters())
    parameters = dict(module.named_parameters(remove_duplicate=False))
    read = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    uses.update(id(parameters[name]) for name in read if name in parameters)
    return _Trace(pairs, Counter(str(node.target) for node, _ in called), uses)


def _run_trace(module: nn.Module, example: Any) -> _Trace:
    module.requires_grad_()
    made: dict[Node, str] = {}
    normalised: list[tuple[str, Any, Any]] = []
    calls: Counter[str] = Counter()

    def watch(name: str, layer: nn.Module, inputs: Any, outputs: torch.Tensor) -> None:
        calls[name] += 1
        if isinstance(layer, _BatchNorm):
            normalised.append((name, inputs[0].grad_fn, outputs.grad_fn))
        elif outputs.grad_fn is not None:
            made[outputs.grad_fn] = name

    for name, layer in module.named_modules():
        if isinstance(layer, (*_LAYERS, _BatchNorm)):
            layer.register_forward_hook(partial(watch, name))
    try:
        with torch.enable_grad(), torch.random.fork_rng():
            outputs = module(*(example if isinstance(example, tuple) else (example,)))
    except Exception as error:  # a forward can raise anything
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the {type(module).__name__} does not run on the example ({reason}): give a batch as it takes it."
        ) from error
    users = _users(outputs)
    pairs = [
        NormalisedLayer(made[source], name)
        for name, source, result in normalised
        if source in made and users[source] == [result]
    ]
    uses = Counter({id(node.variable): len(by) for node, by in users.items() if hasattr(node, "variable")})
    return _Trace(pairs, calls, uses)


def _users(outputs: Any) -> dict[Node, list[Node]]:
    """Nodes of the autograd graph of some outputs, each with the nodes that use its result."""
    users: dict[Node, list[Node]] = {root: [] for root in _roots(outputs)}
    todo = list(users)
    while todo:
        node = todo.pop()
        for source, _ in node.next_functions:
            if source is not None:
                if source not in users:
                    users[source] = []
                    todo.append(source)
                users[source].append(node)
    return users


def _roots(outputs: Any) -> Iterator[Node]:
    """Gradient functions of a tensor or of a structure of tensors."""
    if isinstance(outputs, torch.Tensor) and outputs.grad_fn is not None:
        yield outputs.grad_fn
    elif isinstance(outputs, dict | list | tuple):
        for part in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from _roots(part)
