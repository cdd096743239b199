"""Work that threads share: results in order, BLAS as it was before."""

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from convexbn._threads import blas_threads, parallel_map, single_scipy_blas, workers


def threads_of_blas():
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


@pytest.fixture(autouse=True)
def two_threads():
    with threadpool_limits(2, user_api="blas"):
        assert 2 in threads_of_blas()
        yield


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_dealt_work_comes_back_in_order_with_one_blas_thread(count):
    before, seen = threads_of_blas(), []

    def work(i):
        seen.append(threads_of_blas())
        return i * i

    assert list(parallel_map(work, range(count))) == [i * i for i in range(count)]
    assert threads_of_blas() == before
    assert count < 2 or all(threads == {1} for threads in seen)


def test_an_error_in_a_thread_reaches_the_caller():
    before = threads_of_blas()
    with pytest.raises(ZeroDivisionError):
        list(parallel_map(lambda i: 1 // i, [2, 1, 0, 3]))
    assert threads_of_blas() == before


def test_workers_take_every_item():
    with workers() as threads:
        assert threads.each(lambda i: i + 1, list(range(5))) == [1, 2, 3, 4, 5]
        assert np.array_equal(threads.each(np.sum, [np.ones(3), np.ones(4)]), [3, 4])


def test_threads_have_the_flags_of_the_caller():
    with np.errstate(over="ignore", divide="raise"), workers() as threads:
        flags = threads.each(lambda _: np.geterr(), range(4))
    assert all(one == flags[0] for one in flags) and flags[0]["divide"] == "raise"


def test_numpy_alone_has_threads_whoever_comes_and_goes_meanwhile():
    def now():
        return {library["filepath"]: library["num_threads"] for library in threadpool_info()}

    before = now()
    alone = {path: 1 if "scipy.libs" in path else threads for path, threads in before.items()}
    first, second = blas_threads(100), single_scipy_blas()
    first.__enter__()
    second.__enter__()
    assert threads_of_blas() == {1}
    first.__exit__(None, None, None)  # not in the order of a stack, as it happens among threads
    assert now() == alone
    second.__exit__(None, None, None)
    assert now() == before
