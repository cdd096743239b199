"""Zip archives of torch, audited before any entry is read: stored entries that fit into the file."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from typing import Any

from convexbn.files.model_file import FormatError

#: Bytes of a JSON text: hundreds of times those of three layers.
_MOST_JSON = 16 * 2**20
#: What the zipfile module raises on damaged files.
_DAMAGE = (zipfile.BadZipFile, ValueError, EOFError, RuntimeError, OSError, struct.error)


class Archive:
    """Entries of a zip file, named without the folder that holds them all.

    Entries that are compressed, overlap, repeat a name or share no folder are refused. Torch stores its entries
    uncompressed; a compressed one could be a thousand times larger than the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        try:
            with zipfile.ZipFile(path) as file:
                entries = [entry for entry in file.infolist() if not entry.is_dir()]
        except _DAMAGE as error:
            raise FormatError(f"its table of entries is damaged ({error}): copy it again") from None
        stored = all(e.compress_type == zipfile.ZIP_STORED and e.file_size == e.compress_size for e in entries)
        if not stored or sum(e.file_size for e in entries) > os.path.getsize(path):
            raise FormatError(
                "its entries are compressed or lie over one another (TorchScript's are): save the state dict, by "
                "torch.save(model.state_dict(), ...)"
            )
        self.names = {e.filename.partition("/")[2]: e.filename for e in entries}
        if len(self.names) < len(entries) or len({e.filename.partition("/")[0] for e in entries}) != 1:
            raise FormatError("its entries are not in one folder, each once: save the model again with torch")

    def read(self, name: str) -> bytes:
        """Return the bytes of an entry, verified by their checksum."""
        if name not in self.names:
            raise FormatError(f"it has no entry {name!r}: save the model again with torch")
        try:
            with zipfile.ZipFile(self._path) as file:
                return file.read(self.names[name])
        except _DAMAGE as error:
            raise FormatError(f"its entry {name!r} is damaged ({error}): copy it again") from None

    def rebuilt(self) -> io.BytesIO:
        """Return a new archive of the audited entries, so that another reader finds nothing else."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            for name in self.names:
                file.writestr(f"archive/{name}", self.read(name))
        buffer.seek(0)
        return buffer

    def read_json(self, name: str) -> Any:
        """Parse a JSON entry."""
        data = self.read(name)
        if len(data) > _MOST_JSON:
            raise FormatError(f"its entry {name!r} has more than {_MOST_JSON} bytes: export a smaller model")
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"its entry {name!r} is no JSON ({error}): export the model again") from None
