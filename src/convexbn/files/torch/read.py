"""Model files of other frameworks: their format and their layers."""

from __future__ import annotations

import os
from typing import NamedTuple

from convexbn.files.atomic import naming, regular
from convexbn.files.model_file import FormatError
from convexbn.files.torch.archive import Archive
from convexbn.files.torch.exported import read_exported
from convexbn.files.torch.state_dict import of_arrays, read_safetensors, read_torch
from convexbn.program.layers import Layers

_MOST_BYTES = 4 * 2**30
#: First bytes of what torch.save wrote before torch 1.6: a pickle of a number.
_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class Checkpoint(NamedTuple):
    """Layers of a file, and a sentence on the assumptions that replace what the file does not hold."""

    layers: Layers
    assumed: str


def _format(path: str | os.PathLike[str]) -> str:
    """Return "zip", "safetensors", "old" or "", by the first bytes of the file."""
    with open(path, "rb") as file:
        start = file.read(len(_OLD))
    if start == _OLD:
        return "old"
    return "zip" if start.startswith(b"PK\x03\x04") else "safetensors" if start[8:9] == b"{" else ""


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one of torch's, or a safetensors file without a model of this package.

    False for damaged files; ``load`` reports what is wrong with them.
    """
    from safetensors import SafetensorError, safe_open

    kind = _format(path) if os.path.isfile(path) else ""
    if kind != "safetensors":
        return kind in ("zip", "old")
    try:
        with safe_open(path, framework="numpy") as tensors:
            return "convexbn" not in (tensors.metadata() or {})
    except SafetensorError:
        return False


def read_checkpoint(path: str | os.PathLike[str], *, eps: float | None = None) -> Checkpoint:
    """Read Linear, BatchNorm1d, ReLU, Linear from a file; nothing in it is executed.

    Parameters
    ----------
    path : path-like
        A program of ``torch.export.save`` (.pt2, written by torch 2.8 or later), a state dict of ``torch.save`` (.pt,
        read by torch 2.10 or later), or a state dict of safetensors.
    eps : float, optional
        ``eps`` of the batch norm of a state dict, by default torch's 1e-5; an exported program holds its own. A state
        dict does not hold its activation either: the ReLU is taken.

    Raises
    ------
    FormatError
        When the file has another format, is damaged, or has other layers.
    ImportError
        When torch, which reads state dicts of ``torch.save``, is not installed or unsafe.
    """
    try:
        with naming(path):
            size = regular(path).st_size
        if size > _MOST_BYTES:
            raise FormatError(f"it has more than {_MOST_BYTES} bytes: save the tensors alone")
        kind = _format(path)
        if not kind:
            raise FormatError(
                "it is neither an archive of torch nor a safetensors file: save the state dict, by "
                "torch.save(model.state_dict(), ...)"
            )
        if kind == "old":
            raise FormatError(
                "it is in the format of torch before 1.6: save it again, by torch.save(torch.load(file, "
                "map_location='cpu', weights_only=True), file)"
            )
        archive = Archive(path) if kind == "zip" else None
        if archive is not None and "archive_format" in archive.names and archive.read("archive_format") == b"pt2":
            if eps is not None:
                raise FormatError("an exported program holds its own eps: leave --eps out")
            return Checkpoint(read_exported(archive), "")
        arrays = read_safetensors(path) if archive is None else read_torch(archive)
        layers = of_arrays(arrays, 1e-5 if eps is None else eps)
    except FormatError as error:
        raise FormatError(f"{os.fspath(path)} is not read: {error}.") from None
    told, taken = (" or eps", f"the ReLU and eps={layers.eps:g} were") if eps is None else ("", "the ReLU was")
    return Checkpoint(layers, f"A state dict does not hold its activation{told}: {taken} taken.")
