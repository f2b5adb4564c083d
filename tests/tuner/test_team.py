"""A search that workers share: asked ahead, paused, cut off, ended."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool
from tests.tuner.searches import (
    Formula,
    Searching,
    left_running,
    quiet,
    searching,
    store,
    told,
    url,
)
from tests.tuner.test_search import FLOORS, STUDY, study

from ditune.db.engine import study_storage_url
from ditune.db.errors import EvaluationFault, StoreLost
from ditune.db.jobs import Jobs
from ditune.db.policy import Policy
from ditune.db.records import Job
from ditune.db.store import Store
from ditune.tuner.search import Budget
from ditune.tuner.verdict import Found, trial_of
from ditune.tuner.worker import Worker, patiently

__all__ = ["searching", "store", "url"]  # the fixtures
# every other connection to the database ends, as it does when the server is restarted
END_ALL = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


def test_workers_share_a_study_and_leave_when_it_ends(
    store: Store, url: str, searching: Searching
) -> None:
    search = searching(store, url)
    store.jobs.begin(STUDY)
    runners = [Formula(f"device {number}") for number in range(3)]
    threads = [
        threading.Thread(target=Worker(store.jobs, STUDY, runner).until_ended) for runner in runners
    ]
    for thread in threads:
        thread.start()
    seen: list[int] = []
    trials = search.run(Budget(12), lambda _, count: seen.append(count))
    for thread in threads:
        thread.join()
    assert list(range(12)) == [trial.number for trial in trials if trial.number < 12]
    assert list(range(1, 13)) == seen
    assert len({trial.policy.id for trial in trials}) == 12
    assert sum(len(runner.ran) for runner in runners) == 12
    assert {trial.uuid: 1 for trial in trials} == told(search)
    assert not left_running(search)
    assert store.jobs.ended(STUDY)


def test_ladders_are_climbed_ahead_of_the_results(
    store: Store, url: str, searching: Searching
) -> None:
    search = searching(store, url, Formula())
    search.run(Budget(1), quiet)  # the plain pipeline
    done = search._recovered()
    for _ in range(4):
        search._ask(done, by_chance=False)
    pending = [each.job for each in search._pending.values()]
    assert [job.source for job in pending] == ["prior"] * 4
    assert len({job.policy.id for job in pending}) == 4


def test_time_that_is_over_withdraws_what_nobody_began(
    store: Store, url: str, searching: Searching
) -> None:
    search = searching(store, url)
    store.jobs.begin(STUDY)
    search._recovered()
    search._ask([], by_chance=False)
    assert store.jobs.counts(STUDY) == (1, 0)
    assert search.run(Budget(9, seconds=0.0), quiet) == []
    assert store.jobs.counts(STUDY) == (0, 0)
    assert not left_running(search)


def test_a_late_result_counts_for_nothing(store: Store, url: str, searching: Searching) -> None:
    jobs = store.jobs
    search = searching(store, url, Formula())
    jobs.begin(STUDY)
    jobs.put(search._job(Policy(), "baseline", []))

    class Overtaken(Formula):
        """Another worker does the same job while this one is paused."""

        def run(self, job: Job) -> Found:
            while not other.step():  # the row is locked while the late one tries to renew it
                continue
            return super().run(job)

        def stop(self) -> None:
            """It cannot be stopped, and its result comes too late."""

    other = Worker(jobs, STUDY, quick := Formula("other device"))
    late = Worker(jobs, STUDY, slow := Overtaken(), lease_s=-1.0)
    assert late.step()
    assert quick.ran == slow.ran
    assert len(store.trials(STUDY)) == 1
    assert not late.step()  # it is alive, and there is nothing to do


def test_a_lost_lease_ends_what_runs(
    store: Store, url: str, searching: Searching, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Endless(Formula):
        def __init__(self) -> None:
            super().__init__()
            self.stopped = threading.Event()

        def run(self, job: Job) -> Found:
            self.stopped.wait()
            raise EvaluationFault("it was stopped")

        def stop(self) -> None:
            self.stopped.set()

    jobs = store.jobs
    search = searching(store, url, Formula())
    jobs.begin(STUDY)
    jobs.put(search._job(Policy(), "baseline", []))
    monkeypatch.setattr(Jobs, "renew", lambda *_: False)
    assert Worker(jobs, STUDY, Endless(), lease_s=0.1).step()
    assert jobs.counts(STUDY) == (1, 0)  # it waits for another attempt


def test_a_database_that_comes_back_is_waited_for() -> None:
    answers: Iterator[StoreLost | int] = iter([StoreLost("away"), StoreLost("away"), 7])

    def ask() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    pauses: list[float] = []
    assert patiently(ask, wait=pauses.append) == 7
    assert pauses == sorted(pauses) and len(pauses) == 2
    answers = iter([StoreLost("for good")])
    with pytest.raises(StoreLost, match="for good"):
        patiently(ask, most_s=-1.0)


def test_a_server_that_ends_every_connection_costs_nothing(
    server_database: str, searching: Searching
) -> None:
    class Cut(Formula):
        """The server is restarted while the third job is evaluated."""

        def run(self, job: Job) -> Found:
            if len(self.ran) == 2:
                with create_engine(server_database, poolclass=NullPool).connect() as connection:
                    connection.execute(text(END_ALL))
            return super().run(job)

    with Store.open(server_database) as opened:
        opened.save_study(study())
        search = searching(opened, study_storage_url(server_database), cut := Cut())
        trials = search.run(Budget(5), quiet)
        assert 5 == len(trials) == len(cut.ran)
        assert {trial.uuid: 1 for trial in trials} == told(search)
        assert not left_running(search)


def test_the_verdict_on_a_job_keeps_its_identity() -> None:
    job = Job(
        uuid="u",
        study=STUDY,
        number=3,
        source="default",
        policy=Policy(),
        constraints=FLOORS,
        prompts=("a", "b"),
        seeds=(0, 1),
        pairs=1,
    )
    whole = trial_of(job, Found(({"psnr": 50.0}, {"psnr": 52.0}), 1.5, 2.0), 4.0)
    assert [(score.seed, score.values["psnr"]) for score in whole.scores] == [(0, 50.0), (1, 52.0)]
    assert (whole.uuid, whole.number, whole.source, whole.state) == ("u", 3, "default", "complete")
    assert (
        whole.speedup,
        whole.work_ratio,
        whole.duration_s,
        whole.reason,
    ) == (1.5, 2.0, 4.0, None)
    assert (whole.pairs, whole.videos) == (0, None)
    counted = trial_of(job, Found(({"psnr": 50.0},) * 2, 1.5, 2.0, pairs=2, videos=3.5), 4.0)
    assert (counted.pairs, counted.videos) == (2, 3.5)
    early = trial_of(job, Found(({"psnr": 5.0},)), 1.0)
    assert (early.state, "below 27" in str(early.reason)) == ("rejected", True)
    assert [score.seed for score in early.scores] == [0]
