"""The pool of threads: settings of other threads, errors, and the CPU time of a work."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from ditune.kernels.cpu_pool import Pool, pool_of


def in_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_only_its_own_threads_have_one_blas_thread() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        pool, seen = Pool(2), [0, 0]

        def look(share: int) -> None:
            seen[share] = torch.get_num_threads()

        pool.run(look, [0, 1])
        assert seen == [1, 1]
        assert (torch.get_num_threads(), in_new_thread()) == (3, 3)
    finally:
        torch.set_num_threads(before)


def test_threads_stay_and_one_alone_is_the_caller() -> None:
    assert pool_of(2) is pool_of(2)
    names: list[str] = []
    pool_of(2).run(lambda _: names.append(threading.current_thread().name), [0, 1])
    assert len(set(names)) == 2
    before = torch.get_num_threads()
    try:
        for own, inside in ((1, True), (2, False)):  # two BLAS threads are not one
            torch.set_num_threads(own)
            where: list[threading.Thread] = []
            pool_of(1).run(lambda seen: seen.append(threading.current_thread()), [where])
            assert (where == [threading.current_thread()]) is inside
    finally:
        torch.set_num_threads(before)


def test_an_error_is_raised_after_all_have_ended() -> None:
    ended = threading.Event()

    def work(share: int) -> None:
        if share == 0:
            raise ValueError("no")
        time.sleep(0.05)
        ended.set()

    with pytest.raises(ValueError, match="no"):
        pool_of(2).run(work, [0, 1])
    assert ended.is_set()


def burn(seconds: float) -> None:
    started = time.thread_time()
    while time.thread_time() - started < seconds:
        pass


def test_makespan_is_the_caller_and_the_busiest_thread() -> None:
    pool = pool_of(2)

    def work() -> None:
        burn(0.02)
        pool.run(burn, [0.01, 0.05])

    assert 0.07 <= pool.makespan(work) < 0.12
    assert 0.02 <= Pool(0).makespan(lambda: burn(0.02)) < 0.06
