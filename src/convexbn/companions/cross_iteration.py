"""Cross-iteration batch norm: statistics over the last mini-batches, corrected for the weights' steps since then.

Yao, Cao, Zheng, Huang, Lin, "Cross-Iteration Batch Normalization", CVPR 2021 (arXiv 2002.05712).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from convexbn.companions.normalised_layer import normalised_layers


class _CrossIterationBatchNorm(_BatchNorm):
    """Base class of both layers. Statistics of a batch are (C,), those of the stored batches (steps, C)."""

    past_mean: torch.Tensor
    past_variance: torch.Tensor
    past_weight: torch.Tensor
    past_patch_mean: torch.Tensor
    past_gradient: torch.Tensor
    past_patch_covariance: torch.Tensor
    mean: torch.Tensor | None = None
    variance: torch.Tensor | None = None
    _input: torch.Tensor | None = None
    _output: torch.Tensor | None = None
    layer: Any
    _layers: tuple[type[nn.Module], ...]

    def __init__(
        self, layer: nn.Module, *, window: int = 8, burn_in: int = 0, second_moment: str = "linear", eps: float = 1e-5,
        momentum: float | None = 0.1, affine: bool = True, track_running_stats: bool = True,
    ) -> None:  # fmt: skip
        self._check(layer, window, burn_in, second_moment)
        weight: Any = layer.weight
        kind = {"device": weight.device, "dtype": weight.dtype}
        super().__init__(len(weight), eps, momentum, affine, track_running_stats, **kind)
        self.window, self.burn_in, self.second_moment = window, burn_in, second_moment
        self.batches = self.stored = 0
        self.__dict__["layer"] = layer  # not as a submodule: its parameters belong to the module that holds it
        self._register_history(weight.detach())
        if second_moment == "exact":
            layer.register_forward_hook(self._keep)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise the outputs of ``layer``; same shape."""
        recording = self.training and torch.is_grad_enabled()
        self.batches += recording
        if recording and self.window > 1 and self.batches > self.burn_in:
            self._check_input_dim(input)  # type: ignore[no-untyped-call]
            return self._normalised_over_window(input)
        self._input = self._output = self.mean = self.variance = None
        return super().forward(input)

    def get_extra_state(self) -> torch.Tensor:
        """Batches seen and steps stored, for the state dict; a tensor, which every checkpoint format can hold."""
        return torch.tensor([self.batches, self.stored])

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Resume from a state dict."""
        self.batches, self.stored = (int(number) for number in state)

    def extra_repr(self) -> str:
        """Settings, as torch prints them."""
        plain = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, window={self.window}, burn_in={self.burn_in}, second_moment={self.second_moment!r}"

    def _normalised_over_window(self, input: torch.Tensor) -> torch.Tensor:
        numbers = input if input.dtype == torch.float64 else input.float()
        variance, mean = torch.var_mean(numbers, [0, *range(2, input.ndim)], correction=0)
        count = numbers.numel() // len(mean)
        if count < 2:
            raise ValueError(f"expected more than 1 value per channel in train mode, got {tuple(input.shape)}.")
        bias = 0 if self.layer.bias is None else self.layer.bias.to(mean.dtype)
        own = mean - bias  # batch norm subtracts the bias again, so the history leaves it out
        with torch.no_grad():
            means, variances = self._compensate()
            self._store(input, own, variance, count)
            self._update_running(mean, variance * (count / (count - 1)))
        means, variances = torch.cat([own[None], means]), torch.cat([variance[None], variances])
        centre = means.mean(dim=0)
        spread = (variances + (means - centre).square()).mean(dim=0)
        self.mean, self.variance = (centre + bias).detach(), spread.detach()
        gain = (spread + self.eps).rsqrt() * (1 if self.weight is None else self.weight)
        offset = (0 if self.bias is None else self.bias) - (centre + bias) * gain
        shape = (1, -1, *[1] * (input.ndim - 2))
        return torch.addcmul(offset.reshape(shape), numbers, gain.reshape(shape)).to(input.dtype)

    def _compensate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Means and variances (steps, C) of the stored batches, as the present weights would give them.

        In the paper's symbols ``mu + <dmu, step>`` and ``max(nu + <dnu, step>, mu^2) - mu^2``, both written about the
        mean: second moments lose digits if the mean is large.
        """
        steps = min(self.stored, self.window - 1)
        step = self._by_group(self.layer.weight.detach()) - self.past_weight[:steps]  # (steps, groups, filters, patch)
        moved = torch.einsum("tgcp,tgp->tgc", step, self.past_patch_mean[:steps]).flatten(1)
        change = (self.past_gradient[:steps] * step).sum(dim=3).flatten(1)
        if self.second_moment == "exact":
            curved = torch.einsum("tgcp,tgpq->tgcq", step, self.past_patch_covariance[:steps])
            change = change + (curved * step).sum(dim=3).flatten(1)
        else:
            change = change - moved.square()
        return self.past_mean[:steps] + moved, (self.past_variance[:steps] + change).clamp(min=0)

    def _store(self, outputs: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
        """Overwrite the oldest batch by the present one."""
        slot = self.stored % (self.window - 1)
        self.past_mean[slot], self.past_variance[slot] = mean, variance
        self.past_weight[slot] = self._by_group(self.layer.weight.detach())
        if self.second_moment == "exact":
            self.past_patch_mean[slot], covariance = self._patch_moments(outputs)
            self.past_patch_covariance[slot] = covariance
            self.past_gradient[slot] = 2 * torch.einsum("gcp,gpq->gcq", self.past_weight[slot], covariance)
        else:
            centred = outputs.detach() - outputs.detach().mean([0, *range(2, outputs.ndim)], keepdim=True)
            root = count**0.5  # divide in two steps: half precision holds neither the sums nor 1 / count
            self.past_patch_mean[slot] = self._derivative(outputs, torch.full_like(centred, 1 / root))[:, 0] / root
            self.past_gradient[slot] = self._derivative(outputs, centred / root) * (2 / root)
        self.stored += 1

    def _derivative(self, outputs: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
        """Derivative by the weight, channel by channel, of ``sum(cotangent * outputs)``; 0 for a frozen weight."""
        weight = self.layer.weight
        if not weight.requires_grad:
            return torch.zeros_like(self._by_group(weight))
        try:
            (derivative,) = torch.autograd.grad(outputs, weight, cotangent, retain_graph=True)
        except RuntimeError as error:
            raise self._misplaced() from error
        return self._by_group(derivative)

    def _keep(self, layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if self.training:
            self._input, self._output = inputs[0].detach(), output

    def _patch_moments(self, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (groups, patch) and covariance (groups, patch, patch) of the input patches."""
        if self._input is None or self._output is not outputs:
            raise self._misplaced()
        patches = self._patches(self._input.to(self.past_mean.dtype))
        self._input = self._output = None
        mean = patches.mean(dim=2)
        centred = patches - mean[:, :, None]
        return mean, centred @ centred.mT / patches.shape[2]

    def _misplaced(self) -> ValueError:
        return ValueError(
            f"the input of this {type(self).__name__} is not the output of its layer {self.layer}: put it directly "
            "behind that layer."
        )

    def _patches(self, inputs: torch.Tensor) -> torch.Tensor:
        """Input patches (groups, patch, N * positions), which the filters multiply."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return inputs.T[None]
        sizes = {name: getattr(layer, name) for name in ("kernel_size", "dilation", "padding", "stride")}
        if isinstance(layer, nn.Conv1d):
            inputs = inputs[:, :, None]
            sizes = {name: (0 if name == "padding" else 1, *size) for name, size in sizes.items()}
        unfolded = functional.unfold(inputs, **sizes)  # (N, groups * patch, positions)
        return unfolded.transpose(0, 1).reshape(layer.groups, -1, len(unfolded) * unfolded.shape[2])

    def _update_running(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Update the running statistics by the present batch and its unbiased variance, as batch norm does."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        for running, now in ((self.running_mean, mean), (self.running_var, variance)):
            running.mul_(1 - share).add_(now.to(running.dtype), alpha=share)

    def _by_group(self, weight: torch.Tensor) -> torch.Tensor:
        """Weight (C, patch...) as (groups, C / groups, patch)."""
        groups = getattr(self.layer, "groups", 1)
        return weight.reshape(groups, len(weight) // groups, -1)

    def _register_history(self, weight: torch.Tensor) -> None:
        C, filters = len(weight), self._by_group(weight).shape
        groups, _, patch = filters
        shapes = {"mean": [C], "variance": [C], "weight": filters, "patch_mean": [groups, patch], "gradient": filters}
        if self.second_moment == "exact":
            shapes["patch_covariance"] = [groups, patch, patch]
        kind: Any = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
        for name, shape in shapes.items():
            self.register_buffer(f"past_{name}", torch.zeros(self.window - 1, *shape, **kind))

    def _check(self, layer: nn.Module, window: int, burn_in: int, second_moment: str) -> None:
        if not isinstance(layer, self._layers):
            kinds = " or ".join(kind.__name__ for kind in self._layers)
            raise TypeError(f"layer must be a {kinds}, whose outputs are normalised, got a {type(layer).__name__}.")
        if window < 1 or burn_in < 0:
            raise ValueError(f"window must be 1 or more and burn_in 0 or more, got {window} and {burn_in}.")
        if second_moment not in ("linear", "exact"):
            raise ValueError(f"second_moment must be 'linear' or 'exact', got {second_moment!r}.")
        zeros = isinstance(layer, nn.Linear) or (layer.padding_mode == "zeros" and not isinstance(layer.padding, str))
        if second_moment == "exact" and not zeros:
            raise ValueError("second_moment='exact' needs a convolution padded by zeros, in numbers: use 'linear'.")


class CrossIterationBatchNorm1d(_CrossIterationBatchNorm, nn.BatchNorm1d):
    """Cross-iteration batch norm behind a Linear (N, C) or a Conv1d (N, C, L); see ``CrossIterationBatchNorm2d``."""

    _layers = (nn.Linear, nn.Conv1d)


class CrossIterationBatchNorm2d(_CrossIterationBatchNorm, nn.BatchNorm2d):
    """Batch norm whose statistics are those of the last ``window`` mini-batches, corrected to first order.

    The statistics of an earlier batch belong to the weights of that time. Their derivative by the weight of the
    normalised layer is stored with them; times the step since then, it corrects them. Steps of earlier layers are
    neglected. Outputs are normalised by means over the window: of the first moments, and of the second moments, each at
    least the square of the first (Yao et al. 2021). Gradients flow through the present batch alone, whose share of the
    statistics is one over the window.

    Put it directly behind its ``layer``, or let ``convert_cross_iteration_batch_norm`` do so.

    Parameters
    ----------
    layer : torch.nn.Conv2d
        The layer whose outputs are normalised. It stays a part of the module that holds it, not of this one.
    window : int, default=8
        Batches in the window, the present one included; 1 is ``BatchNorm2d``.
    burn_in : int, default=0
        Batches in train mode before the window opens and grows from 1. Until then this is ``BatchNorm2d``, as young
        weights move far.
    second_moment : {"linear", "exact"}
        ``"linear"`` is the paper's. It underestimates the second moment, which is quadratic in the weight. ``"exact"``
        also stores the covariance of the input patches, ``patch^2`` numbers a group and batch.
    eps, momentum, affine, track_running_stats
        As in ``torch.nn.BatchNorm2d``. The running statistics are those of single batches, and eval mode is that of
        ``BatchNorm2d``.

    Attributes
    ----------
    batches, stored : int
        Batches seen in train mode, and batches stored since the window opened; in the state dict with the history.
    mean, variance : Tensor (C,) or None
        Statistics over the window that the last forward normalised with; None if it was plain batch norm.

    Raises
    ------
    TypeError, ValueError
        For another layer or setting; in ``forward``, for an input that is not the output of ``layer``.

    Notes
    -----
    For every earlier batch the history stores two tensors of the size of the weight and some smaller ones. Every step
    computes two more weight gradients of the layer. Passes in train mode without gradients (``torch.no_grad``) use the
    batch alone and are not stored. A bias of the layer has no effect, as before batch norm. In data-parallel training
    each process keeps its own history. Small batches may gain, not always: see the study ``cross-iteration-bn``.

    Examples
    --------
    >>> layer = nn.Conv2d(3, 16, 3, bias=False)
    >>> module = nn.Sequential(layer, CrossIterationBatchNorm2d(layer, window=4), nn.ReLU())
    >>> module(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 16, 6, 6])
    """

    _layers = (nn.Conv2d,)


_CONVERTED = {nn.BatchNorm1d: CrossIterationBatchNorm1d, nn.BatchNorm2d: CrossIterationBatchNorm2d}


def convert_cross_iteration_batch_norm(
    module: nn.Module, *, window: int = 8, burn_in: int = 0, second_moment: str = "linear", example: Any = None
) -> nn.Module:
    """Copy a module with cross-iteration batch norm behind each Linear and convolution that a batch norm follows.

    Names, parameters, running statistics and settings are kept, so that eval mode gives the same outputs. Batch norms
    that do not directly follow a Linear or convolution stay. Make the optimiser of the copy's parameters.

    Parameters
    ----------
    module : torch.nn.Module
        With BatchNorm1d or BatchNorm2d in it; it is not changed.
    window, burn_in, second_moment
        As for ``CrossIterationBatchNorm2d``.
    example : Tensor or tuple of Tensor, optional
        As for ``normalised_layers``.

    Raises
    ------
    TypeError, ValueError
        As ``normalised_layers``; if there is no batch norm to replace.

    Examples
    --------
    >>> module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    >>> convert_cross_iteration_batch_norm(module, window=4)[1].layer
    Linear(in_features=4, out_features=8, bias=True)
    """
    copied: Any = copy.deepcopy(module)
    converted = 0
    for pair in normalised_layers(module, example):
        layer, old = copied.get_submodule(pair.layer), copied.get_submodule(pair.batch_norm)
        kind = _CONVERTED.get(type(old))
        if kind is not None and isinstance(layer, kind._layers):
            kept = {name: getattr(old, name) for name in ("eps", "momentum", "affine", "track_running_stats")}
            new = kind(layer, window=window, burn_in=burn_in, second_moment=second_moment, **kept)
            for name, tensor in (*old._parameters.items(), *old._buffers.items()):
                setattr(new, name, tensor)
            parent, _, name = pair.batch_norm.rpartition(".")
            setattr(copied.get_submodule(parent), name, new.train(old.training))
            converted += 1
    if not converted:
        raise ValueError(
            f"no BatchNorm1d or BatchNorm2d of the {type(module).__name__} follows a Linear or convolution directly: "
            "there is nothing to replace."
        )
    return copied
