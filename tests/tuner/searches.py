"""Searches whose evaluations are a formula: what the tests of crashes and of teams share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import optuna
import pytest
import torch
from optuna.trial import TrialState
from tests.tuner.test_search import FLOORS, STUDY, profile, study

from ditune.db.engine import study_storage_url
from ditune.db.policy import MaskCache
from ditune.db.records import Job, Trial
from ditune.db.store import Store
from ditune.tuner.crew import Alone, Team
from ditune.tuner.evaluate import Case
from ditune.tuner.search import Search
from ditune.tuner.space import Space
from ditune.tuner.verdict import Found
from ditune.tuner.worker import Worker


class Formula:
    """A runner without a pipeline: quality falls with the share of reused steps."""

    def __init__(self, device: str = "here/test") -> None:
        self.device = device
        self.ran: list[str] = []

    def run(self, job: Job) -> Found:
        self.ran.append(job.uuid)
        reused = 0.0
        if isinstance(job.policy.cache, MaskCache):
            reused = 1.0 - job.policy.cache.actions.count("full") / len(job.policy.cache.actions)
        ratio = 1.0 / (1.0 - reused)
        return Found(tuple({"psnr": 60.0 - 45.0 * reused} for _ in job.prompts), ratio, ratio)

    def stop(self) -> None:
        raise AssertionError("no lease is lost here")

    def close(self) -> None:
        raise AssertionError("a worker does not close what it was given")


class Floors:
    """All that a search asks of an evaluator when others evaluate."""

    constraints = FLOORS
    device = torch.device("cpu")


Searching = Callable[..., Search]


@pytest.fixture
def store(any_database: str) -> Iterator[Store]:
    with Store.open(any_database) as opened:
        opened.save_study(study())
        yield opened


@pytest.fixture
def url(any_database: str) -> str:
    return study_storage_url(any_database)


@pytest.fixture
def searching() -> Iterator[Searching]:
    """Return what makes a search that this process or, without a runner, a team evaluates."""
    with ExitStack() as opened:

        def make(store: Store, url: str, runner: Formula | None = None) -> Search:
            cases = [Case("a", 0), Case("b", 1)]
            search = Search(STUDY, Space(profile(), handoff=False), Floors(), cases, seed=0)  # type: ignore[arg-type]
            jobs = store.jobs
            crew = Alone(Worker(jobs, STUDY, runner)) if runner else Team(jobs, STUDY)
            search.open(url, store, crew)
            opened.callback(search.close)
            return search

        yield make


def quiet(trial: Trial, count: int) -> None:
    """Show nothing."""


def told(search: Search) -> Counter[str]:
    """Count how often Optuna was told each of our trials."""
    marked = (trial.user_attrs.get("uuid") for trial in search.study.get_trials(deepcopy=False))
    return Counter(uuid for uuid in marked if uuid is not None)


def left_running(search: Search) -> list[optuna.trial.FrozenTrial]:
    """Return what Optuna still waits for."""
    return search.study.get_trials(states=(TrialState.RUNNING,))
