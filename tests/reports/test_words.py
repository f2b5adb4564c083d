"""Policies and foreign text in words."""

from __future__ import annotations

from typing import get_args

import pytest

from ditune.db.cost import Cost, Spent
from ditune.db.policy import (
    AdaptiveHandoff,
    BandedHandoff,
    Handoff,
    Indicator,
    MaskCache,
    Payload,
    Policy,
    RuleCache,
)
from ditune.db.records import Quality, SearchFigures
from ditune.reports import words


def test_mask_is_said_in_counts() -> None:
    full, step, cfg, _ = words.ACTIONS
    actions = (full,) * 21 + (step,) * 24 + (cfg,) * 5
    policy = Policy(cache=MaskCache(actions=actions, payload=Payload(order=0)))
    expected = (
        "Of 50 steps 21 run in full, 24 reuse the whole step, 5 reuse guidance. "
        "What is left out repeats the last output."
    )
    assert expected == words.policy_in_words(policy)


def test_one_is_not_plural() -> None:
    mask = MaskCache(actions=("full", "block"), fn_blocks=2, bn_blocks=1)
    said = words.policy_in_words(Policy(cache=mask))
    assert "Of 2 steps 1 runs in full, 1 reuses the middle blocks." in said
    assert "still run the first 2 blocks and the last block." in said


def test_rule_is_said_with_its_thresholds() -> None:
    rule = RuleCache(delta2=0.1, delta1_ratio=0.4, warmup_frac=0.2, cooldown_steps=1)
    said = words.policy_in_words(Policy(cache=rule), steps=50)
    assert "The first 10 of 50 steps and the last one run in full" in said
    assert "one in 2 at first, and down to one in 6" in said
    assert "by more than 0.1, fewer below 0.04" in said


@pytest.mark.parametrize(
    ("warmup", "cooldown", "expected"),
    [
        (0.0, 0, "The first 2 of 50 steps run in full"),  # the trigger needs two to compare
        (0.21, 3, "The first 11 of 50 steps and the last 3 run in full"),  # rounded up
    ],
)
def test_rule_counts_steps_as_the_trigger_does(warmup: float, cooldown: int, expected: str) -> None:
    rule = RuleCache(warmup_frac=warmup, cooldown_steps=cooldown)
    assert expected in words.policy_in_words(Policy(cache=rule), steps=50)


def test_rule_without_step_count_says_a_share() -> None:
    assert "The first 20% of the steps" in words.policy_in_words(Policy(cache=RuleCache()))


def test_handoff_and_nothing() -> None:
    handoff = Policy(handoff=Handoff(sigma=0.6))
    assert words.policy_in_words(handoff) == "The small model takes over below sigma 0.6."
    assert words.policy_in_words(Policy()) == "The plain pipeline: nothing is left out."
    assert words.policy_in_brief(handoff) == "hand-off below sigma 0.6"
    said = words.policy_in_words(Policy(handoff=Handoff(sigma=0.6, until=0.1)))
    assert said == "The small model takes over below sigma 0.6, until sigma 0.1."
    bands = Policy(handoff=BandedHandoff(bands=((0.9, 0.6), (0.4, 0.0))))
    said = words.policy_in_words(bands)
    assert said == "The small model runs between sigma 0.9 and 0.6, between 0.4 and 0."
    assert words.policy_in_brief(bands) == "small model in 2 bands of sigma"
    one = Policy(handoff=BandedHandoff(bands=((0.6, 0.0),)))
    assert words.policy_in_brief(one) == "small model in 1 band of sigma"
    adaptive = Policy(handoff=AdaptiveHandoff())
    said = words.policy_in_words(adaptive)
    assert "change of the denoised estimate falls by less than 0.01 a step" in said
    assert "after 10 % of the steps, at the latest after 60 %." in said
    assert words.policy_in_brief(adaptive) == "adaptive hand-off, denoised 0.01"
    assert words.policy_in_brief(Policy()) == "plain pipeline"


def test_brief_names_only_what_occurs() -> None:
    mask = Policy(cache=MaskCache(actions=("full", "step", "step")))
    assert words.policy_in_brief(mask) == "mask: 1 full, 2 step"
    rule = Policy(cache=RuleCache(allowed=("step", "cfg")))
    assert words.policy_in_brief(rule) == "rule: delta 0.1, interval 2 to 6, step, cfg"


