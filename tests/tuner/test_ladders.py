"""What is proposed before the sampler: three families, each bisected, then variants."""

from __future__ import annotations

import pytest
from tests.tuner.test_search import STEPS, prior, profile

from ditune.db.policy import AdaptiveHandoff, BandedHandoff, Handoff, MaskCache, Policy, RuleCache
from ditune.db.records import Profile, Trial
from ditune.tuner.handoffs import small_steps
from ditune.tuner.ladders import Ladders
from ditune.tuner.space import Space

RISING = tuple(0.3 + 0.01 * step for step in range(STEPS))
CURVE = tuple(0.5 - 0.02 * step if step < 16 else 0.3 for step in range(STEPS))


def world(policy: Policy) -> bool:
    """Say whether a policy holds: six computed steps do, five of the large model, or three."""
    sigmas = [1.0 - step / STEPS for step in range(STEPS)]
    large = STEPS - len(small_steps(policy.handoff, sigmas))
    if isinstance(policy.cache, MaskCache):
        return policy.cache.actions.count("full") >= 6 and large >= 3
    return large >= 5


def trial(number: int, policy: Policy) -> Trial:
    violation = {"judge": -0.1 if world(policy) else 0.1}
    return prior(number, policy).model_copy(update={"violation": violation})


def climbed(space: Space) -> list[Trial]:
    ladders, done = Ladders(space), list[Trial]()
    while (proposal := ladders.next(done)) is not None:
        done.append(trial(len(done), space.policy(proposal.parameters)))
        assert len(done) < 60
    return done


def with_curve(curve: tuple[float, ...] | None) -> Profile:
    return profile().model_copy(update={"disagreement": curve})


@pytest.mark.parametrize("curve", [CURVE, RISING, None])
def test_each_family_ends_at_the_least_that_holds(curve: tuple[float, ...] | None) -> None:
    space = Space(with_curve(curve), handoff=True)
    done = climbed(space)
    policies = [each.policy for each in done]
    assert len({policy.id for policy in policies}) == len(policies)
    held = [each.policy for each in done if each.feasible]
    masks = [
        p.cache.actions.count("full")
        for p in held
        if isinstance(p.cache, MaskCache) and not p.handoff
    ]
    assert min(masks) == 6
    switches = {
        cached: min(
            STEPS - len(small_steps(p.handoff, space.sigmas))
            for p in held
            if isinstance(p.handoff, Handoff) and bool(p.cache) == cached
        )
        for cached in (False, True)
    }
    assert switches == {False: 5, True: 3}
    kinds = {type(policy.handoff) for policy in policies}
    assert kinds == {type(None), Handoff, AdaptiveHandoff} | ({BandedHandoff} if curve else set())
    assert any(isinstance(policy.cache, RuleCache) for policy in policies)


def test_the_curve_gives_the_first_switch_and_the_last_one() -> None:
    space = Space(with_curve(CURVE), handoff=True)
    large = [
        STEPS - len(small_steps(each.policy.handoff, space.sigmas))
        for each in climbed(space)
        if isinstance(each.policy.handoff, Handoff) and each.policy.handoff.until is None
    ]
    assert large[0] == next(k for k, q in enumerate(CURVE) if q <= 0.2 + 0.25 * 0.3)
    assert max(large) <= CURVE.index(min(CURVE))


def test_without_a_small_model_there_are_only_caches() -> None:
    done = climbed(Space(profile(), handoff=False))
    assert all(each.policy.handoff is None for each in done)


def test_where_no_hand_off_holds_none_is_dwelt_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.tuner.test_ladders.world", lambda policy: policy.handoff is None)
    done = climbed(Space(with_curve(CURVE), handoff=True))
    assert sum(each.policy.handoff is not None for each in done) <= 12


def test_where_the_two_agree_from_the_start_the_steps_that_do_not_come_first() -> None:
    """A late switch that holds must not keep a hand-off that gives more away from being tried."""
    peaked = tuple(0.3 + 0.4 * (STEPS // 3 <= step < STEPS // 2) for step in range(STEPS))
    space = Space(with_curve(peaked), handoff=True)
    handed = [each.policy for each in climbed(space) if each.policy.handoff is not None]
    assert isinstance(handed[0].handoff, BandedHandoff)
    least = min(
        (p for p in handed if p.cache is None and isinstance(p.handoff, BandedHandoff)),
        key=lambda p: STEPS - len(small_steps(p.handoff, space.sigmas)) + 100 * (not world(p)),
    )
    taken = set(range(STEPS)) - set(small_steps(least.handoff, space.sigmas))
    assert len(taken) == 5
    assert {step for step, level in enumerate(peaked) if level > 0.5} <= taken


def test_where_no_switch_holds_the_steps_that_agree_best_are_handed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """T-Stitch's order comes out of a curve that rises: the small model first."""
    space = Space(with_curve(RISING), handoff=True)

    original = world

    def first_steps_only(policy: Policy) -> bool:
        if policy.handoff is None:
            return original(policy)
        small = small_steps(policy.handoff, space.sigmas)
        return isinstance(policy.handoff, BandedHandoff) and max(small) < 9

    monkeypatch.setattr("tests.tuner.test_ladders.world", first_steps_only)
    done = [each.policy for each in climbed(space) if each.feasible]
    handed = [policy for policy in done if policy.handoff is not None]
    assert max(len(small_steps(policy.handoff, space.sigmas)) for policy in handed) == 9
    assert any(policy.cache is not None for policy in handed)
