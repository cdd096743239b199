"""Exit codes, early refusals and the format of numbers, for all commands."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Terminated(BaseException):
    """SIGTERM arrived."""


def say(message: str, code: int) -> int:
    """Print a sentence to standard error and return the exit code."""
    print(f"convexbn: {message}", file=sys.stderr)
    return code


def sentence_of(error: Exception) -> str:
    """Message of an error, without the number that the system gives it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fspath(error.filename)}: {error.strerror[0].lower()}{error.strerror[1:]}"
    return str(error)


def note(lines: Iterable[str]) -> None:
    """Print what was done to the data to standard error."""
    for line in lines:
        print(f"convexbn: {line}", file=sys.stderr)


def broken_off(signalled: BaseException, kept: str) -> int:
    """Print what an interrupted or terminated command keeps, and return the exit code."""
    word, code = ("interrupted", 130) if isinstance(signalled, KeyboardInterrupt) else ("terminated", 143)
    return say(f"{word}: {kept}.", code)


def check_writable(out: str, option: str = "--out") -> None:
    """Refuse a file that cannot be written, before any work."""
    folder = Path(out).resolve().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{option} {out}: the folder {folder} does not exist; create it first")
    if Path(out).is_dir():
        raise IsADirectoryError(f"{option} {out} is a folder; name a file in it")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{option} {out}: the folder {folder} cannot be written to")


def check_model_name(out: str) -> None:
    """Refuse a file that cannot be written, or whose name is that of another kind of file, before any work."""
    from convexbn.estimators.persistence import check_name

    check_writable(out)
    check_name(out)


def measure_of(task: str) -> str:
    """Name of the score of a task."""
    return "accuracy" if task == "classification" else "R^2"


def described(task: str, target: str | None, n_classes: int | None) -> str:
    """What is predicted, and the name of the score.

    Parameters
    ----------
    task, target, n_classes : str, str or None, int or None

    Examples
    --------
    >>> described("regression", "price", None), described("classification", None, 10)
    ('regression of price (R^2)', 'classification, 10 classes (accuracy)')
    """
    of = "" if target is None else f" of {target}"
    classes = "" if n_classes is None else f", {n_classes} classes"
    return f"{task}{of}{classes} ({measure_of(task)})"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warning that the printed sentence repeats."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def feature_names(model: Any) -> list[str] | None:
    """Names of the columns that the model was trained on, if it knows them."""
    if hasattr(model, "columns_"):
        return [column.name for column in model.columns_.used]
    if hasattr(model, "feature_names_in_"):
        return list(model.feature_names_in_)
    return getattr(model, "source_", {}).get("feature_names")


def number(value: float) -> float | None:
    """Number for strict JSON; None if it is not finite."""
    return float(value) if math.isfinite(value) else None


def numbers(of: Any, *names: str) -> dict[str, Any]:
    """Attributes of an object by name, numbers for strict JSON."""
    return {name: number(getattr(of, name)) for name in names}


def verdict(proof: Any) -> dict[str, Any]:
    """Numbers, status and scope of a certificate, for strict JSON."""
    values = numbers(proof, "objective", "lower_bound", "relative_gap")
    return values | {"status": proof.status.value, "scope": proof.scope}
