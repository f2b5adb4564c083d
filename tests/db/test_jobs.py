"""Jobs and leases on each database: what one holder may do while another one holds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from ditune.db.errors import StoreFault, UsageFault
from ditune.db.jobs import ATTEMPTS_MOST, Holder, Jobs, Lease
from ditune.db.policy import MaskCache, Policy
from ditune.db.records import Job, Study, Trial
from ditune.db.store import Store

OVER = -1.0  # seconds: a lease that has ended when it is given


@pytest.fixture
def store(any_database: str, study: Study) -> Iterator[Store]:
    with Store.open(any_database) as opened:
        opened.save_study(study)
        opened.jobs.begin(study.name)
        yield opened


@pytest.fixture
def jobs(store: Store) -> Jobs:
    return store.jobs


def job(study: Study, number: int = 0) -> Job:
    """Return a job of a study."""
    return Job(
        uuid=f"u{number}",
        study=study.name,
        number=number,
        source="prior",
        policy=Policy(cache=MaskCache(actions=("full", "full", "step", "full"))),
        constraints=study.settings.constraints,
        prompts=("a", "b"),
        seeds=(1, 2),
        pairs=1,
    )


def result(trial: Trial, number: int = 0) -> Trial:
    """Return the trial that a job ends with."""
    return trial.model_copy(update={"uuid": f"u{number}", "number": number})


def claimed(jobs: Jobs, study: Study, device: str = "here/cpu", **how: float) -> Lease:
    """Take a job that must be there."""
    lease = jobs.claim(study.name, Holder(device), **how)
    assert lease is not None
    return lease


def test_jobs_are_taken_once_in_order_and_kept_with_their_result(
    store: Store, study: Study, trial: Trial
) -> None:
    jobs = store.jobs
    for number in (1, 0, 1):  # twice is once
        jobs.put(job(study, number))
    assert jobs.counts(study.name) == (2, 0)
    first, second = claimed(jobs, study, "a"), claimed(jobs, study, "b")
    assert [job(study, 0), job(study, 1)] == [first.job, second.job]
    assert jobs.claim(study.name, Holder("c")) is None
    assert jobs.commit(first, result(trial))
    assert jobs.commit(first, result(trial))  # the answer was lost, and it is told again
    assert result(trial) == store.trial("u0")
    assert {"u0"} == jobs.done(["u0", "u1"])
    assert {"u1": job(study, 1)} == jobs.unfinished(study.name)
    assert jobs.counts(study.name) == (0, 1)


def test_a_device_is_measured_by_one_at_a_time(store: Store, study: Study, trial: Trial) -> None:
    jobs = store.jobs
    for number in range(3):
        jobs.put(job(study, number))
    first = claimed(jobs, study, "gpu")
    assert jobs.claim(study.name, Holder("gpu")) is None
    assert claimed(jobs, study, "other").job.number == 1
    jobs.commit(first, result(trial))
    assert claimed(jobs, study, "gpu").job.number == 2


def test_a_lease_that_ran_out_is_void_whoever_looks_first(
    store: Store, study: Study, trial: Trial
) -> None:
    jobs = store.jobs
    jobs.put(job(study))
    late = claimed(jobs, study, lease_s=OVER)
    assert not jobs.renew(late)
    assert not jobs.commit(late, result(trial))
    assert store.trial("u0") is None
    again = claimed(jobs, study)
    assert again.attempt == 2
    slower = result(trial).model_copy(update={"speedup": 1.5})
    assert not jobs.commit(late, result(trial))
    assert jobs.commit(again, slower)
    assert not jobs.commit(late, result(trial))  # it woke up when all was over
    assert [slower] == store.trials(study.name)


def test_a_lease_of_another_study_that_ran_out_frees_its_device(
    jobs: Jobs, store: Store, study: Study
) -> None:
    settings = study.settings.model_copy(update={"seed": 1})
    other = study.model_copy(update={"name": settings.study, "settings": settings})
    store.save_study(other)
    jobs.begin(other.name)
    jobs.put(job(study))
    jobs.put(job(other, 1))
    claimed(jobs, other, "gpu", lease_s=OVER)
    assert claimed(jobs, study, "gpu").job == job(study)


def test_renewing_keeps_a_lease_for_as_long_as_asked(jobs: Jobs, study: Study) -> None:
    jobs.put(job(study))
    lease = claimed(jobs, study)
    assert jobs.renew(lease)
    assert jobs.renew(lease, OVER)
    assert not jobs.renew(lease)


def test_leases_do_not_go_by_the_clock_of_this_machine(
    jobs: Jobs, study: Study, trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.put(job(study))
    lease = claimed(jobs, study)
    real = time.time
    for step_s in (7200.0, -7200.0):
        monkeypatch.setattr(time, "time", lambda step_s=step_s: real() + step_s)
        jobs.reap(study.name)
        assert jobs.claim(study.name, Holder("other")) is None
        assert jobs.renew(lease)
    assert jobs.commit(lease, result(trial))


def test_a_machine_that_was_started_anew_has_lost_its_leases(jobs: Jobs, study: Study) -> None:
    jobs.put(job(study))
    claimed(jobs, study)
    assert jobs.claim(study.name, Holder("b")) is None
    assert jobs.claim(study.name, Holder("b", boot="another")) is not None


def test_attempts_are_counted_and_end_in_a_failed_trial(store: Store, study: Study) -> None:
    jobs = store.jobs
    jobs.put(job(study))
    for attempt in range(1, ATTEMPTS_MOST + 1):
        lease = claimed(jobs, study)
        assert attempt == lease.attempt
        jobs.fail(lease, "the child was killed")
    failed = store.trial("u0")
    assert failed is not None
    assert (failed.state, failed.speedup, failed.source) == ("failed", None, "prior")
    assert f"{ATTEMPTS_MOST} attempts" in str(failed.reason)
    assert "the child was killed" in str(failed.reason)
    assert jobs.claim(study.name, Holder("b")) is None
    assert jobs.done(["u0"])


def test_the_reaper_counts_attempts_too(store: Store, study: Study) -> None:
    jobs = store.jobs
    jobs.put(job(study))
    for _ in range(ATTEMPTS_MOST):
        claimed(jobs, study, lease_s=OVER)
        jobs.reap(study.name)
    failed = store.trial("u0")
    assert failed is not None
    assert "stopped answering" in str(failed.reason)


def test_what_is_given_back_was_never_tried(jobs: Jobs, study: Study) -> None:
    jobs.put(job(study))
    for _ in range(ATTEMPTS_MOST + 1):
        lease = claimed(jobs, study)
        assert lease.attempt == 1
        jobs.give_back(lease)
    assert jobs.counts(study.name) == (1, 0)


def test_a_lost_lease_changes_nothing(jobs: Jobs, study: Study) -> None:
    jobs.put(job(study))
    lost = claimed(jobs, study, lease_s=OVER)
    held = claimed(jobs, study)
    jobs.fail(lost, "late")
    jobs.give_back(lost)
    assert jobs.renew(held)


def test_only_what_nobody_began_is_withdrawn(jobs: Jobs, study: Study) -> None:
    for number in range(3):
        jobs.put(job(study, number))
    claimed(jobs, study)
    assert sorted(jobs.withdraw(study.name)) == ["u1", "u2"]
    assert list(jobs.unfinished(study.name)) == ["u0"]


def test_a_search_begins_ends_and_goes_on(jobs: Jobs, study: Study) -> None:
    assert not jobs.ended(study.name)
    jobs.end(study.name)
    assert jobs.ended(study.name)
    jobs.begin(study.name)
    assert not jobs.ended(study.name)
    assert jobs.ended("another")
    with pytest.raises(UsageFault, match="holds no study another"):
        jobs.begin("another")


def test_what_ran_on_a_file_has_died_with_its_process(jobs: Jobs, study: Study) -> None:
    jobs.put(job(study))
    claimed(jobs, study)
    jobs.begin(study.name)
    assert ((0, 1) if jobs.shared else (1, 0)) == jobs.counts(study.name)


def test_numbers_are_given_out_once(store: Store, study: Study, trial: Trial) -> None:
    jobs = store.jobs
    assert jobs.next_number(study.name) == 0
    store.save_trial(trial)
    assert jobs.next_number(study.name) == 1
    jobs.put(job(study, 4))
    assert jobs.next_number(study.name) == 5
    with pytest.raises(StoreFault, match="refused a row"):
        jobs.put(job(study, 4).model_copy(update={"uuid": "other"}))


def test_many_hands_do_every_job_once(store: Store, study: Study, trial: Trial) -> None:
    jobs = store.jobs
    for number in range(40):
        jobs.put(job(study, number))
    taken: list[int] = []

    def work(worker: int) -> None:
        holder = Holder(f"device {worker % 6}")  # two pairs share one: they may come away empty
        while jobs.unfinished(study.name):
            lease = jobs.claim(study.name, holder)
            if lease is not None and jobs.commit(lease, result(trial, lease.job.number)):
                taken.append(lease.job.number)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(range(40)) == sorted(taken)
    assert list(range(40)) == [each.number for each in store.trials(study.name)]


def test_who_is_at_work_and_which_searches_go_on_is_known(jobs: Jobs, study: Study) -> None:
    jobs.put(job(study))
    assert jobs.holders(study.name) == []
    lease = claimed(jobs, study)
    assert [lease.holder.worker] == jobs.holders(study.name)
    assert [study.name] == jobs.open_searches()
    jobs.end(study.name)
    assert jobs.open_searches() == []
