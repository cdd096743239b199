"""Other processes, and the CPU seconds that they take: a busy machine stretches the clock, not these."""

import os
import resource
import time
from pathlib import Path


def ended_by(process, number):
    """Send a signal and wait for the end: output, errors, and CPU seconds in between (without /proc, seconds)."""
    before, sent = _finished(), time.monotonic()
    spent = _spent(process.pid)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return out, err, time.monotonic() - sent if spent is None else _finished() - before - spent


def _finished():
    """CPU seconds of all processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _spent(pid):
    """CPU seconds of a running process so far."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        return None
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
