"""Progress of a solve: one updated line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from convexbn.solvers import base

#: Seconds between plain lines.
_INTERVAL = 2.0


@contextmanager
def reporter(stream: TextIO) -> Iterator[Callable[[base.Progress], None]]:
    """Give a callback for the solver that draws its progress on ``stream``."""
    if stream.isatty():
        from rich.console import Console
        from rich.status import Status

        with Status("whitening", console=Console(file=stream)) as status:
            yield lambda progress: status.update(_line(progress))
    else:
        yield _Lines(stream).report


@contextmanager
def counter(stream: TextIO) -> Iterator[Callable[[int, int, str], None]]:
    """Give a callback ``(finished, total, what is being done)`` that draws how far a run of parts is."""
    if stream.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(file=stream)) as bar:
            task = bar.add_task("")
            yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
    else:
        lines = _Lines(stream)
        yield lambda done, total, what: lines.print(f"{done}/{total} finished   {what}".rstrip())


class _Lines:
    """Lines on a stream; of a solve the first iteration and then at most one every two seconds."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.due = 0.0

    def report(self, progress: base.Progress) -> None:
        """Print a line when one is due; a reader that went away ends the lines, not the work."""
        if time.monotonic() < self.due:
            return
        self.due = time.monotonic() + _INTERVAL
        self.print(_line(progress))

    def print(self, line: str) -> None:
        """Print a line, or no more from now on."""
        try:
            print(line, file=self.stream, flush=True)
        except OSError:
            self.due = math.inf


def _line(progress: base.Progress) -> str:
    return (
        f"iteration {progress.iteration}   objective {progress.objective:.6g}   "
        f"gap {progress.relative_gap:.1e}   working set {progress.working_set}"
    )
