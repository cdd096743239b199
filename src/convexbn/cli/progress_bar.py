"""Progress of a command: one updated line on a terminal, plain lines elsewhere."""

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
    """Context of a callback that shows a solver's progress on ``stream``."""
    if stream.isatty():
        from rich.console import Console
        from rich.status import Status

        with Status("whitening", console=Console(file=stream)) as status:
            yield lambda progress: status.update(_line(progress))
    else:
        yield _Lines(stream).report


@contextmanager
def counter(stream: TextIO) -> Iterator[Callable[[int, int, str], None]]:
    """Context of a callback ``(finished, total, what is being done)`` that shows the progress of a run."""
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
    """Lines on a stream; if its reader went away, the lines end, not the work."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.due = stream, 0.0

    def report(self, progress: base.Progress) -> None:
        """Print the first iteration, then at most one every two seconds."""
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + _INTERVAL
            self.print(_line(progress))

    def print(self, line: str) -> None:
        """Print a line; the last if that fails."""
        try:
            print(line, file=self.stream, flush=True)
        except OSError:
            self.due = math.inf


def _line(progress: base.Progress) -> str:
    told, word = f"iteration {progress.iteration}   objective {progress.objective:.6g}", "gap"
    if progress.estimated_bound is not None:  # by a search for neurons, which proves nothing
        word = "estimated gap"
    return f"{told}   {word} {progress.estimated_gap:.1e}   working set {progress.working_set}"
