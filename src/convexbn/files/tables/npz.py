"""NPZ archives of numpy arrays; pickled objects in them are refused, never loaded."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from convexbn.files.dataset import Dataset
from convexbn.files.tables.table import (
    Selection,
    TableError,
    check_memory,
    declared,
    exactly,
    finite,
    listed,
    sound,
)

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# What zipfile and numpy.lib.format raise on damaged bytes.
_DAMAGE = (
    ValueError, EOFError, LookupError, RuntimeError, SyntaxError, TypeError, tokenize.TokenError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip


class _Member(NamedTuple):
    """An array of an archive, as its header describes it."""

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def read_npz(path: Path, wanted: Selection) -> Dataset:
    """Read the feature matrix of an archive, and its target."""
    with sound(".npz archive", *_DAMAGE), zipfile.ZipFile(path) as archive:
        members, target = _members(archive), wanted.target
        name = _matrix_name(members)
        rows, *shape = members[name].shape
        width = prod(shape)
        if not rows:
            raise TableError(f"array {name!r} has no rows; add at least one")
        if target is not None:
            _check_column(members, target, rows, "the target")
        for other in wanted.reading.verbatim:
            _check_column(members, other, rows, "--id")
        check_memory(8 * rows * width)
        alone = wanted._replace(target=None, reading=wanted.reading._replace(verbatim=()))
        chosen = alone.choose([f"x{index}" for index in range(width)])
        values = _array(archive, members[name]).reshape(rows, width)
        with np.errstate(over="ignore"):
            matrix = np.asarray(values, dtype=np.float64)
        for index, column in enumerate(matrix.T):  # a mask of the whole matrix would cost an eighth of it
            exactly(values[:, index], f"x{index}")
            finite(column, f"x{index}")
        if len(chosen) < width or wanted.features is not None:
            matrix = matrix[:, [int(column[1:]) for column in chosen]]
        image_shape = tuple(shape) if len(shape) > 1 else None
        y = None if target is None else finite(declared(_array(archive, members[target]), target), target)
        ids = {other: list(map(str, _array(archive, members[other]).tolist())) for other in wanted.reading.verbatim}
        return Dataset(
            path.name, matrix, y, feature_names=chosen, target=target, image_shape=image_shape, verbatim=ids
        )  # fmt: skip


def _check_column(members: dict[str, _Member], name: str, rows: int, purpose: str) -> None:
    """Refuse an archive without an array of one value a row."""
    if name not in members or members[name].shape != (rows,):
        shapes = ", ".join(f"{other!r} {member.shape}" for other, member in list(members.items())[:20])
        raise TableError(f"has no array {name!r} of shape ({rows},) for {purpose}; its arrays are {shapes}")


def _members(archive: zipfile.ZipFile) -> dict[str, _Member]:
    """Read the headers of all arrays; refuse one that promises more data than its entry holds."""
    members = {}
    for info in archive.infolist():
        if not info.filename.endswith(".npy"):
            continue
        check_memory(info.file_size)
        shape, dtype = _npy_header(archive, info)
        held = 0 if dtype.hasobject else prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or held > info.file_size:
            raise TableError(f"{info.filename} is shorter than its header says; write it again")
        members[info.filename.removesuffix(".npy")] = _Member(info, shape, dtype)
    return members


def _npy_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and type of an array without reading it."""
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in _HEADERS:
            raise TableError(f"{info.filename} has .npy version {version}; write it with plain numbers or text")
        try:
            shape, _, dtype = _HEADERS[version](stream)
        except MemoryError as error:  # Python's parser, on hostile nesting
            raise TableError(f"{info.filename} has no sound header; write it again") from error
    return shape, dtype


def _matrix_name(members: dict[str, _Member]) -> str:
    """Return the name of the feature array: X, possibly of images or signals, or the only matrix."""
    matrices = [name for name, member in members.items() if len(member.shape) in ((2, 3, 4) if name == "X" else (2,))]
    if "X" not in matrices and len(matrices) != 1:
        raise TableError(
            f"has {len(matrices)} two-dimensional arrays, none called 'X'; call the features 'X' (its arrays "
            f"are {listed(list(members))})"
        )
    name = "X" if "X" in matrices else matrices[0]
    if members[name].dtype.kind not in "biufO":
        raise TableError(f"array {name!r} is {members[name].dtype}; the features must be real numbers")
    return name


def _array(archive: zipfile.ZipFile, member: _Member) -> NDArray[Any]:
    """Read one array to the end of its entry, where zipfile compares the checksum."""
    if member.dtype.hasobject:
        raise TableError(f"{member.info.filename} holds a pickle, which is never loaded; store numbers or text")
    with archive.open(member.info) as stream:
        values: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        if stream.read(1):
            raise TableError(f"{member.info.filename} is longer than its header says; write it again")
    return values
