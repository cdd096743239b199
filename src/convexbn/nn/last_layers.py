"""The last layers of a torch module: its final Linear, BatchNorm1d, ReLU, Linear.

The order in which a module defines its layers says which these are. Comparing outputs checks that its forward uses them
so, whatever code it holds. The module itself is never run or changed: a copy is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from convexbn._types import Float
from convexbn.estimators.plain_values import plain_targets, refuse_columns
from convexbn.program.layers import Layers
from convexbn.program.output_check import output_error

#: Types of parameters that networks are converted to.
NUMBERS: dict[torch.dtype, type[np.floating[Any]]] = {torch.float32: np.float32, torch.float64: np.float64}

#: Layers that change nothing in eval mode, and ReLU, which may also be a call in the forward.
_SKIPPED = (nn.ReLU, nn.Identity, nn.Flatten, nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout)

_ENDING = "only networks that end in Linear, BatchNorm1d, ReLU, Linear can be read"

#: Largest difference of outputs, relative to the largest: far above rounding, far below that of another activation.
SAME_FUNCTION = 1e-6

#: Rows a pass.
_BATCH = 1024


@dataclass(frozen=True, eq=False)
class LastLayers:
    """The last Linear, BatchNorm1d, ReLU, Linear of a module.

    Attributes
    ----------
    module : torch.nn.Module
        The whole module, taken out of wrappers such as DataParallel.
    linear, batch_norm, output : str
        Names of the layers in it.
    layers : Layers
        Their numbers, as stored.
    before : tuple of str
        Names of the layers that come before, other than ReLU and those that change nothing.
    """

    module: nn.Module
    linear: str
    batch_norm: str
    output: str
    layers: Layers
    before: tuple[str, ...]

    def features(self, X: Any) -> Float:
        """Inputs (n, d) of the first Linear in eval mode and float64, for rows as the module takes them.

        A ValueError says if the module does not run on them, or has other outputs than the layers on the features.
        """
        rows, d = as_tensor(X), len(self.layers.weight)
        inputs = [torch.empty(0, d, dtype=torch.float64, device="cpu")]
        gather = {self.linear: lambda _, given: inputs.append(given[0].reshape(-1, d).clone())}
        outputs = run_copy(self.module, rows, gather)
        features = torch.cat(inputs).numpy()
        expected = self.layers.predict(features)
        error = output_error(expected, outputs) if outputs.shape == expected.shape else np.inf
        if not error <= SAME_FUNCTION:
            raise ValueError(
                f"the forward of the {type(self.module).__name__} does not use {self.linear!r}, {self.batch_norm!r} "
                f"and {self.output!r} as Linear, BatchNorm1d, ReLU, Linear, one after the other: its outputs differ by "
                f"{error:.1e} of their scale; {_ENDING}."
            )
        return features


def run_copy(module: nn.Module, X: torch.Tensor, hooks: Mapping[str, Callable[..., Any]]) -> Float:
    """Outputs (n, K) of a copy in eval mode and float64; ValueError if it does not run on ``X``.

    Parameters
    ----------
    module, X : torch.nn.Module, Tensor (n, ...)
        The rows are in float64 on the CPU.
    hooks : mapping of str to callable
        Forward pre-hooks of layers of the copy, by name.
    """
    try:
        double = copy.deepcopy(module).to(device="cpu", dtype=torch.float64).eval()
        for name, hook in hooks.items():
            double.get_submodule(name).register_forward_pre_hook(hook)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return torch.cat([double(part).reshape(len(part), -1) for part in torch.split(X, _BATCH)]).numpy()
    except Exception as error:  # a forward can raise anything
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"a copy of the {type(module).__name__} does not run in float64 on rows of shape {tuple(X.shape[1:])} "
            f"({reason}): give X in the shape that it takes, or the layers in a Sequential."
        ) from error


def read_last_layers(module: nn.Module) -> LastLayers:
    """Last Linear, BatchNorm1d, ReLU, Linear of a module, in the order of definition.

    Parameters
    ----------
    module : torch.nn.Module
        In any mode, on any device, of any floating type; it is not changed.

    Raises
    ------
    TypeError, ValueError
        As ``from_module``, but an output bias and layers that come before are accepted.
    """
    module = unwrapped(module)
    leaves = leaves_of(module)
    for place, kind in ((-1, nn.Linear), (-2, nn.BatchNorm1d), (-3, nn.Linear)):
        expected = kind.__name__
        if len(leaves) < -place:
            raise TypeError(f"the {type(module).__name__} has no {expected} before its last {-1 - place}: {_ENDING}.")
        name, layer = leaves[place]
        if type(layer) is not kind:
            lazy = " (run a batch through it first)" if isinstance(layer, nn.modules.lazy.LazyModuleMixin) else ""
            found = type(layer).__name__ + lazy
            raise TypeError(f"layer '{name}' is a {found} where a {expected} is expected: {_ENDING}.")
    names = [name for name, _ in leaves]
    return LastLayers(module, names[-3], names[-2], names[-1], read_layers(leaves[-3:]), tuple(names[:-3]))


def read_layers(named: Sequence[tuple[str, Any]], regions: int = 1) -> Layers:
    """Read a named Linear or convolution, batch norm and Linear: filters become columns, and output is (m, R K)."""
    first, norm, last = named
    linear, where, output = (f"{type(layer).__name__} '{name}'" for name, layer in named)
    weight, by_output, batch_norm = _numbers(first, "weight"), _numbers(last, "weight"), norm[1]
    if batch_norm.weight is None:
        raise ValueError(f"{where} has no scale and shift: train it with affine=True.")
    if batch_norm.running_mean is None:
        raise ValueError(f"{where} has no stored statistics: train it with track_running_stats=True.")
    if not batch_norm.num_batches_tracked:
        raise ValueError(f"{where} is untrained (num_batches_tracked is 0): run batches through it in train mode.")
    m, sizes = len(weight), (len(weight) * regions, len(batch_norm.weight) * regions, by_output.shape[1])
    if len(set(sizes)) > 1:
        found = "{}, {} and {} features".format(*sizes)
        raise ValueError(f"{linear}, {where} and {output} do not follow one another: they have {found}.")
    layers = Layers(
        weight=weight.reshape(m, -1).T,
        bias=_numbers(first, "bias"),
        running_mean=_numbers(norm, "running_mean"),
        running_var=_numbers(norm, "running_var"),
        eps=float(batch_norm.eps),
        scale=_numbers(norm, "weight"),
        offset=_numbers(norm, "bias"),
        output=by_output.T.reshape(m, -1),
        output_bias=_numbers(last, "bias"),
    )
    if not ((layers.running_var >= 0) & (layers.running_var + layers.eps > 0)).all():
        raise ValueError(f"{where} has a running_var that is no variance: run batches through it in train mode.")
    return layers


def _numbers(named: tuple[str, Any], key: str) -> Float:
    """Parameter or buffer of a layer in float64, checked to be finite; zeros for a missing bias."""
    name, layer = named
    tensor, where = getattr(layer, key), f"{key} of {type(layer).__name__} '{name}'"
    if tensor is None:
        return np.zeros(len(layer.weight))
    if tensor.is_meta or not tensor.is_floating_point():
        raise TypeError(f"{where} holds no real numbers: it is {tensor.dtype} on device {tensor.device}.")
    array: Float = tensor.detach().to(device="cpu", dtype=torch.float64, copy=True).numpy()
    if not np.isfinite(array).all():
        raise ValueError(f"{where} is not finite: the training diverged, so train it again.")
    return array


def unwrapped(module: nn.Module) -> nn.Module:
    """Take a module out of DataParallel, DistributedDataParallel and ``torch.compile``."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}.")
    wrapped: Any = module
    while isinstance(wrapped, nn.Module):
        module = wrapped
        parallel = isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel)
        wrapped = module.module if parallel else getattr(module, "_orig_mod", None)
    return module


