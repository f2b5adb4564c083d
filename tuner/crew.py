"""Who evaluates what a search asks for: this process itself, or workers that share the database."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from ditune.db.jobs import Jobs
from ditune.tuner.worker import POLL_S, Worker

_RESERVE = 1  # jobs that wait when nobody is at work yet
_LOOK_S = 0.05  # a result that waits to be told makes nobody idle, as long as the reserve lasts
_LOOKS_PER_REAP = 20
_PER_RUNNING = 2  # one more waits for so many that run


class Crew(Protocol):
    """Evaluates jobs of a study; the results are found in the database."""

    def wanted(self, waiting: int, running: int) -> int:
        """Return how many more jobs to ask for now, given how many wait and how many run."""

    def work(self) -> None:
        """Do some of the work, or wait a moment for others to do it."""


class Alone:
    """One worker in the asking process: every job is asked for with all results known."""

    def __init__(self, worker: Worker, wait: Callable[[float], object] = time.sleep) -> None:
        """Take the worker."""
        self._worker = worker
        self._wait = wait

    def wanted(self, waiting: int, running: int) -> int:
        """Return one, unless a job waits."""
        return 0 if waiting else 1

    def work(self) -> None:
        """Do the next job; one that is still leased to a dead process is waited for."""
        if not self._worker.step():
            self._wait(POLL_S)


class Team:
    """Workers in other processes, on any number of machines.

    Some jobs always wait, so that nobody idles while the next point is thought out: the more run,
    the more may end at once. Not one more than that: each is asked for without the results of those
    before it.
    """

    def __init__(
        self, jobs: Jobs, study: str, wait: Callable[[float], object] = time.sleep
    ) -> None:
        """Take the database and the study whose leases are looked after."""
        self._jobs = jobs
        self._study = study
        self._wait = wait
        self._looks = 0

    def wanted(self, waiting: int, running: int) -> int:
        """Return how many jobs the reserve lacks."""
        return reserve_lacks(waiting, running)

    def work(self) -> None:
        """Take jobs back from workers that are gone, and wait a moment."""
        if self._looks % _LOOKS_PER_REAP == 0:
            self._jobs.reap(self._study)
        self._looks += 1
        self._wait(_LOOK_S)


def reserve_lacks(waiting: int, running: int) -> int:
    """Return how many more jobs should wait beside those that run."""
    return max(0, _RESERVE + running // _PER_RUNNING - waiting)
