"""Progress of a command: one updated line on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from convexbn.estimators.counter import Lines
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
        lines = Lines(stream, _INTERVAL)
        yield lambda progress: lines.offer(lambda: _line(progress))


def _line(progress: base.Progress) -> str:
    told, word = f"iteration {progress.iteration}   objective {progress.objective:.6g}", "gap"
    if progress.estimated_bound is not None:  # by a search for neurons, which proves nothing
        word = "estimated gap"
    return f"{told}   {word} {progress.estimated_gap:.1e}   working set {progress.working_set}"
