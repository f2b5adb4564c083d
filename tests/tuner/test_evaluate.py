"""Evaluation on a real pipeline: the miniature's small model with few steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ditune import miniature
from ditune.db.policy import MaskCache, Policy
from ditune.tuner.evaluate import Case, Evaluator, cases_of
from ditune.tuner.fewer_steps import fewest_steps
from ditune.tuner.quality import PSNR_CAP_DB, parse_constraints
from ditune.tuner.source import FolderSource

STEPS = 8
HALF = Policy(
    cache=MaskCache(actions=("full", "full", "step", "full", "step", "full", "step", "full"))
)


@pytest.fixture(scope="module")
def source() -> FolderSource:
    call = dict(miniature.CALL) | {"num_inference_steps": STEPS}
    prompts = tuple(miniature.captions("calibration")[:3])
    return FolderSource("small", miniature.load("small"), None, call, prompts, prompts)


@pytest.fixture
def evaluator(source: FolderSource) -> Evaluator:
    return Evaluator(source, parse_constraints("psnr>=20,judge>=-1"))


def test_the_plain_pipeline_against_itself_is_perfect(evaluator: Evaluator) -> None:
    case = Case(evaluator.source.calibration[0], 1)
    outcome = evaluator.measure(Policy(), case, paired=True)
    assert outcome.values == {"psnr": PSNR_CAP_DB, "judge": 0.0}
    assert outcome.values == evaluator.plain_values(case)
    assert outcome.baseline_ms is not None
    assert outcome.baseline_ms > 0


def test_a_policy_costs_quality_and_leaves_the_pipeline_clean(evaluator: Evaluator) -> None:
    case = Case(evaluator.source.calibration[1], 2)
    before = evaluator.plain(case)
    outcome = evaluator.measure(HALF, case, paired=False)
    assert outcome.values["psnr"] < PSNR_CAP_DB
    assert outcome.baseline_ms is None
    assert outcome.summary.steps == {"full": 5, "step": 3}
    assert np.array_equal(before, evaluator.generate(case)[0])


def test_what_was_computed_is_counted_in_plain_videos(evaluator: Evaluator) -> None:
    case = Case(evaluator.source.calibration[0], 3)
    evaluator.plain(case)
    evaluator.plain(case)
    assert evaluator.videos == 1.0
    outcome = evaluator.measure(HALF, case, paired=True)
    assert outcome.summary.work_ratio == pytest.approx(STEPS / 5)
    assert evaluator.videos == pytest.approx(1.0 + 1.0 + 5 / STEPS)
    call = {**evaluator.source.call, "num_inference_steps": STEPS // 2}
    source = replace(evaluator.source, call=call)  # type: ignore[type-var]
    shorter = Evaluator(source, evaluator.constraints, plain=evaluator, worth=0.5)
    shorter.measure(Policy(), case, paired=False)
    assert evaluator.videos == pytest.approx(2.0 + 5 / STEPS + 0.5)
    shorter.plain(case)
    assert evaluator.videos == pytest.approx(2.0 + 5 / STEPS + 1.0)
    assert shorter.videos == 0.0


def test_order_alternates_and_stops_when_told(evaluator: Evaluator) -> None:
    cases = cases_of(evaluator.source.calibration, 5, seed=10)
    assert len({case.seed for case in cases}) == 5
    assert cases[3].prompt == cases[0].prompt
    ran = list(evaluator.run(HALF, cases[:3], pairs=1))
    assert [outcome.baseline_ms is not None for outcome in ran] == [False, False, True]
    ran = list(evaluator.run(HALF, cases, pairs=1, stop=lambda seen: len(seen) == 2))
    assert [outcome.baseline_ms for outcome in ran] == [None, None]


def test_fewest_steps_hold_the_floors_and_one_fewer_does_not(source: FolderSource) -> None:
    cases = cases_of(source.calibration, 2, seed=20)
    loose = fewest_steps(Evaluator(source, parse_constraints("psnr>=1")), cases)
    assert loose.steps == 1
    assert loose.speedup is not None
    assert loose.speedup.n == 2
    demanding = Evaluator(source, parse_constraints("psnr>=99"))
    strict = fewest_steps(demanding, cases)
    tried = 3 + 5 + 6 + 7  # steps, on both cases, beside two plain videos
    assert demanding.videos == pytest.approx(2.0 + 2.0 * tried / STEPS)
    assert (strict.steps, strict.speedup, strict.quality) == (STEPS, None, {})


def test_under_other_floors_the_plain_videos_are_the_same(evaluator: Evaluator) -> None:
    case = Case(evaluator.source.calibration[0], 5)
    video = evaluator.plain(case)
    other = evaluator.under(parse_constraints("ssim>=0.5"))
    assert (other.knows(case), other.plain(case) is video) == (True, True)
    outcome = other.measure(HALF, case, paired=False)
    assert set(outcome.values) == {"ssim"}
    assert outcome.earlier_ms is not None
    assert other.videos == evaluator.videos == pytest.approx(1.0 + 5 / STEPS)
    second = Case(evaluator.source.calibration[1], 6)
    made = other.plain(second)
    assert evaluator.plain(second) is made
    assert set(evaluator.plain_values(case)) == {"psnr", "judge"}
