"""Fixtures of all tests."""

import itertools
import signal
import time

import pytest

from convexbn import _types

#: Seconds that a reading of the clock takes in tests: about what a step between two readings takes on an idle machine.
READING = 1e-3


@pytest.fixture(scope="session", autouse=True)
def interrupts():
    """Ctrl-C raises here and in new processes: a shell starts its jobs in the background with the signal ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="module")
def first_state(request):
    """State of the module's generator ``RNG`` once its constants are drawn; None without one."""
    generator = getattr(request.module, "RNG", None)
    return generator and generator.bit_generator.state


@pytest.fixture(autouse=True)
def numbers_in_any_order(request, first_state):
    """A test draws the same numbers whichever tests ran before it in its process."""
    if first_state is not None:
        request.module.RNG.bit_generator.state = first_state


@pytest.fixture(autouse=True)
def clock(request, monkeypatch):
    """Time limits of this process are of work: every reading of the clock is a millisecond.

    So no verdict depends on the load of the machine. A test marked ``cpu_clock`` has seconds of the processor, to
    measure whether all that is done between two readings keeps a limit too.
    """
    readings = itertools.count(1)
    in_seconds = request.node.get_closest_marker("cpu_clock") is not None
    monkeypatch.setattr(_types, "_clock", time.process_time if in_seconds else lambda: READING * next(readings))
