"""Floating-point flags and BLAS threads during a solve; afterwards the caller's own are restored.

Underflow in float32 and the like is expected inside, whatever ``numpy.errstate`` the caller has set. Two threads on a
busy machine take more than ten times as long as one on products of this size (they spin while they wait), and gain
little on an idle one.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from threadpoolctl import OpenBLASController, ThreadpoolController

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Rows up to which one BLAS thread is used.
SINGLE_THREAD_ROWS = 3000


@contextmanager
def blas_threads(n_rows: int) -> Iterator[None]:
    """Context manager of a solve: no floating-point warnings, and one BLAS thread if the rows are few."""
    threads = _threads.single("all") if n_rows <= SINGLE_THREAD_ROWS else nullcontext()
    with np.errstate(all="ignore"), threads:
        yield


def single_scipy_blas() -> AbstractContextManager[None]:
    """Limit SciPy's BLAS to one thread while NumPy products and small SciPy factorisations alternate.

    The wheels of NumPy and SciPy each bring a BLAS, whose threads spin for a while after a call. On an idle machine the
    two pools together took two to four times as long as one thread.
    """
    return _threads.single("scipy")


class Workers:
    """Thread pool for the parts of a batch."""

    def __init__(self, pool: ThreadPoolExecutor, count: int) -> None:
        self._pool, self.count = pool, count

    def each(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Results of ``work`` on the items, in order; the caller's thread takes the first.

        All threads have the floating-point flags of the caller.
        """
        with_flags = np.errstate(**np.geterr())(work)
        rest = [self._pool.submit(with_flags, item) for item in items[1:]]
        return [work(items[0]), *(future.result() for future in rest)]


@contextmanager
def workers() -> Iterator[Workers]:
    """Pool of as many threads as BLAS had; meanwhile BLAS has one. Unlike its threads, ours sleep while they wait."""
    count = max((library["num_threads"] for library in _controller().select(user_api="blas").info()), default=1)
    with _threads.single("all"), ThreadPoolExecutor(count) as pool:
        yield Workers(pool, count)


def parallel_map(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Results of ``work`` on the items, in order, as many at a time as there are threads."""
    waiting = list(items)
    if len(waiting) == 1:
        yield work(waiting[0])
        return
    with workers() as threads:
        for start in range(0, len(waiting), threads.count):
            yield from threads.each(work, waiting[start : start + threads.count])


class _Threads:
    """BLAS thread limits, shared by all threads of the process; restored when the last context is left."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), Counter[str](), list[int]()

    @contextmanager
    def single(self, of: str) -> Iterator[None]:
        """Limit ``"all"`` libraries, or those of ``"scipy"``, to one thread."""
        self._change(of, 1)
        try:
            yield
        finally:
            self._change(of, -1)

    def _change(self, of: str, by: int) -> None:
        with self._lock:
            libraries = _controller().select(user_api="blas").lib_controllers
            if not self._inside.total():
                self._before = [library.num_threads for library in libraries]
            self._inside[of] += by
            _release_control()
            for library, before in zip(libraries, self._before, strict=True):
                its_own = Path(library.filepath).parent.name.startswith("scipy")
                alone = self._inside["all"] or (its_own and self._inside["scipy"])
                library.set_num_threads(1 if alone else before)
            _release_control()


def _release_control() -> None:
    """Let any thread set OpenBLAS's limit, which newer threadpoolctl leaves to the thread that set it first."""
    if clear := getattr(OpenBLASController, "clear_controlling_thread", None):
        clear(force=True)


_threads = _Threads()
_controller = cache(ThreadpoolController)
