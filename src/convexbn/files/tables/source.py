"""Bytes of text tables: decompressed, with line feeds."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from convexbn.files.tables.table import TableError, sound

COMPRESSED = (".gz", ".bz2", ".xz", ".zip")
_DAMAGE = (EOFError, RuntimeError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile)


@contextmanager
def opened(path: Path, *, strict: bool) -> Iterator[Any]:
    """Context of an object whose ``readline(limit)`` returns the lines of a text file, plain or compressed.

    Parameters
    ----------
    path : Path
    strict : bool
        Whether a file whose lines end in carriage returns alone is refused.
    """
    ending = path.suffix.lower()
    with path.open("rb") as file:
        if ending not in COMPRESSED:
            yield _with_line_feeds(file, strict)
            return
        with sound(f"{ending} file", *_DAMAGE), _decompressed(file, ending) as stream:
            yield _with_line_feeds(stream, strict)


@contextmanager
def _decompressed(file: Any, ending: str) -> Iterator[IO[bytes]]:
    if ending == ".zip":
        with zipfile.ZipFile(file) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if len(members) != 1:
                raise TableError(f"holds {len(members)} files; pack one table")
            with archive.open(members[0]) as stream:
                yield stream
        return
    opening: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[ending]
    with opening(file) as stream:
        yield stream


def _with_line_feeds(stream: Any, strict: bool) -> Any:
    """Return the stream, or one that reads a carriage return as the end of a line if there are no line feeds."""
    start = stream.peek(1 << 16)
    if b"\r" not in start[:-1] or b"\n" in start:
        return stream
    if strict:
        raise TableError("line 1: lines end in carriage returns alone; save the file with line feeds")
    return _Translated(stream)


class _Translated:
    """Lines of a stream whose lines end in carriage returns."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._text = io.TextIOWrapper(stream, "latin-1", newline=None)  # byte for byte

    def readline(self, limit: int) -> bytes:
        return self._text.readline(limit).encode("latin-1")
