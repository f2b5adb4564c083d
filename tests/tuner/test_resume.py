"""What a search that begins anew finds: stored and not told, asked and not begun, leased."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import optuna
import pytest
import torch
from optuna.trial import TrialState
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool
from tests.tuner.test_search import FLOORS, STUDY, profile

from ditune.db.engine import study_storage_url
from ditune.db.errors import EvaluationFault, StoreLost, UsageFault
from ditune.db.jobs import ATTEMPTS_MOST, Jobs
from ditune.db.policy import MaskCache, Policy
from ditune.db.records import Job, Settings, Study, Trial
from ditune.db.store import Store
from ditune.tuner.crew import Alone, Team
from ditune.tuner.evaluate import Case
from ditune.tuner.search import Budget, Search
from ditune.tuner.space import Space
from ditune.tuner.verdict import Found, trial_of
from ditune.tuner.worker import Worker, patiently

# every other connection to the database ends, as it does when the server is restarted
END_ALL = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


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


def study() -> Study:
    """Return the study that is searched here."""
    found = profile()
    settings = Settings(
        hardware=found.hardware,
        software=found.software,
        workload=found.workload,
        constraints=FLOORS,
        prompts_digest="sha256:" + "c" * 64,
        seed=0,
        space="sha256:" + "d" * 64,
    )
    return Study(name=STUDY, settings=settings, created_at="2026-01-01T00:00:00Z")


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


# --- in one process --------------------------------------------------------------------------


def test_what_was_stored_and_not_told_is_told_once(
    store: Store, url: str, searching: Searching, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = searching(store, url, Formula())

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Search, "_tell", dies)
        with pytest.raises(KeyboardInterrupt):
            first.run(Budget(3), quiet)
    assert len(store.trials(STUDY)) == 1
    second = searching(store, url, runner := Formula())
    assert len(second.run(Budget(3), quiet)) == 3
    assert len(runner.ran) == 2
    assert {trial.uuid: 1 for trial in store.trials(STUDY)} == told(second)
    assert not left_running(second)


def test_constraints_that_were_set_before_a_crash_stay(
    store: Store, url: str, searching: Searching, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "tell", dies)
        with pytest.raises(KeyboardInterrupt):
            searching(store, url, Formula()).run(Budget(2), quiet)
    second = searching(store, url, Formula())
    second.run(Budget(2), quiet)  # a constraint that is set twice would warn, and fail here
    assert all(len(FLOORS) == len(trial.constraints) for trial in second.study.trials)


def test_what_was_asked_and_never_begun_is_given_up(
    store: Store, url: str, searching: Searching, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = searching(store, url, Formula())

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Jobs, "put", dies)  # it was marked already
        with pytest.raises(KeyboardInterrupt):
            first.run(Budget(2), quiet)
    assert left_running(first)
    second = searching(store, url, Formula())
    trials = second.run(Budget(2), quiet)
    assert [trial.number for trial in trials] == [0, 1]
    assert not left_running(second)


def test_a_policy_that_kills_the_process_is_tried_a_few_times_only(
    store: Store, url: str, searching: Searching
) -> None:
    class Fatal(Formula):
        def run(self, job: Job) -> Found:
            if job.policy != Policy():
                raise EvaluationFault("the child was killed by signal 9")
            return super().run(job)

    search = searching(store, url, fatal := Fatal())
    trials = search.run(Budget(2), quiet)
    assert [trial.state for trial in trials] == ["complete", "failed"]
    assert f"{ATTEMPTS_MOST} attempts" in str(trials[1].reason)
    assert "signal 9" in str(trials[1].reason)
    states = [trial.state for trial in search.study.trials]
    assert states == [TrialState.COMPLETE, TrialState.FAIL]
    assert fatal.ran == [trials[0].uuid]


def test_a_machine_that_fails_everything_ends_the_search(
    store: Store, url: str, searching: Searching
) -> None:
    class Broken(Formula):
        def run(self, job: Job) -> Found:
            raise EvaluationFault("the device failed")

    with pytest.raises(EvaluationFault, match="6 evaluations in a row failed on here/test"):
        searching(store, url, Broken()).run(Budget(9), quiet)
    assert len(store.trials(STUDY)) == 2  # both failed, in all of their attempts
    search = searching(store, url, Formula())
    assert len(search.run(Budget(3), quiet)) == 3
    assert not left_running(search)


def test_a_policy_that_cannot_run_misses_every_floor_by_a_finite_amount(
    store: Store, url: str, searching: Searching
) -> None:
    class Short(Formula):
        def run(self, job: Job) -> Found:
            if job.policy != Policy():
                return Found((), unfit="it needs more memory: 80 GiB")
            return super().run(job)

    search = searching(store, url, Short())
    trials = search.run(Budget(10), quiet)  # enough for the sampler to learn from them
    assert all("80 GiB" in str(trial.reason) for trial in trials[1:])
    assert not any(trial.feasible for trial in trials[1:])
    for trial in search.study.trials:
        assert trial.state == TrialState.COMPLETE
        assert {"psnr", "psnr_worst"} == set(trial.constraints)


def test_two_processes_never_ask_for_one_study(
    store: Store, url: str, searching: Searching
) -> None:
    search = searching(store, url, Formula())
    with (
        store.jobs.sole_asker(STUDY),
        pytest.raises(UsageFault, match="another process searches study-1"),
    ):
        search.run(Budget(2), quiet)
    assert len(search.run(Budget(2), quiet)) == 2


def test_a_budget_does_not_go_by_a_clock_that_can_be_set(
    store: Store, url: str, searching: Searching, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    steps = iter([7200.0, -7200.0] * 5000)
    monkeypatch.setattr(time, "time", lambda: real() + next(steps))
    search = searching(store, url, Formula())
    assert len(search.run(Budget(4, seconds=3600.0), quiet)) == 4


def test_optunas_storage_may_be_lost(store: Store, url: str, searching: Searching) -> None:
    first = searching(store, url, Formula())
    first.run(Budget(2), quiet)
    policy = Policy(cache=MaskCache(actions=("full", "step", *("full",) * 18)))
    store.jobs.put(first._job(policy, "prior"))  # nobody will ask Optuna about it
    second = searching(store, url, Formula())
    assert len(second.run(Budget(3), quiet)) == 3


def test_a_result_that_comes_in_while_a_search_begins_counts_once(
    store: Store, url: str, searching: Searching, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = searching(store, url)
    first._ask(first._recovered(), by_chance=False)
    before = Jobs.unfinished

    def and_then_it_is_done(jobs: Jobs, study: str) -> dict[str, Job]:
        found = before(jobs, study)
        Worker(jobs, study, Formula()).step()
        return found

    monkeypatch.setattr(Jobs, "unfinished", and_then_it_is_done)
    second = searching(store, url)
    trials = second.run(Budget(1), quiet)
    assert [trial.number for trial in trials] == [0]
    assert {trials[0].uuid: 1} == told(second)


# --- with workers ----------------------------------------------------------------------------


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
    jobs.put(search._job(Policy(), "baseline"))

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
    jobs.put(search._job(Policy(), "baseline"))
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
    whole = trial_of(job, Found(({"psnr": 50.0}, {"psnr": 50.0}), 1.5, 2.0), 4.0)
    assert (whole.uuid, whole.number, whole.source, whole.state) == ("u", 3, "default", "complete")
    assert (
        whole.speedup,
        whole.work_ratio,
        whole.duration_s,
        whole.reason,
    ) == (1.5, 2.0, 4.0, None)
    early = trial_of(job, Found(({"psnr": 5.0},)), 1.0)
    assert (early.state, "below 27" in str(early.reason)) == ("rejected", True)
