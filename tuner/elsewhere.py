"""Evaluating outside of the process that searches: in a child here, or by workers anywhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import torch

from ditune.db.errors import UsageFault
from ditune.db.jobs import Jobs
from ditune.db.records import Hardware, Origin, Profile, Settings, Software
from ditune.tuner.child import Child, Limits
from ditune.tuner.crew import Alone, Crew, Team
from ditune.tuner.evaluate import Evaluator
from ditune.tuner.source import Source, move
from ditune.tuner.worker import POLL_S, Worker

_HOST_SHARE = 0.9  # of the machine's memory: the system kills at random before all is taken
_SLOWER = 20.0  # than the plain pipeline: what takes longer hangs
_SPARE_S = 60.0


@dataclass(frozen=True)
class Elsewhere:
    """Where a search's policies are evaluated, if not in its own process."""

    origin: Origin
    device: str | None = None  # of a child, as torch names it; None: where loading puts it
    workers: bool = False  # other processes that share the database; else one child of this one
    limits: Limits = field(default_factory=lambda: Limits(host_bytes=host_limit_bytes()))


def host_limit_bytes() -> int:
    """Return how much of this machine's memory one evaluation may take."""
    return int(_HOST_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def limit_s(profile: Profile, cases: int) -> float:
    """Return after how many seconds an evaluation hangs: far more than any policy can take."""
    return _SPARE_S + _SLOWER * cases * profile.total_ms / 1000.0


def first_note(elsewhere: Elsewhere | None, study: str) -> str:
    """Return what to show before the first result."""
    with_workers = elsewhere is not None and elsewhere.workers
    return f"tune worker {study} can help now" if with_workers else "starting"


def require_shared(jobs: Jobs) -> None:
    """Refuse workers on a database that serves one machine only.

    Raises:
        UsageFault: It is a SQLite file.
    """
    if not jobs.shared:
        raise UsageFault(
            f"workers share a PostgreSQL database, and {jobs.where} is a SQLite file, which serves "
            "one process: give --db postgresql+psycopg://USER@HOST/NAME"
        )


@contextmanager
def crew_of(elsewhere: Elsewhere, jobs: Jobs, study: str, evaluator: Evaluator) -> Iterator[Crew]:
    """Give who evaluates, for as long as the block lasts.

    Args:
        elsewhere: Where.
        jobs: Of the database.
        study: Which is searched.
        evaluator: Of this process; a child need not make the plain videos again that it knows.
    """
    if elsewhere.workers:
        require_shared(jobs)
        yield Team(jobs, study)
        return
    with (
        _parked(evaluator.source, evaluator.device),
        closing(
            Child(
                elsewhere.origin,
                device=elsewhere.device,
                limits=elsewhere.limits,
                plain=evaluator.known(),
            )
        ) as child,
    ):
        yield Alone(Worker(jobs, study, child))


@contextmanager
def _parked(source: Source, device: torch.device) -> Iterator[None]:
    """Keep this process's pipeline off its GPU, where the child's needs the room."""
    if device.type == "cpu":
        yield
        return
    move(source, "cpu")
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        move(source, str(device))


def first_origin(
    jobs: Jobs, study: str, wait: Callable[[float], object] = time.sleep
) -> Origin | None:
    """Return where the pipeline of a study lies, once a job says so; None if the search ended.

    Raises:
        UsageFault: It lies in the process that searches.
    """
    while not jobs.ended(study):
        for job in jobs.unfinished(study).values():
            if job.origin is None:
                raise UsageFault(
                    f"{study} searches a pipeline that lives in its own process: start it with "
                    "tune run --workers"
                )
            return job.origin
        wait(POLL_S)
    return None


def require_same_machine(settings: Settings, hardware: Hardware, software: Software) -> None:
    """Refuse to evaluate for a study on another kind of machine: its trials could not be compared.

    Raises:
        UsageFault: The hardware or software differs; the message says in what.
    """
    differ = [
        f"{name} {theirs} (here {getattr(ours, name)})"
        for expected, ours in ((settings.hardware, hardware), (settings.software, software))
        for name, theirs in expected
        if theirs != getattr(ours, name)
    ]
    if differ:
        raise UsageFault(
            f"this machine cannot work for {settings.study}, which was begun with "
            f"{', '.join(differ)}: trials of one study are compared, so they need the same machine"
        )
