"""Jobs and leases: what is to be evaluated, who does it, and until when nobody else may.

A job is `waiting`, then `running` under a lease, then `done`. A lease ends by the database's clock:
who does not renew it in time has lost it, whatever it thinks itself. Its job then waits again, and
after some attempts the trial is a failed one. A result is kept together with the end of its job, or
not at all, so that none is lost and none counts twice.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import Engine, Select, and_, delete, func, or_, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from ditune.db.asker import sole_asker
from ditune.db.engine import sqlite_file
from ditune.db.errors import UsageFault
from ditune.db.parsing import parse
from ditune.db.record import now
from ditune.db.records import Job, Trial
from ditune.db.rows import body, insert_new, keep_trial
from ditune.db.schema import JobRow, SearchRow, StudyRow, TrialRow
from ditune.db.transactions import Transactions

LEASE_S = 60.0  # holders renew theirs four times as often
ATTEMPTS_MOST = 3
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Holder:
    """Who holds leases: one process, on one device that it measures alone."""

    device: str  # unique among all machines: no two leases share one
    host: str = field(default_factory=socket.gethostname)
    boot: str = field(default_factory=lambda: _BOOT.read_text().strip() if _BOOT.exists() else "")
    worker: str = field(default_factory=lambda: f"{os.getpid()}-{uuid.uuid4().hex}")


@dataclass(frozen=True)
class Lease:
    """The right to do a job, for the time being."""

    job: Job
    holder: Holder
    attempt: int  # from 1; tells this lease from an earlier one of the same holder


class Jobs(Transactions):
    """The jobs of one database; all of its methods may be called from several threads."""

    def __init__(self, engine: Engine) -> None:
        """Wrap an engine whose database has this release's schema."""
        super().__init__(engine)
        self.shared = sqlite_file(engine.url) is None  # whether other machines may take part

    # --- for the process that asks ---------------------------------------------------------------

    def begin(self, study: str) -> None:
        """Say that a study's search goes on; jobs of its earlier runs are there again.

        A SQLite database has one asking process, which also evaluates: whatever ran has died.

        Raises:
            UsageFault: The study was never saved.
        """
        with self._writing() as session:
            if session.get(StudyRow, study) is None:
                raise UsageFault(f"{self.where} holds no study {study}: save it first")
            insert_new(session, SearchRow, {"study": study, "ended_at": None})
            session.get_one(SearchRow, study).ended_at = None
            if not self.shared:
                for row in session.scalars(_running().where(JobRow.study == study)):
                    _end_attempt(session, row, "the process that evaluated it ended")

    def sole_asker(self, study: str) -> AbstractContextManager[Callable[[], None]]:
        """Keep every other process from asking for jobs of a study; see `ditune.db.asker`.

        Raises:
            UsageFault: Another process does.
        """
        return sole_asker(self._engine, study)

    def end(self, study: str) -> None:
        """Say that nothing more is asked for: workers that wait may go."""
        with self._writing() as session:
            session.get_one(SearchRow, study).ended_at = now()

    def ended(self, study: str) -> bool:
        """Whether a study's search has ended, or never began."""
        with self._reading() as session:
            row = session.get(SearchRow, study)
            return row is None or row.ended_at is not None

    def open_searches(self) -> list[str]:
        """Return the studies whose searches go on, the newest first."""
        query = select(SearchRow.study).where(SearchRow.ended_at.is_(None))
        query = query.join(StudyRow, StudyRow.name == SearchRow.study)
        with self._reading() as session:
            return list(session.scalars(query.order_by(StudyRow.created_at.desc())))

    def put(self, job: Job) -> None:
        """Ask for an evaluation; asking twice is asking once.

        Raises:
            StoreFault: Another job or trial of the study has its number.
        """
        row = {
            "uuid": job.uuid,
            "study": job.study,
            "number": job.number,
            "state": "waiting",
            "attempts": 0,
            "body": body(job),
            "created_at": now(),
        }
        with self._writing() as session:
            insert_new(session, JobRow, row)

    def unfinished(self, study: str) -> dict[str, Job]:
        """Return the jobs of a study that have no result yet, by uuid."""
        query = select(JobRow.body).where(JobRow.study == study, JobRow.state != "done")
        with self._reading() as session:
            found = [self._job(text) for text in session.scalars(query.order_by(JobRow.number))]
        return {job.uuid: job for job in found}

    def counts(self, study: str) -> tuple[int, int]:
        """Return how many jobs of a study wait, and how many run."""
        query = select(JobRow.state, func.count()).where(JobRow.study == study)
        with self._reading() as session:
            found = {state: count for state, count in session.execute(query.group_by(JobRow.state))}
        return found.get("waiting", 0), found.get("running", 0)

    def holders(self, study: str) -> list[str]:
        """Return the workers that hold a lease on a job of a study."""
        query = select(JobRow.worker).where(JobRow.study == study, JobRow.state == "running")
        with self._reading() as session:
            return [worker for worker in session.scalars(query) if worker is not None]

    def done(self, uuids: Sequence[str]) -> set[str]:
        """Return which of some jobs have a result."""
        query = select(JobRow.uuid).where(JobRow.uuid.in_(uuids), JobRow.state == "done")
        with self._reading() as session:
            return set(session.scalars(query))

    def next_number(self, study: str) -> int:
        """Return the first number that no trial and no job of a study has."""
        with self._reading() as session:
            numbers = [
                session.scalar(select(func.max(table.number)).where(table.study == study))
                for table in (TrialRow, JobRow)
            ]
        return 1 + max((number for number in numbers if number is not None), default=-1)

    def withdraw(self, study: str) -> list[str]:
        """Take back every job of a study that nobody has begun; return their uuids."""
        query = select(JobRow).where(JobRow.study == study, JobRow.state == "waiting")
        with self._writing() as session:
            rows = session.scalars(query.with_for_update(skip_locked=True)).all()
            uuids = [row.uuid for row in rows]
            session.execute(delete(JobRow).where(JobRow.uuid.in_(uuids)))
        return uuids

    def reap(self, study: str) -> None:
        """Let jobs wait again whose leases ran out; fail those that did so too often."""
        with self._writing() as session:
            _reap(session, study, None, self._clock_ms(session))

    # --- for whoever evaluates -------------------------------------------------------------------

    def claim(self, study: str, holder: Holder, lease_s: float = LEASE_S) -> Lease | None:
        """Take the next job of a study; None if there is none, or the device is in use.

        Args:
            study: Its jobs are taken by number.
            holder: Who asks; its device is its own until the lease ends.
            lease_s: Seconds until the lease ends, unless it is renewed.
        """
        with self._writing() as session:
            clock_ms = self._clock_ms(session)
            _reap(session, study, holder, clock_ms)
            query = select(JobRow).where(JobRow.study == study, JobRow.state == "waiting")
            query = query.order_by(JobRow.number).limit(1).with_for_update(skip_locked=True)
            row = session.scalars(query).first()
            if row is None:
                return None
            try:
                with session.begin_nested():
                    row.state, row.attempts = "running", row.attempts + 1
                    row.worker, row.host, row.boot = holder.worker, holder.host, holder.boot
                    row.device, row.expires_ms = holder.device, clock_ms + round(lease_s * 1000)
            except IntegrityError:  # the unique index over devices that are in use
                return None
            return Lease(self._job(row.body), holder, row.attempts)

    def renew(self, lease: Lease, lease_s: float = LEASE_S) -> bool:
        """Extend a lease; return whether it was still held."""
        with self._writing() as session:
            row = self._held(session, lease)
            if row is not None:
                row.expires_ms = self._clock_ms(session) + round(lease_s * 1000)
            return row is not None

    def commit(self, lease: Lease, trial: Trial) -> bool:
        """Keep the result of a job; return False where the lease was lost before, and it is not.

        Committing again what was kept is True: the answer to the first time may have been lost.
        """
        with self._writing() as session:
            row = self._held(session, lease)
            if row is None:
                kept = session.get(TrialRow, trial.uuid)
                return kept is not None and kept.body == body(trial)
            keep_trial(session, trial)
            _finish(row)
            return True

    def give_back(self, lease: Lease) -> None:
        """Let a job wait again that was not tried to its end, as if it had never been taken."""
        with self._writing() as session:
            row = self._held(session, lease)
            if row is not None:
                row.attempts -= 1
                _free(row)

    def fail(self, lease: Lease, why: str) -> None:
        """End an attempt that gave no result; after some the trial is a failed one."""
        with self._writing() as session:
            row = self._held(session, lease)
            if row is not None:
                _end_attempt(session, row, why)

    # --- inside ----------------------------------------------------------------------------------

    def _held(self, session: Session, lease: Lease) -> JobRow | None:
        """Return the row of a lease, locked, if the lease is still held."""
        query = select(JobRow).where(JobRow.uuid == lease.job.uuid).with_for_update()
        row = session.scalars(query).first()
        if row is None or row.state != "running" or row.expires_ms is None:
            return None
        mine = (row.worker, row.attempts) == (lease.holder.worker, lease.attempt)
        return row if mine and row.expires_ms > self._clock_ms(session) else None

    def _clock_ms(self, session: Session) -> int:
        """Return the time on the database's clock, in milliseconds.

        Of a server it is its own clock, so that those of other machines do not matter. A SQLite
        file lies on one machine: there it is the clock that nobody can set, from its start.
        """
        if not self.shared:
            return time.monotonic_ns() // 1_000_000
        seconds = session.scalar(text("SELECT extract(epoch FROM clock_timestamp())"))
        return int(1000 * seconds)

    def _job(self, text: str) -> Job:
        return parse(Job, text, f"a job in {self.where}")


