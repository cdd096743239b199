"""Layers of a state dict: named tensors, whose names and shapes alone say what they belong to.

Three layers can be told apart: batch norm has statistics, the first Linear has its width as output, the last as input.
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

_LINEAR, _BATCH_NORM = {"weight", "bias"}, {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def of_arrays(arrays: Arrays, eps: float) -> Layers:
    """Build layers from arrays that torch has named ``0.weight``, ``0.bias``, ``1.running_mean``, ``3.weight``, ...

    Arrays of anything but one Linear, BatchNorm1d and Linear are refused.
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
            f"it holds {len(linears)} Linear, {len(norms)} batch norm and {others} other layers, not Linear, "
            "BatchNorm1d, ReLU, Linear alone: certify other modules in Python by convexbn.nn.certify"
        )
    norm, m = layers[norms[0]], layers[norms[0]]["running_var"].shape[:1]
    orders = [
        (layers[one], layers[other])
        for one, other in (linears, linears[::-1])
        if layers[one]["weight"].shape[:1] == m == layers[other]["weight"].shape[1:]
    ]
    if len(orders) != 1:
        reason = "both orders of its Linear layers fit" if orders else "its Linear layers do not fit its batch norm"
        raise FormatError(f"{reason}: give the model as an exported program, by torch.export.save")
    return assembled(norm, *orders[0], eps)


def assembled(norm: Arrays, first: Arrays, last: Arrays, eps: float) -> Layers:
    """Check the tensors of three layers and build the network's layers.

    Parameters
    ----------
    norm, first, last : mapping of str to ndarray
        Tensors of the batch norm, of the Linear before it and of the Linear after it.
    eps : float
    """
    if not {"weight", "bias", "running_mean"} <= norm.keys():
        raise FormatError("its batch norm has no scale and shift or no statistics: set affine and track_running_stats")
    if "num_batches_tracked" in norm and not np.any(norm["num_batches_tracked"]):
        raise FormatError("its batch norm is untrained (num_batches_tracked is 0): run it on batches in train mode")
    if not 0 < eps < np.inf:
        raise FormatError(f"eps must be a positive number, got {eps}")
    weight, output = _numbers("weight", first).T, _numbers("weight", last).T
    m = weight.shape[-1]
    mean, var, scale, offset = (_numbers(name, norm) for name in ("running_mean", "running_var", "weight", "bias"))
    bias = _numbers("bias", first) if "bias" in first else np.zeros(m)
    output_bias = _numbers("bias", last) if "bias" in last else np.zeros(output.shape[-1])
    matrices = weight.ndim == output.ndim == 2 and weight.size and output.size
    fit = all(v.shape == (m,) for v in (bias, mean, var, scale, offset)) and output_bias.shape == output.shape[1:]
    if not matrices or not fit or len(output) != m:
        raise FormatError("the shapes of its layers do not fit one another: save the model again")
    if not (var >= 0).all():
        raise FormatError("its running_var is negative somewhere, and so no variance: train the model again")
    return Layers(weight, bias, mean, var, float(eps), scale, offset, output, output_bias)


def read_torch(archive: Archive) -> dict[str, np.ndarray[Any, Any]]:
    """Read the arrays of a state dict that ``torch.save`` wrote, alone or as one item of a checkpoint.

    Torch's unpickler for tensors and plain containers (``weights_only``) reads the audited archive. An ImportError is
    raised if torch is not installed, or its unpickler is known to run code in a hostile file.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "files of torch.save need PyTorch: pip install 'convexbn[torch]', or save the tensors as .safetensors."
        ) from error
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 10):
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


def of_bfloat16(data: Any) -> np.ndarray[Any, Any]:
    """Numbers of bytes in bfloat16, which numpy does not have: the upper halves of float32."""
    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Read the arrays of a safetensors file of any origin."""
    from safetensors import SafetensorError, deserialize, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            half = [name for name in file.keys() if file.get_slice(name).get_dtype() == "BF16"]  # noqa: SIM118
            arrays = {name: file.get_tensor(name) for name in file.keys() if name not in half}  # noqa: SIM118
        if half:
            with open(path, "rb") as stream:
                stored = dict(deserialize(stream.read()))  # type: ignore[no-untyped-call]
            arrays |= {name: of_bfloat16(stored[name]["data"]).reshape(stored[name]["shape"]) for name in half}
        return arrays
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


def _numbers(name: str, layer: Arrays) -> Float:
    array = layer[name]
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise FormatError(f"a {name} holds values that are no finite numbers: train the model again")
    return array.astype(np.float64)
