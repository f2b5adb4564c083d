"""A worker: takes a job, evaluates it, keeps the result; its lease is renewed meanwhile."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from ditune.db.errors import EvaluationFault, StoreFault, StoreLost
from ditune.db.jobs import ATTEMPTS_MOST, LEASE_S, Holder, Jobs, Lease
from ditune.db.records import Job
from ditune.tuner.verdict import Found, trial_of

POLL_S = 0.2
PATIENCE_S = 600.0  # how long a database may be away
_RENEWALS = 4  # per lease
# in a row: one policy may fail in every attempt, another one after it hardly for the same reason
_FAULTS_MOST = 2 * ATTEMPTS_MOST
T = TypeVar("T")


class Runner(Protocol):
    """The unit of work: evaluates one job at a time, in this process or in another."""

    @property
    def device(self) -> str:
        """What it measures on, as `ditune.tuner.devices.device_name` names it."""

    def run(self, job: Job) -> Found:
        """Evaluate the job's policy on its cases.

        Raises:
            EvaluationFault: The process or the device failed; another attempt may succeed.
        """

    def stop(self) -> None:
        """End what runs, if that is possible; `run` then raises. Called from another thread."""

    def close(self) -> None:
        """Let go of processes and devices."""


class Worker:
    """Does the jobs of one study, one after the other."""

    def __init__(self, jobs: Jobs, study: str, runner: Runner, lease_s: float = LEASE_S) -> None:
        """Take a runner.

        Args:
            jobs: Of the database.
            study: Whose jobs.
            runner: Evaluates them.
            lease_s: After how long without a sign of life a job is given to another worker.
        """
        self._jobs = jobs
        self._study = study
        self._runner = runner
        self._lease_s = lease_s
        self._holder = Holder(runner.device)
        self._faults = 0

    def step(self) -> bool:
        """Do the next job; return whether there was one.

        A result that comes after the lease was lost is discarded: another worker has the job, and a
        process that was paused has measured nothing. A database that is away is waited for.

        Raises:
            EvaluationFault: So many attempts in a row failed here that it lies with this machine:
                it would only use up the attempts of every policy.
        """
        lease = patiently(lambda: self._jobs.claim(self._study, self._holder, self._lease_s))
        if lease is None:
            return False
        started = time.monotonic()
        try:
            with self._renewed(lease):
                found = self._runner.run(lease.job)
        except EvaluationFault as fault:
            self._failed(lease, str(fault))
            return True
        except BaseException:
            with contextlib.suppress(StoreFault):  # else the lease runs out
                self._jobs.give_back(lease)
            raise
        self._faults = 0
        trial = trial_of(lease.job, found, time.monotonic() - started)
        patiently(lambda: self._jobs.commit(lease, trial))
        return True

    def until_ended(self, wait: Callable[[float], object] = time.sleep) -> int:
        """Do jobs until the study's search has ended; return how many were begun."""
        begun = 0
        while True:
            if self.step():
                begun += 1
            elif patiently(lambda: self._jobs.ended(self._study)):
                return begun
            else:
                wait(POLL_S)

    def _failed(self, lease: Lease, why: str) -> None:
        patiently(lambda: self._jobs.fail(lease, why))
        self._faults += 1
        if self._faults == _FAULTS_MOST:
            raise EvaluationFault(
                f"{self._faults} evaluations in a row failed on {self._runner.device}, the last "
                f"because {why}: see what tune doctor says, then go on with the study"
            )

    @contextmanager
    def _renewed(self, lease: Lease) -> Iterator[None]:
        """Renew a lease in the background; when it is lost, end what runs."""
        over = threading.Event()

        def renew() -> None:
            while not over.wait(self._lease_s / _RENEWALS):
                with contextlib.suppress(StoreFault):  # the next time, or it runs out
                    if not self._jobs.renew(lease, self._lease_s):
                        self._runner.stop()
                        return

        thread = threading.Thread(target=renew, name="ditune-lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def patiently(
    action: Callable[[], T],
    most_s: float = PATIENCE_S,
    wait: Callable[[float], object] = time.sleep,
) -> T:
    """Do something that may be done again, until the database answers.

    Raises:
        StoreLost: It was away for longer than `most_s` seconds.
    """
    started = time.monotonic()
    pause_s = POLL_S
    while True:
        try:
            return action()
        except StoreLost:
            if time.monotonic() - started > most_s:
                raise
        wait(pause_s)
        pause_s = min(2.0 * pause_s, 5.0)
