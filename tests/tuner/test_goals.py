"""What each tier of a session gets: trials, a share of the time, videos, a space."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.tuner.test_search import profile

from ditune.profiler.record import Recorded
from ditune.tuner.evaluate import Evaluator
from ditune.tuner.goals import CONFIRM_SEED, SEARCH_SEED, Goal, goals_of
from ditune.tuner.result import Options
from ditune.tuner.source import FolderSource
from ditune.tuner.tiers import tiers_of

PSNR, JUDGE = "psnr>=35,psnr_worst>=27", "judge>=-0.03"


def goals(source: FolderSource, text: str, trials: int = 20) -> tuple[list[Goal], list[str]]:
    """Return the goals of some tiers and the sentences said about them."""
    tiers = tiers_of(None, text, PSNR)
    notes: list[str] = []
    recorded = Recorded(profile(), (), ())
    evaluator = Evaluator(source, tiers[0].constraints)
    return goals_of(tiers, evaluator, Options(trials=trials), recorded, notes.append), notes


@pytest.mark.parametrize(
    ("trials", "expected"),
    [(20, [20, 7, 7]), (60, [60, 20, 20]), (8, [8, 5, 5]), (3, [3, 3, 3])],
)
def test_tiers_after_the_first_try_a_third(
    tiny: FolderSource, trials: int, expected: list[int]
) -> None:
    found, _ = goals(tiny, "lossless,high,fast", trials)
    assert [goal.trials for goal in found] == expected


def test_what_is_left_of_the_time_is_shared_as_the_trials_are(tiny: FolderSource) -> None:
    found, _ = goals(tiny, "lossless,high,fast")
    assert [goal.share for goal in found] == pytest.approx([20 / 34, 7 / 14, 1.0])


def test_each_tier_is_a_study_of_its_own_on_the_same_videos(tiny: FolderSource) -> None:
    found, notes = goals(tiny, "lossless,high,fast")
    assert len({goal.settings.study for goal in found}) == 3
    assert len({(goal.search_cases, goal.proof_cases) for goal in found}) == 1
    assert (found[0].search_cases[0].seed, found[0].proof_cases[0].seed) == (
        SEARCH_SEED,
        CONFIRM_SEED,
    )
    assert len({id(goal.space) for goal in found}) == 1
    assert [goal.evaluator.constraints for goal in found] == [g.tier.constraints for g in found]
    assert notes == []


def test_the_small_model_serves_only_tiers_that_allow_it(tiny: FolderSource) -> None:
    source = replace(tiny, small=object())
    found, notes = goals(source, f"same:{PSNR};alike:{JUDGE}")
    assert [goal.space.hands_over for goal in found] == [False, True]
    assert "same-seed floor" in notes[0]
    assert "the proof takes 212 videos instead of 30" in notes[1]
    assert [len(goal.proof_cases) for goal in found] == [30, 212]
    assert [len(goal.search_cases) for goal in found] == [3, 34]