def _running() -> Select[JobRow]:
    return select(JobRow).where(JobRow.state == "running").with_for_update(skip_locked=True)


def _reap(session: Session, study: str, holder: Holder | None, clock_ms: int) -> None:
    """End the attempts whose leases ran out, or whose machine was started anew since.

    Those of other studies too, where they still hold the device that is asked for.
    """
    ours, over = JobRow.study == study, JobRow.expires_ms <= clock_ms
    if holder is not None:
        ours = or_(ours, JobRow.device == holder.device)
        over = or_(over, and_(JobRow.host == holder.host, JobRow.boot != holder.boot))
    for row in session.scalars(_running().where(ours, over)):
        _end_attempt(session, row, f"its worker on {row.host} stopped answering")


def _end_attempt(session: Session, row: JobRow, why: str) -> None:
    """Let a job wait again after an attempt without a result, or fail its trial."""
    if row.attempts < ATTEMPTS_MOST:
        _free(row)
        return
    job = parse(Job, row.body, "a job")
    failed = Trial(
        uuid=job.uuid,
        study=job.study,
        number=job.number,
        source=job.source,
        policy=job.policy,
        state="failed",
        speedup=None,
        work_ratio=None,
        quality={},
        violation={},
        reason=f"{row.attempts} attempts gave no result, the last because {why}",
        duration_s=0.0,
        created_at=now(),
    )
    keep_trial(session, failed)
    _finish(row)


def _free(row: JobRow) -> None:
    row.state, row.expires_ms = "waiting", None


def _finish(row: JobRow) -> None:
    row.state, row.expires_ms = "done", None
