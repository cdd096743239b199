"""What the commands share: exit codes, refusals before any work, and how numbers are told."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INTERRUPTED, TERMINATED = 130, 143


class Terminated(BaseException):
    """SIGTERM arrived."""


def say(message: str, code: int) -> int:
    """Print a sentence to standard error; returns the code."""
    print(f"convexbn: {message}", file=sys.stderr)
    return code


def check_writable(out: str, option: str = "--out") -> None:
    """Refuse, before any work, a place that cannot be written to."""
    folder = Path(out).resolve().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{option} {out}: the folder {folder} does not exist; create it first")
    if Path(out).is_dir():
        raise IsADirectoryError(f"{option} {out} is a folder; name a file in it")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{option} {out}: the folder {folder} cannot be written to")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warning that the printed sentence repeats."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def feature_names(model: Any) -> list[str] | None:
    """Columns that the model was trained on, by name, where it knows them."""
    if hasattr(model, "feature_names_in_"):
        return list(model.feature_names_in_)
    return getattr(model, "source_", {}).get("feature_names")


def number(value: float) -> float | None:
    """What strict JSON holds of a number."""
    return float(value) if math.isfinite(value) else None


def ending(signalled: BaseException) -> tuple[str, int]:
    """What a signal did, in a word, and the exit code."""
    if isinstance(signalled, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    return "terminated", TERMINATED
