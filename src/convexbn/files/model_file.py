"""The file under ``save`` and ``load``: named arrays and a JSON header, checked, and replaced in one step.

A container is a safetensors file, which any reader of that format opens. Its ``__metadata__`` holds three
strings: ``convexbn`` is the header as strict JSON; ``format`` is the version of the container, ``"1"``;
``sha256`` is the hexadecimal digest of the length of ``P`` in 8 bytes, little-endian, then ``P``, then the
bytes of the tensors in the order of their names. ``P`` is the ASCII JSON, without spaces, of
``[format, convexbn, [[name, dtype, shape], ...]]`` in the same order. The digest tells a damaged file from a
sound one; it does not prove who wrote it. Nothing in a file is executed, and no other format is tried.
"""

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator, Mapping
from reprlib import repr as short
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import numpy as np

__all__ = ["JSON", "FormatError", "read", "write", "write_atomically"]

JSON: TypeAlias = "dict[str, JSON] | list[JSON] | str | int | float | bool | None"
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
_FORMAT = "1"
_MAX_FILE_BYTES = 4 * 2**30
_MAX_TABLE_BYTES = 100_000_000  # the bound of safetensors itself
_MAX_TENSORS = 1000
_MAX_DIMENSIONS = 32  # of NumPy 1; NumPy 2 takes 64
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
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8": "an image",
    rb"(?:\xef\xbb\xbf)?\s*<[!?a-zA-Z]": "an HTML or XML page",
    rb"(?:\xef\xbb\xbf)?\s*[\[{]\s*[\[{\]}\"\d]": "a JSON text",
    rb"(?:[\t\n\r -~]|[\xc2-\xf4][\x80-\xbf]+|\Z){256}": "a text, such as CSV",
}


class FormatError(ValueError):
    """A file, or what should become one, is not a sound container; the message says why and what to do."""


class _Entry(NamedTuple):
    """A tensor's line in the table; the offsets count from the end of the table."""

    dtype: np.dtype[Any]
    shape: list[int]
    begin: int
    end: int


def write(path: str | os.PathLike[str], arrays: Mapping[str, Array], header: Mapping[str, JSON]) -> None:
    """Write a file; in its place there is at every instant the former one or the new one, complete.

    Equal arguments give equal bytes. They first go to ``.<name>.<random>.tmp`` in the same folder, which only
    a killed process leaves behind; it is never read and may be deleted.

    Parameters
    ----------
    path : str or os.PathLike
        The file; a symbolic link is written through. A former file keeps its permissions.
    arrays : mapping of str to ndarray
        At most 1,000 arrays of float64, float32, int64, int32, uint8 or bool; floats are finite.
    header : mapping of str to JSON
        Dictionaries with string keys, lists, strings, integers, finite floats, booleans and None.

    Raises
    ------
    FormatError
        If `read` would refuse the file or not return the same; nothing has been written.
    OSError
        With `path` as its file name. The former file is intact, unless only the sync of the folder failed.
    """
    with _naming(path):
        data = _encode(_render(header), {name: _little(name, array) for name, array in arrays.items()})
        _check_size(len(data))
        _decode(data)
        _replace(os.path.realpath(path), data)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Array], dict[str, JSON]]:
    """Read what `write` wrote.

    Parameters
    ----------
    path : str or os.PathLike
        The file, of at most 4 GiB; twice its size is needed in memory.

    Returns
    -------
    arrays : dict of str to ndarray
        Writable arrays in C order and native byte order.
    header : dict of str to JSON
        The header.

    Raises
    ------
    FormatError
        If the file is anything but a sound container; all of it is audited before an array is returned.
    OSError
        If the file cannot be read, or is a folder or a device.
    """
    with _naming(path):
        _regular(path)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size  # of this file: another may take its place at any time
            _check_size(size)
            text, views = _decode(file.read(size))
        header = _parse(text.encode(errors="surrogatepass"), "header")
        return {name: view.astype(view.dtype.newbyteorder("=")) for name, view in views.items()}, header


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let errors name the file that the caller knows, not the temporary one."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{os.fspath(path)}: {error}") from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _damaged(reason: str) -> FormatError:
    return FormatError(f"{reason}: the file is damaged or altered, so copy it again or save the model again")


def _check_size(size: int) -> None:
    if size > _MAX_FILE_BYTES:
        raise FormatError(f"{size} bytes are more than the {_MAX_FILE_BYTES} allowed: store a smaller model")


def _render(header: Mapping[str, JSON]) -> str:
    """Return the header as JSON from which the same header comes back."""
    try:
        text = json.dumps(dict(header), allow_nan=False, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"the header is not JSON ({error}): give plain types and finite numbers") from None
    if _parse(text.encode(), "header") != dict(header):
        raise FormatError("the header would come back changed: give lists, not tuples, and string keys")
    return text


def _little(name: str, array: Array) -> Array:
    """Return the array as the file stores it: little-endian, in C order."""
    dtype = array.dtype.newbyteorder("<")
    if dtype.str not in _CODES:
        raise FormatError(f"tensor {name!r} has dtype {array.dtype}: convert it to one of {_DTYPE_NAMES}")
    return np.asarray(array, dtype=dtype, order="C")