@pytest.mark.parametrize(
    ("foreign", "expected"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\u202eb\u2066", "a\\u202eb\\u2066"),
        ("\ud800", "\\ud800"),
        ("\x00\x85", "\\x00\\x85"),
        ("两\n\t👩‍🚀 שלום", "两\n\t👩‍🚀 שלום"),
    ],
)
def test_what_acts_becomes_visible_and_the_rest_stays(foreign: str, expected: str) -> None:
    assert expected == words.visible(foreign)


@pytest.mark.parametrize(
    ("milliseconds", "expected"),
    [
        (0.01234, "0.0123 ms"),
        (812.4, "812 ms"),
        (999.7, "1,000 ms"),
        (1234.5, "1,234 ms"),
        (18_930, "18.9 s"),
    ],
)
def test_durations(milliseconds: float, expected: str) -> None:
    assert expected == words.duration(milliseconds)


def test_shortened() -> None:
    assert words.shortened("short", 5) == "short"
    assert words.shortened("longer", 4) == "lon…"


@pytest.mark.parametrize(
    ("value", "expected"),
    [(31.1249, "31.12"), (30.0, "30"), (-0.0021, "-0.0021"), (12345.6, "12,346")],
)
def test_numbers(value: float, expected: str) -> None:
    assert expected == words.number(value)


def test_every_indicator_form_and_order_has_its_words() -> None:
    for indicator in get_args(Indicator):
        rule = RuleCache(indicator=indicator, threshold=0.3, accumulated=False, interval_max=5)
        said = words.policy_in_words(Policy(cache=rule))
        assert "changed by 0.3 since the last full step, or after 5 steps" in said
        whole = "the whole step" in said  # blocks that have run are no whole step
        assert whole == (indicator != "first_block")
        assert f"rule: {indicator} 0.3, at most 5" in words.policy_in_brief(Policy(cache=rule))
    mask = MaskCache(actions=("full", "step"), payload=Payload(form="latent", order=2))
    said = words.policy_in_words(Policy(cache=mask))
    assert "in a parabola through the last three differences from the input" in said
    over = Payload(arc_length=(0.0, 2.0))
    said = words.policy_in_words(Policy(cache=MaskCache(actions=("full", "step"), payload=over)))
    assert "in a line through the last two outputs, over arc length." in said


@pytest.mark.parametrize(
    ("byte_count", "said"),
    [(512, "512 bytes"), (2048, "2 KiB"), (3 * 2**20, "3.0 MiB"), (5 * 2**29, "2.5 GiB")],
)
def test_memory_is_said_in_the_unit_that_reads_best(byte_count: int, said: str) -> None:
    assert said == words.memory(byte_count)


def test_what_a_search_saw_is_never_said_like_a_proof() -> None:
    quality = {
        "psnr": Quality(floor=35.0, mean=37.25, worst=31.0, n=3),
        "psnr_worst": Quality(floor=27.0, mean=37.25, worst=31.0, n=3),
    }
    seen = SearchFigures(trials=20, prompts=3, pairs=1, speedup=2.1, quality=quality)
    expected = (
        "The search, which chose among 20 policies, saw 2.10x (1 pair), psnr 37.25, psnr_worst 31 "
        "on 3 prompts of its own; a choice leans on luck."
    )
    assert expected == words.search_in_words(seen)
    estimated = seen.model_copy(update={"speedup": None, "pairs": 0})
    assert "saw psnr 37.25" in words.search_in_words(estimated)
    never = SearchFigures(trials=1, prompts=0, pairs=0, speedup=None, quality={})
    assert words.search_in_words(never) == (
        "The search tried 1 policy and never this one: it was only predicted."
    )


def test_a_cost_is_said_part_by_part() -> None:
    cost = Cost(
        profile=Spent(seconds=60.0, videos=9.04),
        search=Spent(seconds=200.4, videos=12.0),
        proof=Spent(seconds=100.0, videos=20.0),
        forwards_per_video=100,
    )
    assert words.cost_in_words(cost) == (
        "360 s (profile 60 s, search 200 s, proof 100 s) and the compute of 41.0 plain videos "
        "(profile 9.0, search 12.0, proof 20.0), 4,104 forwards"
    )


def test_moments_are_shown_to_the_second() -> None:
    assert words.moment("2026-01-02T03:04:05.678901Z") == "2026-01-02T03:04:05Z"
    assert words.moment("2026-01-02T03:04:05Z") == "2026-01-02T03:04:05Z"
