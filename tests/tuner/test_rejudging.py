"""What a trial of one search says under the floors of another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tuner.test_search import FLOORS, prior

from ditune.db.policy import MaskCache, Policy
from ditune.db.records import Job, Trial
from ditune.tuner.quality import parse_constraints
from ditune.tuner.verdict import Found, rejudged, trial_of, undecided, with_known

SEEDS = (10, 11, 12)
POLICY = Policy(cache=MaskCache(actions=("full", "step")))


def ended(scores: list[float], floors: str, *, unfit: str = "", metric: str = "psnr") -> Trial:
    """Return the trial of a job on three videos that ended with some scores."""
    job = Job(
        uuid="u",
        study="first",
        number=3,
        source="prior",
        policy=POLICY,
        constraints=parse_constraints(floors),
        prompts=("a", "b", "c"),
        seeds=SEEDS,
        pairs=1,
    )
    return trial_of(job, Found(tuple({metric: s} for s in scores), 2.0, 2.5, unfit), 1.0)


def under(trial: Trial, floors: str, seeds: tuple[int, ...] = SEEDS) -> Trial:
    found = rejudged(trial, parse_constraints(floors), seeds)
    assert found is not None
    return found


@given(st.lists(st.floats(0, 100), min_size=3, max_size=3), st.floats(0, 100), st.floats(0, 100))
def test_a_whole_trial_is_judged_as_if_it_had_been_run_under_the_new_floors(
    scores: list[float], mean: float, worst: float
) -> None:
    floors = f"psnr>={mean:.3f},psnr_worst>={worst:.3f}"
    fresh = ended(scores, floors)
    judged = under(ended(scores, "psnr>=0"), floors)
    assert judged == fresh.model_copy(update={"created_at": judged.created_at})
    assert not undecided(fresh)


def test_it_stays_the_trial_that_it_is() -> None:
    trial = ended([40.0, 41.0, 42.0], "psnr>=35")
    found = under(trial, "psnr>=45")
    assert not found.feasible
    assert found.reason == "psnr: 3 prompts miss 45"
    assert (found.uuid, found.study, found.number) == ("u", "first", 3)
    assert (found.speedup, found.work_ratio) == (2.0, 2.5)


def test_what_was_given_up_is_open_under_looser_floors() -> None:
    trial = ended([20.0], "psnr>=35,psnr_worst>=27")
    assert (trial.state, undecided(trial)) == ("rejected", False)
    found = under(trial, "psnr>=22,psnr_worst>=15")
    assert (found.state, undecided(found), found.feasible) == ("rejected", True, False)
    assert found.quality["psnr"].n == 1
    again = under(trial, "psnr>=22,psnr_worst>=21")  # its one video is below that too
    assert (again.state, undecided(again)) == ("rejected", False)
    assert "a prompt gave 20" in str(again.reason)


def test_what_its_few_videos_make_hopeless_is_not_tried_again() -> None:
    trial = ended([20.0], "psnr>=60,psnr_worst>=27")
    found = under(trial, "psnr>=45")  # prompts do not differ by so much
    assert found.reason == "psnr: after 1 of its prompts it will miss 45"
    assert found.violation["psnr"] > 0
    assert undecided(under(trial, "psnr>=22"))


def test_what_cannot_run_cannot_under_any_floors() -> None:
    trial = ended([], "psnr>=35", unfit="it needs more memory")
    found = under(trial, "ssim>=0.1,judge>=-1")
    assert found.reason == "it cannot run here: it needs more memory"
    assert found.violation == {"ssim": 1.0, "judge": 1.0}
    assert (found.quality, undecided(found)) == ({}, False)


def test_other_videos_and_metrics_say_nothing() -> None:
    trial = ended([40.0, 41.0, 42.0], "psnr>=35")
    assert rejudged(trial, parse_constraints("psnr>=35,ssim>=0.9"), SEEDS) is None
    assert rejudged(trial, FLOORS, (20, 21)) is None
    assert rejudged(trial.model_copy(update={"state": "failed"}), FLOORS, SEEDS) is None
    old = trial.model_copy(update={"scores": ()})  # of a release that kept none
    assert rejudged(old, FLOORS, SEEDS) is None


@pytest.mark.parametrize(
    ("seeds", "state", "count"), [((10, 11), "complete", 2), ((11, 99), "rejected", 1)]
)
def test_only_the_videos_of_the_new_search_count(
    seeds: tuple[int, ...], state: str, count: int
) -> None:
    found = under(ended([40.0, 41.0, 42.0], "psnr>=35"), "psnr>=30", seeds)
    assert (found.state, found.quality["psnr"].n, len(found.scores)) == (state, count, count)
    given_up = ended([20.0, 21.0], "psnr>=35,psnr_worst>=27")
    assert undecided(under(given_up, "psnr>=15", (10, 11)))  # its speed was never measured


def test_of_a_policy_that_was_tried_again_its_own_trial_counts() -> None:
    other = Policy(cache=MaskCache(actions=("full", "full", "step")))
    known, own = [prior(0, POLICY), prior(1, other)], [prior(2, POLICY)]
    assert with_known(known, own) == [known[1], own[0]]
    assert with_known(known, []) == known
