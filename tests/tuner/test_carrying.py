"""Policies of one space as they fit another."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tests.tuner.test_search import STEPS, profile

from ditune.db.policy import (
    Action,
    AdaptiveHandoff,
    BandedHandoff,
    Handoff,
    MaskCache,
    Payload,
    Policy,
    RuleCache,
)
from ditune.db.records import Impacts
from ditune.tuner.carrying import carried, moved
from ditune.tuner.space import Space

DEPTH = 10
HANDOFF = Handoff(sigma=0.5)
masks = st.lists(st.sampled_from(["full", "step", "cfg", "block"]), max_size=60).map(
    lambda rest: ["full", *rest]
)


def space(*, guidance: bool = True, handoff: bool = False, **changes: Any) -> Space:
    return Space(profile(guidance).model_copy(update=changes), handoff=handoff)


def mask_of(policy: Policy | None) -> MaskCache:
    assert policy is not None
    assert isinstance(policy.cache, MaskCache)
    return policy.cache


def rule_of(policy: Policy | None) -> RuleCache:
    assert policy is not None
    assert isinstance(policy.cache, RuleCache)
    return policy.cache


@given(masks)
def test_as_many_steps_change_nothing(actions: list[Action]) -> None:
    assert actions == moved(actions, len(actions))


@given(masks, st.integers(1, 90))
def test_computed_steps_keep_their_share_of_the_way(actions: list[Action], steps: int) -> None:
    found = moved(actions, steps)
    assert len(found) == steps
    assert found[0] == "full"
    before = [step / len(actions) for step, action in enumerate(actions) if action == "full"]
    after = [step / steps for step, action in enumerate(found) if action == "full"]
    near = 1.0 / steps + 1e-9  # half a step, or a whole one where the last step is meant
    assert len(after) <= len(before)
    assert all(min(abs(a - b) for b in after) <= near for a in before)
    assert all(min(abs(a - b) for b in before) <= near for a in after)


def test_what_is_between_is_reused_as_it_was() -> None:
    actions: list[Action] = ["full", "step", "cfg", "block", "full", "step"]
    doubled = moved(actions, 12)
    assert doubled[0] == doubled[8] == "full"
    assert doubled.count("full") == 2
    assert doubled[4:7] == ["cfg", "cfg", "block"]
    assert moved(doubled, 6) == actions


@given(masks, st.booleans(), st.integers(0, DEPTH + 2), st.booleans())
def test_every_carried_mask_is_valid_here(
    actions: list[Action], guidance: bool, front: int, arc: bool
) -> None:
    axis = tuple(float(step) for step in range(len(actions))) if arc and len(actions) > 1 else None
    cache = MaskCache(
        actions=tuple(actions), payload=Payload(arc_length=axis), fn_blocks=front, bn_blocks=1
    )
    here = space(guidance=guidance)
    found = carried(Policy(cache=cache), here)
    if found is None:
        return
    mask = mask_of(found)
    assert len(mask.actions) == STEPS
    assert mask.payload.arc_length in (None, here.arc_length)
    assert guidance or "cfg" not in mask.actions
    assert "block" not in mask.actions or mask.fn_blocks + mask.bn_blocks < DEPTH
    assert Policy.model_validate_json(found.model_dump_json()) == found
    proposal = here.warm(found)
    assert proposal.parameters.keys() == here.distributions.keys()
    for name, distribution in here.distributions.items():
        assert distribution._contains(distribution.to_internal_repr(proposal.parameters[name]))


def test_a_mask_forecasts_over_the_arc_length_of_its_new_space() -> None:
    here = space()
    actions: tuple[Action, ...] = ("full", "full", "step", "step")
    along = Payload(order=1, arc_length=(0.0, 1.0, 3.0, 4.0))
    found = mask_of(carried(Policy(cache=MaskCache(actions=actions, payload=along)), here))
    assert here.arc_length is not None
    assert found.payload.arc_length == here.arc_length
    repeats = Payload(order=0, arc_length=along.arc_length, cfg_form="fft_delta")
    found = mask_of(carried(Policy(cache=MaskCache(actions=actions, payload=repeats)), here))
    assert found.payload == Payload(order=0)  # as masks are spelled here: the same one, once only


def test_what_the_model_lacks_is_computed() -> None:
    actions: tuple[Action, ...] = ("full", *(("cfg", "block", "step") * 6), "step")
    without = mask_of(carried(Policy(cache=MaskCache(actions=actions)), space(guidance=False)))
    assert [a for a in actions if a != "cfg"].count("full") == 1
    assert without.actions == tuple("full" if a == "cfg" else a for a in actions)
    deep = MaskCache(actions=actions, fn_blocks=DEPTH)
    found = mask_of(carried(Policy(cache=deep), space()))
    assert found.actions == tuple("full" if a == "block" else a for a in actions)
    assert found.fn_blocks == 1
    nothing = MaskCache(actions=("full", "block"), fn_blocks=DEPTH)
    assert carried(Policy(cache=nothing), space()) is None


def test_a_rule_takes_the_impacts_and_the_model_of_its_new_space() -> None:
    rule = RuleCache(delta2=0.3, warmup_frac=0.7, impact_block=0.2, impact_step=0.1)
    here = space(guidance=False, impacts=Impacts(step=1.0, cfg=None, block=0.4))
    found = rule_of(carried(Policy(cache=rule), here))
    assert (found.delta2, found.warmup_frac) == (0.3, 0.7)
    assert (found.impact_step, found.impact_block) == (1.0, 0.4)
    assert found.allowed == ("step", "block")
    proposal = here.warm(Policy(cache=found))
    assert proposal.parameters["kind"] == "rule"
    assert proposal.parameters["delta2"] == 0.3
    assert proposal.parameters["warmup_frac"] == 0.4  # as far as the space goes
    deep = RuleCache(indicator="first_block", fn_blocks=DEPTH)
    assert carried(Policy(cache=deep), here) is None


def test_hand_offs_need_a_small_model_and_steps_for_both() -> None:
    here = space(handoff=True)
    assert carried(Policy(handoff=HANDOFF), space()) is None
    for useless in (Handoff(sigma=2.0), Handoff(sigma=1e-4), BandedHandoff(bands=((5.0, 0.0),))):
        assert carried(Policy(handoff=useless), here) is None
    for useful in (HANDOFF, AdaptiveHandoff(delta=0.02), BandedHandoff(bands=((5.0, 0.6),))):
        assert carried(Policy(handoff=useful), here) == Policy(handoff=useful)
    point = here.warm(Policy(handoff=HANDOFF)).parameters
    assert here.policy(point).handoff is not None
    assert (point["handoff"], point["handoff_frac"]) == ("static", 0.55)  # sigma 0.5 is the large's
    late = here.warm(Policy(handoff=BandedHandoff(bands=((5.0, 0.62),)))).parameters
    assert (late["head_frac"], late["tail_steps"]) == (0.4, 5)
    assert here.warm(Policy(handoff=AdaptiveHandoff(delta=0.02))).parameters["delta"] == 0.02


def test_the_model_that_comes_in_computes_its_first_step() -> None:
    reused: list[Action] = ["step"] * (STEPS - 1)
    cache = MaskCache(actions=("full", *reused))
    found = mask_of(carried(Policy(cache=cache, handoff=HANDOFF), space(handoff=True)))
    assert [step for step, action in enumerate(found.actions) if action == "full"] == [0, 11]
