"""Runs of a copy: the module, its buffers and gradients, its mode and the global random state stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

#: A loss, ``loss(outputs, y)``: a module such as ``nn.CrossEntropyLoss()`` or a function.
Loss = Callable[[Any, Any], torch.Tensor]


@contextmanager
def copied(module: nn.Module, training: bool) -> Iterator[Any]:
    """Context of a copy in train or eval mode, without gradients, that may be run, stepped and hooked.

    Random numbers, of dropout for example, start from the present state, which is restored.
    """
    found = copy.deepcopy(module).train(training)
    for parameter in found.parameters():
        parameter.grad = None
    devices = {parameter.device for parameter in found.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(sorted(devices, key=str)), torch.enable_grad():
        yield found
