"""The file under ``save`` and ``load``: named arrays and a JSON header, checked.

A container is a safetensors file, which any reader of that format opens. Its ``__metadata__`` holds one string,
``convexbn``: the JSON of an object with the strings ``format``, the version of the container, ``"2"``; ``header``, the
header as strict JSON; and ``sha256``, the hexadecimal digest of the length of ``P`` in 8 bytes, little-endian, then
``P``, then the bytes of the tensors in the order of their names. ``P`` is the ASCII JSON, without spaces, of
``[format, header, [[name, dtype, shape], ...]]`` in the same order. Files of format ``"1"`` are read: they have
``format``, ``sha256`` and the header, as ``convexbn``, in the ``__metadata__`` itself.

The digest tells a damaged file from a sound one; it does not prove who wrote it. Nothing in a file is executed, and no
other format is tried.
"""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from reprlib import repr as short
from typing import Any, TypeAlias

import numpy as np

from convexbn.files.atomic import naming, regular, write_atomically

JSON: TypeAlias = "dict[str, JSON] | list[JSON] | str | int | float | bool | None"
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
_FORMAT = "2"
_MAX_FILE_BYTES = 4 * 2**30
_MAX_TABLE_BYTES = 100_000_000  # the bound of safetensors itself
_MAX_TENSORS = 1000
_MAX_DEPTH, _MAX_ITEMS = 32, 1_000_000  # of a JSON text
_CODES = {"<f8": "F64", "<f4": "F32", "<i8": "I64", "<i4": "I32", "|u1": "U8", "|b1": "BOOL"}
_DTYPES = {code: np.dtype(kind) for kind, code in _CODES.items()}
_DTYPE_NAMES = ", ".join(dtype.name for dtype in _DTYPES.values())

# Possessive, and with the closing quote optional: a hostile text is scanned once, without backtracking.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]', re.DOTALL)

_KINDS = {
    rb"\Z": "an empty file",
    rb"\x80[\x00-\x05]|(?:c[\w.]+\n[\w.]+\n[pq(]|\([dlt]p\d+\n|[\]}]q.).*\.\Z": "a pickle",
    rb"PK\x03\x04.{26,300}?data\.pkl": "a zip archive around a pickle, as torch.save writes it",
    rb"PK(?:\x03\x04|\x05\x06)": "a zip archive, such as a NumPy .npz",
    rb"\x89HDF\r\n\x1a\n": "an HDF5 file",
    rb"\x1f\x8b\x08|BZh\d|\xfd7zXZ\x00|\x28\xb5\x2f\xfd": "a compressed file, such as gzip",
    rb"\x08[\x01-\x14](?:\x12|:)": "an ONNX file",
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8": "an image",
    rb"(?:\xef\xbb\xbf)?\s*<[!?a-zA-Z]": "an HTML or XML page",
    rb"(?:\xef\xbb\xbf)?\s*[\[{]\s*[\[{\]}\"\d]": "a JSON text",
    rb"(?:[\t\n\r -~]|[\xc2-\xf4][\x80-\xbf]+|\Z){256}": "a text, such as CSV",
}


class FormatError(ValueError):
    """A file is not a sound container, or cannot become one; the message says why and what to do."""


def write(path: str | os.PathLike[str], arrays: Mapping[str, Array], header: Mapping[str, JSON]) -> None:
    """Write a file in one step; equal arguments give equal bytes.

    `FormatError` is raised, before anything is written, if `read` would refuse the file or return something else.

    Parameters
    ----------
    path : str or os.PathLike
    arrays : mapping of str to ndarray
        At most 1,000 arrays of float64, float32, int64, int32, uint8 or bool; floats are finite.
    header : mapping of str to JSON
        Dictionaries with string keys, lists, strings, integers, finite floats, booleans and None.
    """
    with _naming(path):
        data = _encode(_render(header), arrays)
        _check_size(len(data))
        _decode(data)
        write_atomically(path, data)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Array], dict[str, JSON]]:
    """Read the arrays, writable, in C order and native byte order, and the header of a file of at most 4 GiB.

    The whole file is audited before an array is returned, which takes twice its size in memory. `FormatError` is raised
    if it is not a sound container, OSError if it cannot be read, or is a folder or a device.
    """
    with _naming(path), naming(path):
        regular(path)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size  # of this file: another may take its place at any time
            _check_size(size)
            text, arrays = _decode(file.read(size))
        header = _parse(text.encode(errors="surrogatepass"), "header")
        return {name: array.astype(array.dtype.newbyteorder("="), copy=False) for name, array in arrays.items()}, header


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let refusals name the file."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{os.fspath(path)}: {error}") from None


def _damaged(reason: str) -> FormatError:
    return FormatError(f"{reason}: the file is damaged or altered, so copy it again or save the model again")


def _check_size(size: int) -> None:
    if size > _MAX_FILE_BYTES:
        raise FormatError(f"{size} bytes are more than the {_MAX_FILE_BYTES} allowed: store a smaller model")


def _render(header: Mapping[str, JSON]) -> str:
    """Return the header as JSON; refuse one that JSON would change."""
    try:
        text = json.dumps(dict(header), allow_nan=False, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"the header is not JSON ({error}): give plain types and finite numbers") from None
    if _parse(text.encode(), "header") != dict(header):
        raise FormatError("the header would come back changed: give lists, not tuples, and string keys")
    return text


