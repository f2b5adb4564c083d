"""What a search that begins anew finds: stored and not told, asked and not begun, leased."""

from __future__ import annotations

import time

import optuna
import pytest
from optuna.trial import TrialState
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
from tests.tuner.test_search import FLOORS, STUDY

from ditune.db.errors import EvaluationFault, UsageFault
from ditune.db.jobs import ATTEMPTS_MOST, Jobs
from ditune.db.policy import MaskCache, Policy
from ditune.db.records import Job
from ditune.db.store import Store
from ditune.tuner.search import Budget, Search
from ditune.tuner.verdict import Found
from ditune.tuner.worker import Worker

__all__ = ["searching", "store", "url"]  # the fixtures


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
    store.jobs.put(first._job(policy, "prior", []))  # nobody will ask Optuna about it
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