def _encode(text: str, arrays: Mapping[str, Array]) -> bytes:
    """Lay out the file, widest types first so that all are aligned."""
    # Not by the safetensors library: its order of __metadata__ changes from process to process.
    metadata = {"convexbn": text, "format": _FORMAT, "sha256": _digest(text, arrays)}
    table: dict[str, Any] = {"__metadata__": metadata}
    names, end = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name)), 0
    for name in names:
        if name in table or not name.isprintable():
            raise FormatError(f"a tensor cannot be named {name!r}: rename it")
        begin, end = end, end + arrays[name].nbytes
        dtype, shape = _CODES[arrays[name].dtype.str], arrays[name].shape
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(table, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    length = len(encoded).to_bytes(8, "little")
    return b"".join([length, encoded, *(arrays[name].tobytes() for name in names)])


def _digest(text: str, arrays: Mapping[str, Array]) -> str:
    """Return the digest that the module's docstring defines; the shapes say where each tensor ends."""
    names = sorted(arrays)
    table = [[name, _CODES[arrays[name].dtype.str], arrays[name].shape] for name in names]
    preamble = json.dumps([_FORMAT, text, table], separators=(",", ":")).encode()
    digest = hashlib.sha256(len(preamble).to_bytes(8, "little") + preamble)
    for name in names:
        digest.update(arrays[name].reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _decode(data: bytes) -> tuple[str, dict[str, Array]]:
    """Audit a whole file; return the text of its header and views of its tensors."""
    table, start = _read_table(data)
    text, digest = _read_metadata(table)
    if len(table) > _MAX_TENSORS:
        raise FormatError(f"{len(table)} tensors are more than the {_MAX_TENSORS} allowed: join some of them")
    entries = {name: _read_entry(f"tensor {short(name)}", entry) for name, entry in table.items()}
    _check_cover(entries, len(data) - start)
    views = {name: np.ndarray(e.shape, e.dtype, data, start + e.begin) for name, e in entries.items()}
    if _digest(text, views) != digest:
        raise _damaged("its checksum does not match")
    for name, view in views.items():
        _check_values(f"tensor {short(name)}", view)
    return text, views


def _read_table(data: bytes) -> tuple[dict[str, JSON], int]:
    """Return the table of a safetensors file and the place where it ends."""
    end = 8 + int.from_bytes(data[:8], "little")
    if data[8:9] != b"{" or end > _MAX_TABLE_BYTES:
        for pattern, kind in _KINDS.items():
            if re.match(pattern, data, re.DOTALL):
                raise FormatError(f"this looks like {kind}: give a file that convexbn saved")
        raise _damaged(f"its first bytes, {data[:9]!r}, are not those of a safetensors file")
    if end > len(data):
        raise _damaged(f"it ends after {len(data)} bytes, within its table of tensors")
    return _parse(data[8:end], "table of tensors"), end


def _parse(data: bytes, what: str) -> dict[str, JSON]:
    """Parse a JSON object, with memory and recursion bounded before the parser runs."""
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


def _read_metadata(table: dict[str, JSON]) -> tuple[str, str]:
    """Take the metadata out of the table; return the header's text and the digest."""
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged("its __metadata__ is not a JSON object of strings")
    text, version, digest = (str(metadata.get(key, "")) for key in ("convexbn", "format", "sha256"))
    if not text:
        raise FormatError("this is a safetensors file without a convexbn model: give one that convexbn saved")
    if version != _FORMAT:
        raise FormatError(f"its format is {short(version)} and not {_FORMAT!r}: upgrade convexbn to read it")
    return text, digest


def _read_entry(tensor: str, entry: JSON) -> _Entry:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(f"{tensor} has not exactly a dtype, a shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise FormatError(f"{tensor} has dtype {short(code)}: save it as one of {_DTYPE_NAMES}")
    dtype = _DTYPES[code]
    # NumPy bounds the product of the sizes other than 0 even when the array is empty.
    if not _are_sizes(shape) or math.prod(filter(None, shape)) * dtype.itemsize > sys.maxsize:
        raise _damaged(f"{tensor} has the impossible shape {short(shape)}")
    nbytes = math.prod(shape) * dtype.itemsize
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise _damaged(f"{tensor} has data_offsets {short(offsets)} that do not fit its shape {short(shape)}")
    return _Entry(dtype, shape, *offsets)


def _are_sizes(value: JSON) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > _MAX_DIMENSIONS:
        return False
    return all(type(size) is int and size >= 0 for size in value)


def _check_cover(entries: Mapping[str, _Entry], size: int) -> None:
    """Check that the tensors follow one another and fill the rest of the file."""
    spans = sorted((entry.begin, entry.end) for entry in entries.values())
    for (_, end), (begin, _) in itertools.pairwise([(0, 0), *spans, (size, size)]):
        if begin != end:
            raise _damaged(f"its tensors leave a hole or overlap between bytes {end} and {begin} of {size}")


def _check_values(tensor: str, view: Array) -> None:
    if view.dtype.kind == "b" and (view.view(np.uint8) > 1).any():
        raise _damaged(f"{tensor} holds booleans that are neither 0 nor 1")
    if view.dtype.kind == "f" and not np.isfinite(view).all():
        raise FormatError(f"{tensor} holds NaN or infinity: fit the model again and save it")


def _regular(path: str | os.PathLike[str]) -> os.stat_result:
    """Return the status of a regular file; refuse folders, and devices and pipes, which may never end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL, "Not a regular file")
    return status


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write any file; in its place there is at every instant the former one or the new one, complete."""
    with _naming(path):
        _replace(os.path.realpath(path), data)


def _replace(target: str, data: bytes) -> None:
    """Put a complete, synced file in the place of the target, or leave all as it was."""
    former = _regular(target) if os.path.lexists(target) else None
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name[:40]}.{secrets.token_hex(8)}.tmp")
    # Created no wider than the former file, so that no one reads more than before while it is written.
    mode = stat.S_IMODE(former.st_mode) if former else 0o666
    try:
        with open(temporary, "xb", opener=functools.partial(os.open, mode=mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if former:
            os.chmod(temporary, mode)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    """Make the new name survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