def _encode(text: str, arrays: Mapping[str, Array]) -> bytes:
    """Lay out the file. Its metadata have one key, because the order of several would differ between processes."""
    from safetensors.numpy import save

    stored: dict[str, Array] = {}  # little-endian, in C order
    for name, array in arrays.items():
        dtype = array.dtype.newbyteorder("<")
        if dtype.str not in _CODES:
            raise FormatError(f"tensor {name!r} has dtype {array.dtype}: convert it to one of {_DTYPE_NAMES}")
        if name == "__metadata__" or not name.isprintable():
            raise FormatError(f"a tensor cannot be named {name!r}: rename it")
        stored[name] = np.asarray(array, dtype=dtype, order="C")
    seal = {"format": _FORMAT, "header": text, "sha256": _digest(_FORMAT, text, stored)}
    return save(stored, {"convexbn": json.dumps(seal, separators=(",", ":"))})


def _digest(version: str, text: str, arrays: Mapping[str, Array]) -> str:
    """Return the digest that the module's docstring defines; the shapes say where each tensor ends."""
    names = sorted(arrays)
    table = [[name, _CODES[arrays[name].dtype.str], arrays[name].shape] for name in names]
    preamble = json.dumps([version, text, table], separators=(",", ":")).encode()
    digest = hashlib.sha256(len(preamble).to_bytes(8, "little") + preamble)
    for name in names:
        digest.update(arrays[name].reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _decode(data: bytes) -> tuple[str, dict[str, Array]]:
    """Audit a whole file; return the text of its header, and its tensors."""
    from safetensors import SafetensorError, deserialize

    table = _read_table(data)
    version, text, sha256 = _read_metadata(table)
    if len(table) > _MAX_TENSORS:
        raise FormatError(f"{len(table)} tensors are more than the {_MAX_TENSORS} allowed: join some of them")
    for name, entry in table.items():  # safetensors accepts further fields, which no digest covers, and types
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise _damaged(f"tensor {short(name)} has not exactly a dtype, a shape and data_offsets")
        if not isinstance(kind := entry["dtype"], str) or kind not in _DTYPES:
            raise FormatError(f"tensor {short(name)} has dtype {short(kind)}: save it as one of {_DTYPE_NAMES}")
    try:
        found = dict(deserialize(data))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise _damaged(f"safetensors does not read it ({short(str(error).splitlines()[0])})") from None
    arrays = {name: _array(name, **found[name]) for name in table}
    if _digest(version, text, arrays) != sha256:
        raise _damaged("its checksum does not match")
    for name, array in arrays.items():
        if array.dtype.kind == "b" and (array.view(np.uint8) > 1).any():
            raise _damaged(f"tensor {short(name)} holds booleans that are neither 0 nor 1")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise FormatError(f"tensor {short(name)} holds NaN or infinity: fit the model again and save it")
    return text, arrays


def _read_table(data: bytes) -> dict[str, JSON]:
    """Return the table of a safetensors file; refuse it if it is too large or deep, or repeats a key."""
    end = 8 + int.from_bytes(data[:8], "little")
    if data[8:9] != b"{" or end > _MAX_TABLE_BYTES:
        for pattern, kind in _KINDS.items():
            if re.match(pattern, data, re.DOTALL):
                raise FormatError(f"this looks like {kind}: give a file that convexbn saved")
        raise _damaged(f"its first bytes, {data[:9]!r}, are not those of a safetensors file")
    if end > len(data):
        raise _damaged(f"it ends after {len(data)} bytes, within its table of tensors")
    return _parse(data[8:end], "table of tensors")


def _parse(data: bytes, what: str) -> dict[str, JSON]:
    """Check the size and depth of a JSON object, then parse it."""
    depth = 0
    for count, token in enumerate(_TOKEN.finditer(data), start=1):
        mark = data[token.start()]
        depth += (mark in b"[{") - (mark in b"]}")
        if depth > _MAX_DEPTH or count > _MAX_ITEMS:
            raise FormatError(f"its {what} has over {_MAX_DEPTH} levels or {_MAX_ITEMS} items: store less")
    try:
        text = data.decode()
        value = json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    except ValueError as error:
        raise _damaged(f"its {what} is not strict JSON ({error})") from None
    if not isinstance(value, dict):
        raise _damaged(f"its {what} is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    if len(value := dict(pairs)) < len(pairs):
        raise ValueError("a key is given twice")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{short(text)} is not a finite number")
    return value


def _read_metadata(table: dict[str, JSON]) -> tuple[str, str, str]:
    """Remove the metadata from the table; return the format, the text of the header, and the digest."""
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged("its __metadata__ is not a JSON object of strings")
    text = str(metadata.get("convexbn", ""))
    if not text:
        raise FormatError("this is a safetensors file without a convexbn model: give one that convexbn saved")
    first = "format" in metadata
    seal = {**metadata, "header": text} if first else _parse(text.encode(errors="surrogatepass"), "metadata")
    if seal.get("format") != ("1" if first else _FORMAT):
        raise FormatError(f"its format is {short(seal.get('format'))} and not {_FORMAT!r}: upgrade convexbn to read it")
    if not isinstance(seal.get("header"), str):
        raise _damaged("its __metadata__ is not a JSON object of strings")
    return str(seal["format"]), str(seal["header"]), str(seal.get("sha256"))


def _array(name: str, dtype: str, shape: list[int], data: bytearray) -> Array:
    try:
        return np.frombuffer(data, _DTYPES[dtype]).reshape(shape)
    except ValueError:
        raise _damaged(f"tensor {short(name)} has the impossible shape {short(shape)}") from None
