"""What a curve tries next, what it puts to the proof, and what is dominated after it."""

from __future__ import annotations

import numpy as np
import pytest
from tests.reports.conftest import build
from tests.tuner.test_frontier import level_db, tried
from tests.tuner.test_schedule import trajectory_of
from tests.tuner.test_search import STEPS, profile

from ditune.db.curve import CurvePoint
from ditune.db.policy import MaskCache, Policy
from ditune.db.records import Interval, Quality, Trial
from ditune.tuner.curve_points import Objectives, Proposals, marked, to_prove
from ditune.tuner.pace import whole_mask
from ditune.tuner.space import Space

PSNR = Objectives()
MEMORY = Objectives(also="memory")


@pytest.fixture(scope="module")
def space() -> Space:
    random = np.random.default_rng(7)
    outputs = np.cumsum(random.standard_normal((STEPS, 30)), axis=0)
    return Space(profile(), handoff=False, trajectories=[trajectory_of(outputs)])


def given(space: Space, number: int, policy: Policy) -> Trial:
    level = 100.0
    if policy != Policy():
        predictable = space.schedules is not None and whole_mask(policy)
        level = level_db(space, policy) if predictable else 20.0
    found = tried(number, policy, level)
    judged = {**found.quality, "judge": found.quality["psnr"]}
    return found.model_copy(update={"quality": judged, "peak_bytes": 1000 + number})


def searched(
    space: Space, count: int, objectives: Objectives = PSNR, known: tuple[Trial, ...] = ()
) -> list[Trial]:
    """Return the trials of a curve, the known ones first."""
    done = list(known)
    proposals = Proposals(space, objectives, seed=0)
    while len(done) < count:
        found = proposals.next(done)
        assert found is not None
        policy, source = found
        trial = given(space, len(done), policy)
        done.append(trial.model_copy(update={"source": source}))
    return done


def computed(trials: list[Trial]) -> list[int]:
    masks = [t.policy.cache for t in trials if t.source == "prior"]
    return [m.actions.count("full") for m in masks if isinstance(m, MaskCache)]


@pytest.mark.parametrize("objectives", [PSNR, MEMORY])
def test_masks_of_all_budgets_are_tried_and_every_fourth_trial_is_the_samplers(
    space: Space, objectives: Objectives
) -> None:
    trials = searched(space, 13, objectives)
    assert [trial.number for trial in trials if trial.source == "search"] == [4, 8, 12]
    assert trials[0].policy == Policy()
    found = computed(trials)
    assert len(set(found)) == len(found) == 9
    assert found[0] == space.fewest
    assert len({trial.policy.id for trial in trials}) == len(trials)


def test_a_curve_that_was_interrupted_goes_on_as_if_it_had_not(space: Space) -> None:
    whole = searched(space, 10)
    again = searched(space, 10, known=tuple(whole[:6]))
    assert [t.policy.id for t in again] == [t.policy.id for t in whole]


def test_masks_follow_what_trials_showed(space: Space) -> None:
    trials = searched(space, 12)
    later = [t for t in trials if t.source == "prior"][3:]
    found = [(t, t.policy.cache.actions.count("full")) for t in later if t.policy.cache]  # type: ignore[union-attr]
    gained = [
        level_db(space, trial.policy) - level_db(space, space.policy(space.prior(count).parameters))
        for trial, count in found
    ]
    assert sum(gained) / len(gained) > 1.0  # dB over what the profile alone suggests


def test_where_nothing_can_be_predicted_the_profile_alone_proposes() -> None:
    space = Space(profile(), handoff=False)
    trials = searched(space, 6)
    for trial in trials[1:4]:
        assert isinstance(trial.policy.cache, MaskCache)
        count = trial.policy.cache.actions.count("full")
        assert trial.policy == space.policy(space.prior(count).parameters)


def test_hand_offs_come_from_the_sampler_every_second_trial() -> None:
    space = Space(profile(), handoff=True)
    assert space.hands_over
    trials = searched(space, 7, Objectives(metric="judge"))
    assert [trial.number for trial in trials if trial.source == "search"] == [2, 4, 6]


def test_nothing_new_is_nothing(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    done = [given(space, 0, Policy())]
    for count in range(space.fewest, STEPS):
        policy = space.policy(space.prior(count).parameters)
        done.append(given(space, len(done), policy))
    monkeypatch.setattr(Space, "policy", lambda *_: done[1].policy)
    assert Proposals(space, PSNR, seed=0).next(done) is None


def masked(number: int, count: int, psnr: float, peak_bytes: int = 1000) -> Trial:
    actions = tuple("full" if step < count else "step" for step in range(STEPS))
    policy = Policy(cache=MaskCache(actions=actions))  # type: ignore[arg-type]
    return tried(number, policy, psnr).model_copy(update={"peak_bytes": peak_bytes})


def test_what_is_dominated_is_not_proved(space: Space) -> None:
    plain = tried(0, Policy(), 100.0).model_copy(update={"peak_bytes": 900})
    trials = [plain, masked(1, 4, 20.0), masked(2, 8, 19.0), masked(3, 10, 30.0)]
    assert [t.number for t in to_prove(trials, space, PSNR, 8)] == [3, 1]
    assert [t.number for t in to_prove(trials, space, PSNR, 1)] == [1]  # the fastest
    lean = [plain, masked(1, 4, 20.0), masked(2, 8, 19.0, 950), masked(3, 10, 30.0)]
    assert [t.number for t in to_prove(lean, space, MEMORY, 8)] == [3, 2, 1]
    failed = lean[1].model_copy(update={"state": "rejected", "quality": {}})
    assert [t.number for t in to_prove([plain, failed], space, PSNR, 8)] == []


def point(trial: Trial, speedup: float, psnr: float, peak_bytes: int = 1000) -> CurvePoint:
    chosen = build().chosen
    assert chosen is not None
    found = {
        "speedup": Interval(median=speedup, ci95=(speedup, speedup), n=6),
        "quality": {"psnr": Quality(floor=None, mean=psnr, worst=psnr, n=8)},
    }
    return CurvePoint(
        trial=trial.number,
        policy_id=trial.policy.id,
        policy=trial.policy,
        evidence=chosen.evidence.model_copy(update=found),
        bound=psnr - 1.0,
        peak_bytes=peak_bytes,
        dominated=False,
    )


def test_the_proof_says_anew_what_is_dominated() -> None:
    plain = tried(0, Policy(), 100.0).model_copy(update={"peak_bytes": 900})
    first, second, third = (masked(n, 3 + n, 30.0) for n in (1, 2, 3))
    proved = [point(first, 3.0, 25.0), point(second, 2.0, 24.0, 950), point(third, 0.9, 99.0)]
    found = marked(proved, plain, PSNR)
    assert [(p.trial, p.dominated) for p in found] == [(3, True), (2, True), (1, False)]
    lean = marked(proved, plain, MEMORY)
    assert [(p.trial, p.dominated) for p in lean] == [(3, True), (2, False), (1, False)]
