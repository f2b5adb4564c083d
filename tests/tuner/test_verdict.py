"""What an evaluation gave becomes a trial, or the reason to end it early."""

from __future__ import annotations

import pytest
from tests.tuner.test_search import FLOORS, STUDY

from ditune.accel.apply import Summary
from ditune.db.policy import MaskCache, Policy, RuleCache
from ditune.db.records import Expectation, Job
from ditune.tuner.evaluate import Case, Outcome
from ditune.tuner.quality import parse_constraints
from ditune.tuner.sequential import guessed
from ditune.tuner.verdict import (
    Found,
    given_up,
    hopeless,
    missed_for_sure,
    search_speedup,
    trial_of,
    violations,
)


def outcome(psnr: float, ratio: float = 2.0, pair: tuple[float, float] | None = None) -> Outcome:
    summary = Summary(None, "", {}, 1, 1, 0, ratio, 0, 0, ())
    baseline, tuned = pair or (None, 50.0)
    return Outcome(Case("a", 0), {"psnr": psnr}, tuned, baseline, summary)


def test_a_lucky_pair_cannot_beat_the_work_left_out() -> None:
    lucky = [outcome(40.0, ratio=1.5, pair=(100.0, 20.0))]
    assert search_speedup(lucky) == 1.5
    assert search_speedup([outcome(20.0, ratio=1.5)]) == 1.5  # given up before its pair
    honest = [outcome(40.0, ratio=3.0, pair=(100.0, 50.0))]
    assert pytest.approx(2.0) == search_speedup(honest)


def test_a_hand_off_that_was_given_up_early_is_as_fast_as_it_was() -> None:
    summary = Summary(None, "", {}, 1, 1, 1, 1.0, 0, 0, ())  # one forward of the small model
    seen = [Outcome(Case("a", 0), {"psnr": 10.0}, 50.0, None, summary, earlier_ms=200.0)]
    assert search_speedup(seen) == 4.0
    unknown = [Outcome(Case("a", 0), {"psnr": 10.0}, 50.0, None, summary)]
    assert search_speedup(unknown) == 1.0


def test_hopeless_trials_end_early() -> None:
    expected = guessed(FLOORS, 3)
    assert "a prompt gave 26, below 27" in hopeless(FLOORS, [{"psnr": 26.0}], {})
    assert "after 2 of its prompts it will miss 35" in hopeless(
        FLOORS, [{"psnr": 30.0}, {"psnr": 31.0}], expected
    )
    assert not hopeless(FLOORS, [{"psnr": 30.0}, {"psnr": 31.0}], {})
    assert not hopeless(FLOORS, [{"psnr": 33.0}], expected)
    assert not hopeless(FLOORS, [{"psnr": 33.0}, {"psnr": 39.0}], expected)


def job(policy: Policy, faster_than: float) -> Job:
    return Job(
        uuid="u",
        study=STUDY,
        number=0,
        source="search",
        policy=policy,
        constraints=FLOORS,
        prompts=("a",),
        seeds=(0,),
        pairs=1,
        faster_than=faster_than,
    )


def test_what_is_given_up_after_an_easy_prompt_misses_its_floor() -> None:
    pattern = Expectation(differences=(6.0, -6.0), sd=0.1, freedom=9)
    asked = job(Policy(), faster_than=1.0).model_copy(
        update={"prompts": ("a", "b"), "seeds": (0, 1), "expected": {"psnr": pattern}}
    )
    trial = trial_of(asked, Found(({"psnr": 38.0},)), 1.0)
    assert trial.reason == "psnr: after 1 of its prompts it will miss 35"
    assert trial.quality["psnr"].mean == 38.0  # what was seen
    # 26 follows: a mean of 32 with a bound 8.3 below it, and a worst prompt below 27
    assert trial.violation == pytest.approx({"psnr": 11.3 / 35, "psnr_worst": 1 / 27}, abs=2e-3)
    held = trial_of(asked, Found(({"psnr": 60.0}, {"psnr": 60.0})), 1.0)
    assert held.feasible


def test_a_rule_may_leave_out_more_of_another_video() -> None:
    mask, rule = Policy(cache=MaskCache(actions=("full",))), Policy(cache=RuleCache(threshold=0.1))
    good = [{"psnr": 50.0}]
    assert given_up(job(mask, faster_than=2.0), good, work_ratio=1.9)
    assert not given_up(job(mask, faster_than=2.0), good, work_ratio=2.0)
    assert not given_up(job(rule, faster_than=2.0), good, work_ratio=1.9)
    assert given_up(job(rule, faster_than=2.0), good, work_ratio=1.5)


def test_violations_have_a_margin_on_the_mean() -> None:
    values = [{"psnr": 34.0}, {"psnr": 36.4}]
    assert violations(FLOORS, values)["psnr"] > 0  # the mean holds, its margin does not
    assert "miss 35" in missed_for_sure(FLOORS, values)
    assert not missed_for_sure(FLOORS, [{"psnr": 50.0}])
    assert violations(FLOORS, values)["psnr_worst"] < 0
    assert all(v <= 0 for v in violations(FLOORS, [{"psnr": 50.0}]).values())


def test_shares_of_right_videos_are_given_up_by_their_bound_and_count_as_they_are() -> None:
    floors = parse_constraints("judge_digit>=-0.03")

    def scored(*scores: float) -> list[dict[str, float]]:
        return [{"judge_digit": score} for score in scores]

    assert "stay below" in hopeless(floors, scored(-1.0, -1.0, -1.0), {})
    assert not hopeless(floors, scored(-1.0, -1.0, 0.0, 0.0), {})
    assert not hopeless(floors, scored(-1.0, *[0.0] * 19), {})
    assert "miss -0.03" in missed_for_sure(floors, scored(*[-1.0] * 4, *[0.0] * 30))
    assert not missed_for_sure(floors, scored(*[-1.0] * 2, *[0.0] * 32))  # may be bad luck
    assert not missed_for_sure(floors, scored(*[0.0] * 34))
    assert violations(floors, scored(*[0.0] * 32))["judge_digit"] <= 0.0
    assert violations(floors, scored(1.0, -1.0, *[0.0] * 30))["judge_digit"] <= 0.0
    assert violations(floors, scored(-1.0, *[0.0] * 31))["judge_digit"] > 0.0
