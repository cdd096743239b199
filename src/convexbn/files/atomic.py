"""Files replaced in one step: at every instant the former file or the new one is there, complete."""

import contextlib
import errno
import functools
import os
import secrets
import stat
from collections.abc import Iterator


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file through ``.<name>.<random>.tmp`` in the same folder.

    Symbolic links are followed, and a former file keeps its permissions. Only a killed process leaves the temporary
    file behind; it is never read and may be deleted. After an OSError, which names `path`, the former file is intact,
    unless only the sync of the folder failed.
    """
    with naming(path):
        target = os.path.realpath(path)
        former = regular(target) if os.path.lexists(target) else None
        folder, name = os.path.split(target)
        temporary = os.path.join(folder, f".{name[:40]}.{secrets.token_hex(8)}.tmp")
        # Permissions no wider than those of the former file, so that nobody can read more while it is written.
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


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let OS errors name the caller's file, not the temporary one; a name with a NUL character is one."""
    if b"\0" in os.fsencode(path):
        raise OSError(errno.EINVAL, "A file name cannot hold a NUL character", os.fspath(path))
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def regular(path: str | os.PathLike[str]) -> os.stat_result:
    """Return the status of a regular file; refuse folders, devices and pipes."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL, "Not a regular file")
    return status


def _sync_folder(folder: str) -> None:
    """Make the new name survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
