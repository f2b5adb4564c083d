"""Threads that stay, each with a BLAS of one thread, and the CPU time that they take."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial
from typing import TypeVar

import torch

Share = TypeVar("Share")
_CLEARED = 2**26  # bytes, twice of what caches usually hold


class Pool:
    """A number of threads that run one share of a work each; without any, the caller runs it all.

    Torch lets go of the interpreter's lock inside of its operations, so threads run beside each
    other. Each is a queue of its own: a share never waits behind another one's.
    """

    def __init__(self, workers: int) -> None:
        """Start the threads and leave the number of BLAS threads of all others as it is."""
        self._threads = [
            ThreadPoolExecutor(1, f"cpu-tiles-{number}", initializer=_one_blas_thread)
            for number in range(workers)
        ]
        default = _in_new_thread(torch.get_num_threads)
        self.clocks()
        # what a thread sets for itself is also what torch gives to threads that come later
        _in_new_thread(lambda: torch.set_num_threads(default))

    @property
    def size(self) -> int:
        """Shares that run at the same time."""
        return max(1, len(self._threads))

    def run(self, work: Callable[[Share], None], shares: Sequence[Share]) -> None:
        """Run a work on one share per thread, without gradients, and wait for all of them.

        In the caller's inference mode, without which nobody may write into tensors made in it.

        Args:
            work: What is called with each share.
            shares: As many as `size`.
        """
        modes = partial(_in_modes, work, torch.is_inference_mode_enabled())
        if not self._threads:
            for share in shares:
                modes(share)
            return
        running = [
            thread.submit(modes, share) for thread, share in zip(self._threads, shares, strict=True)
        ]
        wait(running)  # nobody may still write when the first error is raised
        for future in running:
            future.result()

    def clocks(self) -> list[float]:
        """Return the CPU seconds that each thread has taken so far; none without threads."""
        return [thread.submit(time.thread_time).result() for thread in self._threads]

    def makespan(self, work: Callable[[], object]) -> float:
        """Return the CPU seconds of the caller and of the busiest thread while a work is done.

        It is how long the work would take if nobody else used the CPU and no thread waited.
        """
        before, started = self.clocks(), time.thread_time()
        work()
        alone = time.thread_time() - started
        busy = [end - start for end, start in zip(self.clocks(), before, strict=True)]
        return alone + max(busy, default=0.0)


def clear_caches() -> None:
    """Push what lies in the processor's caches out of them, as a model's other layers do."""
    _filler().add_(1.0)


@cache
def _filler() -> torch.Tensor:
    return torch.zeros(_CLEARED // 4, dtype=torch.float32)


def pool_of(threads: int | None = None) -> Pool:
    """Return the pool of a number of threads, always the same one.

    Args:
        threads: How many; by default as many as the caller lets torch use.
    """
    own = torch.get_num_threads()
    threads = threads or own
    return _pool(0 if threads == own == 1 else threads)


@cache
def _pool(workers: int) -> Pool:
    return Pool(workers)


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


def _one_blas_thread() -> None:
    torch.get_num_threads()  # torch sets a thread up when it is first asked, not later
    torch.set_num_threads(1)


def _in_new_thread(question: Callable[[], int | None]) -> int:
    """Return what a function returns in a thread that has just begun."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(question() or 0))
    thread.start()
    thread.join()
    return found[0]


def _in_modes(work: Callable[[Share], None], inference: bool, share: Share) -> None:
    with torch.inference_mode(inference), torch.no_grad():  # each thread has switches of its own
        work(share)
