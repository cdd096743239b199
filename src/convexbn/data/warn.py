"""Warnings at the line of the user, one a fit."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

_Messages: TypeAlias = dict[str, type[Warning]]

#: Packages whose lines are not the user's.
_NOT_THE_USER = {"convexbn", "sklearn", "joblib", "numpy", "contextlib"}

_collected: ContextVar[_Messages | None] = ContextVar("collected", default=None)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called the package, at once or at the end of a ``one_warning``."""
    if (messages := _collected.get()) is not None:
        messages[message] = category
        return
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _NOT_THE_USER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


@contextmanager
def collected() -> Iterator[_Messages]:
    """Context that keeps its warnings, each once, with their categories."""
    messages: _Messages = {}
    token = _collected.set(messages)
    try:
        yield messages
    finally:
        _collected.reset(token)


@contextmanager
def one_warning() -> Iterator[None]:
    """Context of at most one warning: all messages in one, of the last one's category; an inner one adds to it."""
    with collected() as messages:
        yield
    if messages:
        warn(" ".join(messages), [*messages.values()][-1])