def leaves_of(module: nn.Module) -> list[tuple[str, Any]]:
    """Named layers in the order of definition, without those of ``_SKIPPED``; a layer in two places comes twice."""
    leaves = [item for item in module.named_modules(remove_duplicate=False) if not [*item[1].children()]]
    return [(name, layer) for name, layer in leaves if type(layer) not in _SKIPPED]


def as_targets(y: Any) -> np.ndarray:
    """Targets, tensor or array-like of numbers, as an array."""
    if isinstance(y, torch.Tensor):
        return y.detach().cpu().numpy()
    return np.asarray(plain_targets(y, numeric=True))


def as_tensor(X: Any) -> torch.Tensor:
    """Rows in float64 on the CPU, checked to be finite numbers; a copy, as layers may work in place."""
    if not isinstance(X, torch.Tensor):
        refuse_columns(X)
    if X.is_complex() if isinstance(X, torch.Tensor) else np.iscomplexobj(X):
        raise TypeError("X must be real, and is complex: give its parts as features.")
    if isinstance(X, torch.Tensor):
        rows = X.detach().to(device="cpu", dtype=torch.float64, copy=True)
    else:
        try:
            rows = torch.from_numpy(np.array(X, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise TypeError(f"X must be an array or tensor of numbers: {error}.") from error
    if rows.ndim == 0 or not len(rows):
        raise ValueError(f"X must have rows, as the module takes them; got shape {tuple(rows.shape)}.")
    if not torch.isfinite(rows).all():
        raise ValueError("X must be finite: leave out or fill the rows that are not.")
    return rows
