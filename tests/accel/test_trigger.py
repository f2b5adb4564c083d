from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditune.accel.trigger import INTERVAL_MIN, MaskTrigger, Measured, RuleTrigger
from ditune.db.policy import Action, Granularity, MaskCache, RuleCache

ALL: tuple[Granularity, ...] = ("step", "cfg", "block")
BETWEEN = Measured(deviation=0.05, distances={"step": 1.0, "cfg": 2.0, "block": 9.0})


def simulate(trigger: RuleTrigger, steps: int, measured: Measured | None) -> list[Action]:
    actions = []
    for step in range(steps):
        actions.append(trigger.decide(step))
        if actions[-1] == "full":
            trigger.observe(step, measured)
    return actions


@pytest.mark.parametrize(
    ("warmup", "interval", "cooldown", "full"),
    [
        (2, 2, 0, 26),
        (2, 2, 1, 26),
        (5, 3, 0, 20),
        (5, 3, 1, 20),
        (10, 2, 0, 30),
        (10, 2, 1, 30),
        (10, 3, 0, 23),
        (10, 3, 1, 24),
        (10, 4, 0, 20),
        (10, 4, 1, 20),
        (10, 6, 0, 16),
        (10, 6, 1, 17),
    ],
)
def test_step_counts_with_a_fixed_interval(
    warmup: int, interval: int, cooldown: int, full: int
) -> None:
    """The table of exact counts for 50 steps in the MixCache reference."""
    rule = RuleCache(
        warmup_frac=warmup / 50,
        interval_init=interval,
        interval_max=interval,
        cooldown_steps=cooldown,
        delta2=0.1,
    )
    actions = simulate(RuleTrigger(rule, 50, ALL), 50, BETWEEN)
    assert full == actions.count("full")


def test_nothing_is_reused_before_two_full_steps() -> None:
    rule = RuleCache(warmup_frac=0.0, cooldown_steps=0)
    actions = simulate(RuleTrigger(rule, 20, ALL), 20, None)
    assert actions[:2] == ["full", "full"]
    assert actions[2] != "full"


def test_large_deviation_shortens_the_interval_and_small_one_lengthens_it() -> None:
    rule = RuleCache(interval_init=4, interval_max=6, delta2=0.1, delta1_ratio=0.5)
    trigger = RuleTrigger(rule, 50, ALL)
    for _ in range(10):
        trigger.observe(0, Measured(1.0, {}))
    assert trigger.interval == INTERVAL_MIN
    for _ in range(10):
        trigger.observe(0, Measured(0.01, {}))
    assert trigger.interval == 6
    trigger.observe(0, Measured(0.07, {}))
    assert trigger.interval == 6


def test_repeat_penalty_alternates_between_the_two_best() -> None:
    rule = RuleCache(warmup_frac=0.0, interval_init=8, interval_max=8, cooldown_steps=0)
    trigger = RuleTrigger(rule, 20, ALL)
    near = Measured(0.05, {"step": 1.0, "cfg": 3.0, "block": 9.0})
    chosen = [a for a in simulate(trigger, 20, near) if a != "full"]
    assert chosen[:4] == ["step", "cfg", "step", "cfg"]


def test_best_repeats_when_it_is_better_than_the_penalty() -> None:
    rule = RuleCache(warmup_frac=0.0, interval_init=8, interval_max=8, cooldown_steps=0)
    far = Measured(0.05, {"step": 1.0, "cfg": 6.0, "block": 9.0})
    chosen = [a for a in simulate(RuleTrigger(rule, 20, ALL), 20, far) if a != "full"]
    assert {"step"} == set(chosen)


def test_granularities_that_the_model_lacks_are_never_chosen() -> None:
    trigger = RuleTrigger(RuleCache(warmup_frac=0.1), 30, ("step", "block"))
    assert "cfg" not in simulate(trigger, 30, BETWEEN)
    mask = MaskCache(actions=("full", "cfg", "step"))
    assert [MaskTrigger(mask, ("step", "block")).decide(i) for i in range(3)] == [
        "full",
        "full",
        "step",
    ]


@given(
    warmup=st.floats(0, 1),
    cooldown=st.integers(0, 10),
    deviations=st.lists(st.floats(0, 2), min_size=60, max_size=60),
)
def test_protected_steps_are_full_and_gaps_never_exceed_the_interval(
    warmup: float, cooldown: int, deviations: list[float]
) -> None:
    rule = RuleCache(warmup_frac=warmup, cooldown_steps=cooldown)
    trigger = RuleTrigger(rule, 60, ALL)
    last_full = -1
    for step, deviation in enumerate(deviations):
        action = trigger.decide(step)
        if step < trigger.warmup_steps or step >= 60 - cooldown:
            assert action == "full"
        if action == "full":
            last_full = step
            trigger.observe(step, Measured(deviation, {}))
        assert INTERVAL_MIN <= trigger.interval <= rule.interval_max
        assert step - last_full < rule.interval_max
