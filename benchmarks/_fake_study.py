"""A study without a pipeline: what the search and its workers do is real, an evaluation is a pause.

Used by the benchmarks of crashes and of workers, which fork their processes: all is imported once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import torch
from benchmarks.simulated import even_profile, settings

from ditune.db.engine import study_storage_url
from ditune.db.jobs import Jobs, Lease
from ditune.db.policy import MaskCache
from ditune.db.records import Job, Study, Trial
from ditune.db.store import Store
from ditune.tuner.crew import Alone, Crew, Team
from ditune.tuner.evaluate import Case
from ditune.tuner.quality import parse_constraints
from ditune.tuner.search import Budget, Search
from ditune.tuner.space import Space
from ditune.tuner.verdict import Found
from ditune.tuner.worker import Worker

FLOORS = parse_constraints("psnr>=35,psnr_worst>=27")
_CASES = [Case("first", 0), Case("second", 1)]


class Pauses:
    """A runner whose evaluations take a fixed time; quality falls with what is left out."""

    def __init__(self, device: str, seconds: float, times: Path | None = None) -> None:
        """Take the name of a device that nobody else has, and a file for begin and end of each."""
        self.device = device
        self._seconds = seconds
        self._times = times

    def run(self, job: Job) -> Found:
        """Pause, then answer from a formula."""
        begun = time.monotonic()
        time.sleep(self._seconds)
        if self._times is not None:
            note(self._times, f"{begun} {time.monotonic()}")
        cache, reused = job.policy.cache, 0.3
        if isinstance(cache, MaskCache):
            reused = 1.0 - cache.actions.count("full") / len(cache.actions)
        ratio = 1.0 / (1.0 - reused)
        return Found(tuple({"psnr": 60.0 - 45.0 * reused} for _ in job.prompts), ratio, ratio)

    def stop(self) -> None:
        """Do nothing: the pause ends by itself."""

    def close(self) -> None:
        """Do nothing."""


class Floors:
    """What a search asks of an evaluator where others evaluate."""

    constraints = FLOORS
    device = torch.device("cpu")


class Acknowledging:
    """The jobs of a database; every result that it took is noted in a file."""

    def __init__(self, jobs: Jobs, log: Path) -> None:
        """Wrap the jobs."""
        self._jobs = jobs
        self._log = log

    def commit(self, lease: Lease, trial: Trial) -> bool:
        """Keep a result, and note that it was taken."""
        taken = self._jobs.commit(lease, trial)
        if taken:
            note(self._log, trial.uuid)
        return taken

    def __getattr__(self, name: str) -> Any:
        """Leave everything else to the jobs."""
        return getattr(self._jobs, name)


def note(log: Path, line: str) -> None:
    """Add a line to a file in one system call: it is there whole, or not at all."""
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{line}\n".encode())
    os.close(handle)


def drive(
    url: str,
    study: str,
    budget: Budget,
    log: Path,
    alone_s: float | None = None,
    sampler: Callable[[], optuna.samplers.BaseSampler] = optuna.samplers.RandomSampler,
) -> None:
    """Search, in this process alone or with workers; what the user is shown is noted.

    Args:
        url: Of our database.
        study: Its name.
        budget: Of the search.
        log: Takes the uuid of every trial that was shown.
        alone_s: What an evaluation takes in this process; None: workers evaluate.
        sampler: Makes what proposes points.
    """
    with Store.open(url) as store:
        found = Search(study, space(), Floors(), _CASES, seed=0, sampler=sampler())  # type: ignore[arg-type]
        noting: Any = Acknowledging(store.jobs, log)
        crew: Crew = Team(store.jobs, study)
        if alone_s is not None:
            crew = Alone(Worker(noting, study, Pauses(study, alone_s)))
        found.open(study_storage_url(url), store, crew)
        with closing(found):
            found.run(budget, lambda trial, _: note(log, trial.uuid))


def work(
    url: str,
    study: str,
    pauses: Pauses,
    lease_s: float,
    log: Path,
) -> None:
    """Do jobs of a study until it ends; every result that was taken is noted."""
    with Store.open(url) as store:
        jobs: Any = Acknowledging(store.jobs, log)
        Worker(jobs, study, pauses, lease_s).until_ended()


def begin(url: str, seed: int) -> str:
    """Save a new study, for which workers may come at once, and return its name."""
    found = settings(FLOORS, seed, space())
    with Store.open(url) as store:
        study = Study(name=found.study, settings=found, created_at="2026-01-01T00:00:00Z")
        store.save_study(study)
        store.jobs.begin(study.name)
    return found.study


def space() -> Space:
    """Return the space of a pipeline with guidance and fifty steps."""
    return Space(even_profile(), handoff=False)
