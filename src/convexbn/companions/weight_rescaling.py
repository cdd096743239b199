"""Weight rescaling: the norms of scale-invariant weights are reset after each step of an optimiser.

A weight in front of a batch norm can be scaled without changing the function. So its gradient is orthogonal to it, its
norm can only grow under gradient steps, and the effective learning rate is that of the optimiser over the squared norm.
Weight decay acts on such weights by that rate alone. Rescaling fixes the rate instead (Liu, Cui, Wan, Mao, Chan,
arXiv 2102.03497).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from convexbn.companions.normalised_layer import NormalisedLayer, normalised_layers


class WeightRescaling:
    """Rescales the weights in front of batch norms of a module, at once and after every ``every`` steps.

    It is a hook of the optimiser: the training loop does not change. The running statistics of the batch norms are
    rescaled with the weights, so that eval mode keeps its function too (up to ``eps``, as in train mode). A filter of
    zeros stays.

    Parameters
    ----------
    module : torch.nn.Module
        ``normalised_layers`` finds its scale-invariant weights. Those that the optimiser holds are rescaled: the
        attribute ``layers`` lists them.
    optimizer : torch.optim.Optimizer
        Weight decay on these weights loses its meaning and may be 0. Momentum buffers and Adam's averages stay as they
        are: the next step adds them to weights whose length has changed by a factor close to 1.
    granularity : {"filter", "layer"}
        Whether each filter (row of a Linear, output channel of a convolution) gets the norm, or the whole weight. A
        layer of norm 1 raises the effective learning rate of SGD by the number of its filters: lower the rate, or keep
        the initial norms.
    norm : float or "initial"
        Norm to set, by default 1, or the present norm of each filter or layer.
    every : int, default=1
        Steps from one rescaling to the next: the number of batches, for once an epoch.
    example : Tensor or tuple of Tensor, optional
        As for ``normalised_layers``.

    Raises
    ------
    TypeError, ValueError
        As ``normalised_layers``; for other settings; if the optimiser holds no scale-invariant weight.

    Examples
    --------
    >>> module = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    >>> optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    >>> rescaling = WeightRescaling(module, optimizer)
    >>> module(torch.randn(16, 3)).square().mean().backward()
    >>> optimizer.step()
    >>> bool((module[0].weight.norm(dim=1) - 1).abs().max() < 1e-6)
    True
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, *, granularity: str = "filter",
        norm: float | str = 1.0, every: int = 1, example: Any = None,
    ) -> None:  # fmt: skip
        if granularity not in ("filter", "layer"):
            raise ValueError(f"granularity must be 'filter' or 'layer', got {granularity!r}.")
        if norm != "initial" and (isinstance(norm, str) or not 0 < norm < float("inf")):
            raise ValueError(f"norm must be positive or 'initial', got {norm!r}.")
        if every < 1:
            raise ValueError(f"every must be 1 step or more, got {every}.")
        self.granularity, self.every, self.steps = granularity, every, 0
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._modules = dict(module.named_modules())
        self.layers: list[NormalisedLayer] = [
            pair for pair in normalised_layers(module, example) if id(self._modules[pair.layer].weight) in held
        ]
        if not self.layers:
            raise ValueError("no weight of the optimiser is followed directly by a batch norm: nothing to rescale.")
        norms = {pair.layer: self._norms(pair) for pair in self.layers}
        self._targets = {k: old if isinstance(norm, str) else torch.full_like(old, norm) for k, old in norms.items()}
        self._handle = optimizer.register_step_post_hook(self._after_step)
        self.rescale()

    @torch.no_grad()
    def rescale(self) -> None:
        """Set the norms now, whatever the number of steps."""
        for pair in self.layers:
            layer, batch_norm, norms = self._modules[pair.layer], self._modules[pair.batch_norm], self._norms(pair)
            factors = torch.where(norms > 0, self._targets[pair.layer].to(norms.device) / norms, torch.ones_like(norms))
            layer.weight.mul_(factors.reshape(-1, *[1] * (layer.weight.ndim - 1)))
            if batch_norm.running_mean is not None:
                bias = 0 if layer.bias is None else layer.bias
                batch_norm.running_mean.sub_(bias).mul_(factors).add_(bias)
                batch_norm.running_var.mul_(factors.square())

    def remove(self) -> None:
        """Take the hook off the optimiser; the weights stay as they are."""
        self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Steps so far and the norms to set, for a checkpoint beside the optimiser's."""
        return {"steps": self.steps, "targets": {name: target.clone() for name, target in self._targets.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint; raise ``ValueError`` if it belongs to other layers."""
        if set(state["targets"]) != set(self._targets):
            raise ValueError(f"the state is of layers {sorted(state['targets'])}, not of {sorted(self._targets)}.")
        self.steps = int(state["steps"])
        for name, target in state["targets"].items():
            self._targets[name].copy_(target)

    def _after_step(self, *_: Any) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            self.rescale()

    def _norms(self, pair: NormalisedLayer) -> torch.Tensor:
        """Norms of the filters (C,), or that of the layer (1,)."""
        weight = self._modules[pair.layer].weight.detach()
        return weight.flatten(1 if self.granularity == "filter" else 0).norm(dim=-1).reshape(-1)
