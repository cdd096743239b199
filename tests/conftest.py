"""Fixtures of all tests."""

import signal

import pytest


@pytest.fixture(scope="session", autouse=True)
def interrupts():
    """Ctrl-C raises here and in new processes: a shell starts its jobs in the background with the signal ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)
