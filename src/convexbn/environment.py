"""Floating-point flags and BLAS threads during a solve, and the caller's own afterwards.

Underflow in float32 and the like is expected inside, whatever ``numpy.errstate`` the caller has set. Two
threads on a busy machine cost more than ten times the time of one on products of this size (they spin while
they wait), and win little on an idle one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import numpy as np

#: Rows up to which one BLAS thread is used.
SINGLE_THREAD_ROWS = 3000

_in_control = threading.Lock()


@contextmanager
def solving(n_rows: int) -> Iterator[None]:
    """Surround the solve of a problem of this size."""
    threads = _one_thread() if n_rows <= SINGLE_THREAD_ROWS else nullcontext()
    with np.errstate(all="ignore"), threads:
        yield


@contextmanager
def _one_thread() -> Iterator[None]:
    """One BLAS thread, set and given back by the first fit that is inside; its companions leave it alone."""
    if not _in_control.acquire(blocking=False):
        yield
        return
    try:
        with _controller().limit(limits=1, user_api="blas"):
            yield
    finally:
        _in_control.release()


@cache
def _controller() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
