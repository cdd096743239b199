"""Layers of a state dict: named tensors, whose names and shapes alone say what they belong to.

Three layers can be told apart: batch norm has statistics, the first Linear returns its width, the last one takes it.
The file holds neither the ReLU between them nor ``eps``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from convexbn._types import Float
from convexbn.files.model_file import FormatError
from convexbn.files.torch.archive import Archive
from convexbn.program.layers import Layers

Arrays = Mapping[str, np.ndarray[Any, Any]]

#: The first torch whose ``weights_only`` is not known to run code in a hostile file (CVE-2025-32434, CVE-2026-24747).
_SAFE_TORCH = (2, 10)

_LINEAR, _BATCH_NORM = {"weight", "bias"}, {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def of_arrays(arrays: Arrays, eps: float) -> Layers:
    """Build layers from arrays named in torch's layout: ``0.weight``, ``0.bias``, ``1.running_mean``, ``3.weight``.

    Raises
    ------
    FormatError
        Unless the arrays are those of one Linear, BatchNorm1d and Linear.

    Examples
    --------
    >>> arrays = {"0.weight": np.ones((3, 2)), "1.weight": np.ones(3), "1.bias": np.zeros(3)}
    >>> arrays |= {"1.running_mean": np.zeros(3), "1.running_var": np.ones(3), "3.weight": np.ones((1, 3))}
    >>> of_arrays(arrays, 1e-5).predict(np.zeros((1, 2)))
    array([[0.]])
    """
    layers: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    for name, array in arrays.items():
        layer, _, key = name.rpartition(".")
        layers.setdefault(layer, {})[key] = array
    norms = [name for name, layer in layers.items() if "running_var" in layer]
    linears = [name for name, one in layers.items() if {"weight"} <= one.keys() <= _LINEAR and one["weight"].ndim == 2]
    if len(norms) != 1 or len(linears) != 2 or len(layers) != 3 or not layers[norms[0]].keys() <= _BATCH_NORM:
        others = len(layers) - len(linears) - len(norms)
        raise FormatError(
            f"it holds {len(linears)} Linear, {len(norms)} batch norm and {others} other layers, and without "
            "its forward a file can be certified for Linear, BatchNorm1d, ReLU, Linear alone: "
            "certify other modules in Python by convexbn.nn.certify"
        )
    return assembled(layers[norms[0]], *_in_order(layers, norms[0], linears), eps)


def assembled(norm: Arrays, first: Arrays, last: Arrays, eps: float) -> Layers:
    """Check the tensors of three layers and build the network's layers.

    Parameters
    ----------
    norm, first, last : mapping of str to ndarray
        Tensors of the batch norm, of the Linear before it and of the Linear after it.
    eps : float
    """
    if not {"weight", "bias", "running_mean"} <= norm.keys():
        raise FormatError(
            "its batch norm has no scale and shift, or no statistics: train it with affine and track_running_stats"
        )
    if "num_batches_tracked" in norm and not np.any(norm["num_batches_tracked"]):
        raise FormatError(
            "its batch norm is untrained (num_batches_tracked is 0): run batches through it in train mode"
        )
    if not 0 < eps < np.inf:
        raise FormatError(f"eps must be a positive number, got {eps}")
    weight, output = _numbers("weight", first["weight"]).T, _numbers("weight", last["weight"]).T
    m = weight.shape[-1]
    layers = Layers(
        weight=weight, output=output, eps=float(eps),
        bias=_numbers("bias", first["bias"]) if "bias" in first else np.zeros(m),
        running_mean=_numbers("running_mean", norm["running_mean"]),
        running_var=_numbers("running_var", norm["running_var"]),
        scale=_numbers("weight", norm["weight"]), offset=_numbers("bias", norm["bias"]),
        output_bias=_numbers("bias", last["bias"]) if "bias" in last else np.zeros(output.shape[-1]),
    )  # fmt: skip
    vectors = (layers.bias, layers.running_mean, layers.running_var, layers.scale, layers.offset)
    matrices = weight.ndim == output.ndim == 2 and weight.size and output.size
    fit = all(v.shape == (m,) for v in vectors) and layers.output_bias.shape == output.shape[1:]
    if not matrices or not fit or len(output) != m:
        raise FormatError("the shapes of its layers do not fit one another: save the model again")
    if not (layers.running_var >= 0).all():
        raise FormatError("its running_var is negative somewhere, and so no variance: train the model again")
    return layers


def read_torch(archive: Archive) -> dict[str, np.ndarray[Any, Any]]:
    """Read the arrays of a state dict that ``torch.save`` wrote, alone or as one item of a checkpoint.

    Torch's unpickler for tensors and plain containers (``weights_only``) reads the audited archive.

    Raises
    ------
    ImportError
        When torch is not installed, or its unpickler is known to be unsafe.
    FormatError
        When the archive holds anything else.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "files of torch.save need PyTorch: pip install 'convexbn[torch]', or save the tensors as .safetensors."
        ) from error
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < _SAFE_TORCH:
        raise ImportError(
            f"torch {torch.__version__} may run code in a hostile file (CVE-2025-32434, CVE-2026-24747): "
            "pip install 'torch>=2.10', or save the tensors as .safetensors."
        )
    if "data.pkl" not in archive.names or "constants.pkl" in archive.names:
        raise FormatError(
            "it is no state dict or exported program: save one by torch.save(model.state_dict(), ...) or by "
            "torch.export.save"
        )
    try:
        value = torch.load(archive.rebuilt(), map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # whatever damaged pickles raise
        named = re.search(r"GLOBAL ([\w.]{1,80})", str(error))
        reason = f"it names {named[1]}" if named else "it is damaged"
        raise FormatError(
            f"it holds something else than tensors ({reason}), and nothing in it was executed: save the state dict, by "
            "torch.save(model.state_dict(), ...)"
        ) from None
    return {name: _array(torch, name, tensor) for name, tensor in _state(torch, value).items()}


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Read the arrays of a safetensors file of any origin."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except (SafetensorError, TypeError, AttributeError, ValueError) as error:
        raise FormatError(f"it cannot be read ({error}): save float32 or float64 tensors") from None


def _state(torch: Any, value: Any) -> dict[str, Any]:
    """Find the one state dict in a saved value."""
    values = [value, *value.values()] if isinstance(value, dict) else []
    found = [
        state for state in values
        if isinstance(state, dict) and state and all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
        )
    ]  # fmt: skip
    if len(found) != 1:
        raise FormatError(f"it holds {len(found)} state dicts: save one, by torch.save(model.state_dict(), ...)")
    return dict(found[0])


