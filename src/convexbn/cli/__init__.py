"""The command line: ``convexbn fit | predict | certify | path | reproduce | report``, one file a command."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TextIO

from convexbn._version import __version__
from convexbn.cli import certify, fit, path, predict, report, reproduce
from convexbn.cli.output import Terminated, broken_off, say, sentence_of

#: What Python's own MemoryError leaves out.
_WITHOUT_WORDS = "out of memory: raise the limit of this process, or give it fewer rows or gates"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()  # closed by `>&-`
    options = _parser().parse_args(arguments)
    in_main = threading.current_thread() is threading.main_thread()
    former = signal.signal(signal.SIGTERM, _terminate) if in_main else None
    try:
        code: int = options.command(options)
        sys.stdout.flush()
        return code
    except (KeyboardInterrupt, Terminated) as signalled:
        return broken_off(signalled, "nothing was written")
    except BrokenPipeError:  # `convexbn ... | head`: the reader has enough
        return 0
    except (ValueError, TypeError, OSError, MemoryError, ImportError) as error:
        return say(f"error: {sentence_of(error) or _WITHOUT_WORDS}", 1)
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, former)
        for stream in (sys.stdout, sys.stderr):
            _settle(stream)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convexbn", description="Batch-normalised ReLU networks trained to a certified global optimum."
    )
    parser.add_argument("--version", action="version", version=f"convexbn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="fit | predict | certify | path | reproduce | report")
    for command in (fit, predict, certify, path, reproduce, report):
        command.add_parser(commands)
    return parser


def _terminate(signum: int, frame: object) -> None:
    raise Terminated


def _settle(stream: TextIO) -> None:
    """Drop the rest of a stream that cannot be written: Python would flush it again as it ends, and fail."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _nowhere() -> TextIO:
    return os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
