"""A model file of another framework: which of them it is, and its layers."""

from __future__ import annotations

import os
from typing import NamedTuple

from convexbn.files.model_file import FormatError
from convexbn.files.torch.archive import Archive
from convexbn.files.torch.exported import is_exported, read_exported
from convexbn.files.torch.state_dict import Arrays, of_arrays, read_safetensors, read_torch
from convexbn.program.layers import Layers

_ZIP = b"PK\x03\x04"
_MOST_BYTES = 4 * 2**30


class Checkpoint(NamedTuple):
    """Layers of a file, and in a sentence what the file does not hold and was taken to be."""

    layers: Layers
    assumed: str


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a zip archive, as torch's are, or a safetensors file without a model of this package.

    Damaged files are none: what reads this package's own says what is wrong with them.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        start = file.read(9)
    if start.startswith(_ZIP):
        return True
    if start[8:] != b"{":
        return False
    try:
        with safe_open(path, framework="numpy") as tensors:
            return "convexbn" not in (tensors.metadata() or {})
    except SafetensorError:
        return False


def read_checkpoint(path: str | os.PathLike[str], *, eps: float | None = None) -> Checkpoint:
    """Linear, BatchNorm1d, ReLU, Linear of a file; nothing in it is executed.

    Parameters
    ----------
    path : path-like
        A program of ``torch.export.save`` (.pt2), a state dict of ``torch.save`` (.pt, read by torch 2.10 or later), or
        a state dict of safetensors.
    eps : float, optional
        Of the batch norm of a state dict, by default torch's own 1e-5; an exported program holds its own. A state dict
        does not hold its activation either: it is taken to be the ReLU.

    Returns
    -------
    Checkpoint

    Raises
    ------
    FormatError
        When it is none of these, is damaged, or has other layers.
    ImportError
        For a state dict of ``torch.save`` without torch.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from safetensors.numpy import save_file
    >>> arrays = {"0.weight": np.ones((3, 2)), "1.weight": np.ones(3), "1.bias": np.zeros(3)}
    >>> arrays |= {"1.running_mean": np.zeros(3), "1.running_var": np.ones(3), "3.weight": np.ones((1, 3))}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file(arrays, f"{folder}/model.safetensors")
    ...     read_checkpoint(f"{folder}/model.safetensors").layers.weight.shape
    (2, 3)
    """
    try:
        if os.path.getsize(path) > _MOST_BYTES:
            raise FormatError(f"it has more than {_MOST_BYTES} bytes: save the tensors alone")
        return _read(path, eps)
    except FormatError as error:
        raise FormatError(f"{os.fspath(path)} is not read: {error}.") from None


def _read(path: str | os.PathLike[str], eps: float | None) -> Checkpoint:
    with open(path, "rb") as file:
        start = file.read(9)
    if not start.startswith(_ZIP):
        if start[8:] != b"{":
            raise FormatError(
                "it is neither an archive of torch nor a safetensors file: save the state dict, by "
                "torch.save(model.state_dict(), ...)"
            )
        return _of_arrays(read_safetensors(path), eps)
    archive = Archive(path)
    if not is_exported(archive):
        return _of_arrays(read_torch(archive), eps)
    if eps is not None:
        raise FormatError("an exported program holds its own eps: leave --eps out")
    return Checkpoint(read_exported(archive), "")


def _of_arrays(arrays: Arrays, eps: float | None) -> Checkpoint:
    layers = of_arrays(arrays, 1e-5 if eps is None else eps)
    named = f"the ReLU and eps={layers.eps:g} were taken" if eps is None else "the ReLU was taken"
    return Checkpoint(layers, f"A state dict does not hold its activation{' or eps' if eps is None else ''}: {named}.")
