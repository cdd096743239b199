"""Fixtures of all tests."""

import signal

import pytest


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