def _array(torch: Any, name: str, tensor: Any) -> np.ndarray[Any, Any]:
    """Convert a tensor to a float64 array, if the file holds all of its bytes."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_complex():
        raise FormatError(f"{name} is no plain tensor of real numbers: save the state dict of the module on the CPU")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise FormatError(f"{name} is an expanded tensor: save it as contiguous numbers")
    return tensor.detach().to(torch.float64).numpy()


def _in_order(layers: Mapping[str, Arrays], norm: str, linears: list[str]) -> tuple[Arrays, Arrays]:
    """Return the Linear before the batch norm and the one after it."""
    m = len(layers[norm]["running_var"]) if layers[norm]["running_var"].ndim else -1
    orders = [
        (layers[one], layers[other])
        for one, other in (linears, linears[::-1])
        if len(layers[one]["weight"]) == m == layers[other]["weight"].shape[1]
    ]
    if len(orders) != 1:
        reason = "both orders of its Linear layers fit" if orders else "its Linear layers do not fit its batch norm"
        raise FormatError(f"{reason}: give the model as an exported program, by torch.export.save")
    return orders[0]


def _numbers(name: str, array: np.ndarray[Any, Any]) -> Float:
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise FormatError(f"a {name} holds values that are no finite numbers: train the model again")
    return array.astype(np.float64)
