"""Count of what a run has finished: one updated line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeAlias

#: Callback ``(finished, total, what is being done)``.
Report: TypeAlias = Callable[[int, int, str], None]


@contextmanager
def counter(stream: TextIO, interval: float = 0.0) -> Iterator[Report]:
    """Context of a callback ``(finished, total, what is being done)`` that shows the progress of a run.

    ``interval`` is the least time between plain lines, in seconds.
    """
    if stream.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Left

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), Left(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(file=stream)) as bar:
            task = bar.add_task("")
            yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
    else:
        lines = Lines(stream, interval)
        yield lambda done, total, what: lines.offer(lambda: f"{done}/{total} finished   {what}".rstrip())


class Lines:
    """Lines on a stream, at most one an interval; if its reader went away, the lines end, not the work."""

    def __init__(self, stream: TextIO, interval: float) -> None:
        self.stream, self.interval, self.due = stream, interval, 0.0

    def offer(self, line: Callable[[], str]) -> None:
        """Print a line if one is due; the last if that fails."""
        if time.monotonic() < self.due:
            return
        self.due = time.monotonic() + self.interval
        try:
            print(line(), file=self.stream, flush=True)
        except OSError:
            self.due = math.inf
