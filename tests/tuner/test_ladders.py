"""What is proposed before the sampler: three families, each bisected, then variants."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from tests.tuner.test_frontier import level_db, tried
from tests.tuner.test_schedule import trajectory_of
from tests.tuner.test_search import STEPS, prior, profile

from ditune.db.policy import AdaptiveHandoff, BandedHandoff, Handoff, MaskCache, Policy, RuleCache
from ditune.db.records import Profile, Trial
from ditune.tuner.handoffs import ranked, small_steps
from ditune.tuner.ladders import Ladders
from ditune.tuner.space import Space

RISING = tuple(0.3 + 0.01 * step for step in range(STEPS))
CURVE = tuple(0.5 - 0.02 * step if step < 16 else 0.3 for step in range(STEPS))
SIGMAS = [1.0 - step / STEPS for step in range(STEPS)]


def world(policy: Policy, needed: Sequence[int]) -> bool:
    """Say whether a policy holds: masks of six computed steps, the large model on some steps."""
    if isinstance(policy.cache, MaskCache) and policy.cache.actions.count("full") < 6:
        return False
    return not set(needed).intersection(small_steps(policy.handoff, SIGMAS))


def large_steps(policy: Policy) -> list[int]:
    small = small_steps(policy.handoff, SIGMAS)
    return [step for step in range(STEPS) if step not in small]


def climbed(space: Space, needed: Sequence[int] = range(5)) -> list[Trial]:
    ladders, done = Ladders(space), list[Trial]()
    while (proposal := ladders.next(done)) is not None:
        policy = space.policy(proposal.parameters)
        done.append(ended(prior(len(done), policy), holds=world(policy, needed)))
        assert len(done) < 60
    return done


def ended(trial: Trial, *, holds: bool) -> Trial:
    violation = {"judge": -0.1 if holds else 0.1}
    return trial.model_copy(update={"violation": violation, "reason": None if holds else "missed"})


def held(done: Sequence[Trial], *, cached: bool) -> list[Policy]:
    """Return the hand-offs that held, the fewest large steps first."""
    found = [t.policy for t in done if t.feasible and small_steps(t.policy.handoff, SIGMAS)]
    return sorted((p for p in found if bool(p.cache) == cached), key=lambda p: len(large_steps(p)))


def with_curve(curve: tuple[float, ...] | None) -> Profile:
    return profile().model_copy(update={"disagreement": curve})


@pytest.mark.parametrize("curve", [CURVE, RISING, None])
def test_each_family_ends_at_the_least_that_holds(curve: tuple[float, ...] | None) -> None:
    done = climbed(Space(with_curve(curve), handoff=True))
    policies = [each.policy for each in done]
    assert len({policy.id for policy in policies}) == len(policies)
    masks = [
        t.policy.cache.actions.count("full")
        for t in done
        if t.feasible and isinstance(t.policy.cache, MaskCache) and not t.policy.handoff
    ]
    assert min(masks) == 6
    assert large_steps(held(done, cached=False)[0]) == list(range(5))
    both = held(done, cached=True)
    assert large_steps(both[0]) == list(range(5))
    computed = [p.cache.actions.count("full") for p in both if isinstance(p.cache, MaskCache)]
    assert min(computed) <= 7  # one comes in anew
    kinds = {type(policy.handoff) for policy in policies}
    assert kinds == {type(None), Handoff, AdaptiveHandoff, BandedHandoff}
    assert any(isinstance(policy.cache, RuleCache) for policy in policies)


def test_the_curve_gives_the_first_switch_and_the_last_one() -> None:
    large = [
        len(large_steps(each.policy))
        for each in climbed(Space(with_curve(CURVE), handoff=True))
        if isinstance(each.policy.handoff, Handoff) and each.policy.handoff.until is None
    ]
    assert large[0] == next(k for k, q in enumerate(CURVE) if q <= 0.2 + 0.25 * 0.3)
    assert max(large) <= CURVE.index(min(CURVE))


def test_without_a_small_model_there_are_only_caches() -> None:
    done = climbed(Space(profile(), handoff=False))
    assert all(each.policy.handoff is None for each in done)


@pytest.mark.parametrize("curve", [CURVE, RISING, None])
def test_where_no_hand_off_holds_none_is_dwelt_on(curve: tuple[float, ...] | None) -> None:
    done = climbed(Space(with_curve(curve), handoff=True), needed=range(STEPS))
    assert sum(each.policy.handoff is not None for each in done) <= 14


@pytest.mark.parametrize("curve", [RISING, None])
@pytest.mark.parametrize("needed", [range(7, 12), range(9, STEPS), [12]])
def test_the_large_model_gets_only_the_steps_that_need_it(
    curve: tuple[float, ...] | None, needed: Sequence[int]
) -> None:
    """They lie in the middle, or at the end as T-Stitch has them, the small model first."""
    done = climbed(Space(with_curve(curve), handoff=True), needed)
    assert large_steps(held(done, cached=False)[0]) == list(needed)
    assert large_steps(held(done, cached=True)[0]) == list(needed)


def test_where_the_two_disagree_at_first_the_small_model_never_begins() -> None:
    done = climbed(Space(with_curve(CURVE), handoff=True))
    by_rank = [ranked(SIGMAS, CURVE, large) for large in range(STEPS)]
    begun = [t.policy for t in done if 0 not in large_steps(t.policy)]
    assert all(policy.handoff in by_rank for policy in begun)


def test_a_stroke_of_luck_does_not_keep_the_levels_above_it_from_being_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bisection would look below it only, and the proof would have nothing to choose from."""
    exact = world

    def lucky(policy: Policy, needed: Sequence[int]) -> bool:
        return exact(policy, needed) or len(large_steps(policy)) == 4

    monkeypatch.setattr("tests.tuner.test_ladders.world", lucky)
    done = climbed(Space(with_curve(RISING), handoff=True), needed=range(10, STEPS))
    for cached in (False, True):
        assert any(exact(policy, range(10, STEPS)) for policy in held(done, cached=cached))


def test_where_masks_are_foreseen_the_rules_still_have_their_turn() -> None:
    random = np.random.default_rng(7)
    outputs = np.cumsum(random.standard_normal((STEPS, 30)), axis=0)
    space = Space(profile(), handoff=False, trajectories=[trajectory_of(outputs)])
    ladders = Ladders(space)
    done = [tried(0, Policy(), 100.0)]
    sampled = []
    while len(done) < 21:
        proposal = ladders.next(done)
        number = len(done)
        if proposal is None:  # the sampler's turn
            sampled.append(number)
            rule = RuleCache(threshold=0.1 + 0.01 * number)
            done.append(tried(number, Policy(cache=rule), 30.0))
            continue
        policy = proposal.policy or space.policy(proposal.parameters)
        level = 30.0 if isinstance(policy.cache, RuleCache) else level_db(space, policy)
        done.append(tried(number, policy, level))
    assert sampled == [9, 19]
    assert space.policy(space.default().parameters) == done[5].policy
    masks = [t.policy for t in done if isinstance(t.policy.cache, MaskCache)]
    assert len(masks) == 17
    assert len({policy.id for policy in masks}) == 17
