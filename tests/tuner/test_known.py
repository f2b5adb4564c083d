"""What earlier searches measured guides a search and is no part of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tuner.searches import Formula, Searching, quiet, searching, store, told, url
from tests.tuner.test_frontier import searched, space, tried
from tests.tuner.test_search import FLOORS, STUDY

from ditune.db.policy import MaskCache, Policy
from ditune.db.records import Trial
from ditune.db.store import Store
from ditune.tuner.frontier import Choice, Frontier, proposed
from ditune.tuner.ladders import Ladders
from ditune.tuner.quality import parse_constraints
from ditune.tuner.search import Budget
from ditune.tuner.space import Space
from ditune.tuner.verdict import rejudged

__all__ = ["searching", "space", "store", "url"]  # the fixtures
LOOSER = parse_constraints("psnr>=30,psnr_worst>=20")
SEEDS = (0, 1)


def computed(trial: Trial) -> int | None:
    cache = trial.policy.cache
    return cache.actions.count("full") if isinstance(cache, MaskCache) else None


def under(trials: list[Trial], floors: str) -> list[Trial]:
    judged = (rejudged(trial, parse_constraints(floors), SEEDS) for trial in trials)
    return [trial for trial in judged if trial is not None]


def test_a_later_search_begins_where_an_earlier_one_left_off(
    store: Store, url: str, searching: Searching, tmp_path: Path
) -> None:
    first = searching(store, url, Formula()).run(Budget(8), quiet)
    known = under(first, "psnr>=35,psnr_worst>=27")
    assert len(known) == 8
    with Store.open(str(tmp_path / "second.db")) as other:
        other.save_study(store.studies()[0])
        search = searching(other, f"sqlite:///{tmp_path / 'second.study.db'}", runner := Formula())
        search.learn_from(known)
        trials = search.run(Budget(3), quiet)
        assert len(trials) == len(other.trials(STUDY)) == len(runner.ran) == 3
        assert [trial.number for trial in trials] == [0, 1, 2]
        assert all(trial.source != "baseline" for trial in trials)
        assert not {t.policy.id for t in trials} & {t.policy.id for t in known}
        assert {trial.uuid: 1 for trial in trials} == told(search)


def test_a_sampler_that_asks_for_a_known_policy_is_told_and_nothing_runs(
    store: Store, url: str, searching: Searching, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = searching(store, url, runner := Formula())
    monkeypatch.setattr(Ladders, "next", lambda *_: None)
    monkeypatch.setattr(Space, "policy", lambda *_: Policy())  # whatever is asked for
    known = tried(7, Policy(), 100.0).model_copy(update={"violation": {"psnr": -1.0}})
    search.learn_from([known])
    search.run(Budget(1), quiet)
    assert runner.ran == []
    assert store.trials(STUDY) == []
    assert all(trial.state.is_finished() for trial in search.study.trials)
    assert search.study.trials[0].value == pytest.approx(1.0, rel=0.1)


def test_what_was_given_up_elsewhere_may_be_tried_again(
    space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = searched(space, 4)
    fast, slow = trials[1], trials[2]
    choices = [Choice(fast.policy, 3.0, 0.9), Choice(slow.policy, 2.0, 0.9)]
    monkeypatch.setattr(Frontier, "choices", lambda *_, **__: choices)
    assert proposed(space, trials, 20) is None
    trials[1] = fast.model_copy(update={"state": "rejected", "reason": None})
    again = proposed(space, trials, 20)
    assert again is not None
    assert again.policy == fast.policy
    trials[1] = fast.model_copy(update={"state": "rejected", "reason": "missed"})
    assert proposed(space, trials, 20) is None


def test_a_ladder_takes_it_neither_for_held_nor_for_missed(
    store: Store, url: str, searching: Searching
) -> None:
    plain = searching(store, url, Formula())
    done = plain.run(Budget(4), quiet)
    ladders = Ladders(plain.space)
    following = ladders.next(done)
    assert following is not None
    policy = plain.space.policy(following.parameters)
    passed = done[1].model_copy(update={"policy": policy})
    missed = passed.model_copy(update={"state": "rejected", "reason": "missed"})
    for trial in (passed, missed):
        other = ladders.next([*done, trial])
        assert other is None or plain.space.policy(other.parameters) != policy
    assert ladders.next([*done, missed.model_copy(update={"reason": None})]) == following


def test_the_floors_of_a_later_search_count(store: Store, url: str, searching: Searching) -> None:
    first = searching(store, url, Formula()).run(Budget(8), quiet)
    loose = under(first, "psnr>=30,psnr_worst>=20")
    assert min(computed(t) or 99 for t in loose if t.feasible) <= min(
        computed(t) or 99 for t in first if t.feasible
    )
    assert {c.name for c in FLOORS} == set(loose[1].violation)
    assert loose[1].quality["psnr"].floor == LOOSER[0].floor
