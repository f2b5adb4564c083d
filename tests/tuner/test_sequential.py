"""A trial is given up on few prompts, and wrongly no more often than it is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tuner.test_search import prior

from ditune.db.policy import MaskCache, Policy
from ditune.db.records import Constraint, Expectation, Score, Trial
from ditune.tuner.quality import parse_constraints
from ditune.tuner.sequential import expectations, guessed, will_miss
from ditune.tuner.verdict import hopeless, violations

SEEDS = (11, 12, 13)
FLOORS = parse_constraints("psnr>=35,psnr_worst>=27")
MEAN, WORST = FLOORS
MASKED = Policy(cache=MaskCache(actions=("full", "step")))
HARD = (1.0, -3.0, 2.0)  # dB

levels = st.floats(-20.0, 60.0)
patterns = st.builds(
    Expectation,
    differences=st.tuples(*[st.floats(-9.0, 9.0)] * 4),
    sd=st.floats(0.01, 5.0),
    freedom=st.integers(2, 60),
)


def trial(scores: Sequence[float], metric: str = "psnr", policy: Policy = MASKED) -> Trial:
    found = (Score(seed=s, values={metric: v}) for s, v in zip(SEEDS, scores, strict=False))
    return prior(0, policy).model_copy(update={"scores": tuple(found)})


def patterned(level: float, rest: Sequence[float] = (0.1, -0.1, 0.0)) -> Trial:
    return trial([level + hard + own for hard, own in zip(HARD, rest, strict=True)])


KNOWN = [patterned(40.0), patterned(36.0, (-0.1, 0.0, 0.1)), patterned(30.0, (0.0, 0.1, -0.1))]


def test_what_prompts_have_in_common_is_learnt_from_complete_trials() -> None:
    found = expectations(FLOORS, KNOWN, (13, 11, 12))["psnr"]
    assert pytest.approx((2.0, 1.0, -3.0), abs=0.1) == found.differences
    assert found.freedom == 4
    assert found.sd == pytest.approx(np.sqrt(0.06 / 4 * 4 / 3))


@pytest.mark.parametrize(
    "useless",
    [
        patterned(40.0).model_copy(update={"state": "rejected"}),
        trial([40.0, 37.0]),  # given up
        trial([100.0] * 3),  # it lost nothing, on any prompt
        trial([40.0, 37.0, 42.0], policy=Policy()),
    ],
)
def test_until_three_trials_tell_it_is_guessed(useless: Trial) -> None:
    assert expectations(FLOORS, [*KNOWN[:2], useless], SEEDS) == guessed(FLOORS, 3)
    assert guessed(FLOORS, 3)["psnr"].differences == (0.0,) * 3


def test_of_a_metric_without_decibels_nothing_is_guessed() -> None:
    floors = parse_constraints("clip>=-0.01")
    assert guessed(floors, 3) == {}
    known = [trial(scores, "clip") for scores in ([0.1, 0.2, 0.4], [0.0, 0.2, 0.2], [0.3, 0.1, 0])]
    assert set(expectations(floors, known, SEEDS)) == {"clip"}
    assert not expectations(parse_constraints("judge>=-0.03"), KNOWN, SEEDS)  # it counts


def test_an_easy_prompt_tells_more_than_its_value() -> None:
    expected = expectations(FLOORS, KNOWN, (13, 11, 12))  # the easiest one is first
    assert will_miss(MEAN, [36.0], expected, 2)  # so the mean will be about 34
    expected = expectations(FLOORS, KNOWN, (12, 11, 13))
    assert not will_miss(MEAN, [36.0], expected, 2)
    assert will_miss(WORST, [31.0], expectations(FLOORS, KNOWN, (13, 11, 12)), 2)
    assert not will_miss(WORST, [31.8], expectations(FLOORS, KNOWN, (13, 11, 12)), 2)


def test_without_knowledge_only_what_is_far_off_is_given_up() -> None:
    assert will_miss(MEAN, [20.0], guessed(FLOORS, 3), 2)
    assert not will_miss(MEAN, [33.0], guessed(FLOORS, 3), 2)
    assert not will_miss(MEAN, [20.0], {}, 2)
    assert not will_miss(MEAN, [20.0] * 3, guessed(FLOORS, 3), 2)  # there is nothing to foresee


def test_a_level_that_bends_counts_without_its_bound() -> None:
    floor = parse_constraints("ssim>=0.9")[0]
    expected = {"ssim": Expectation(differences=(-10.0, 10.0), sd=0.01, freedom=9)}
    assert not will_miss(floor, [0.7], expected, 1)  # 0.997 follows; the bound would miss it
    assert will_miss(floor, [-0.1], expected, 1)


@given(st.lists(levels, min_size=1, max_size=3), patterns, st.floats(0.0, 9.0), st.booleans())
def test_more_room_never_rejects(
    scores: list[float], pattern: Expectation, room: float, worst: bool
) -> None:
    constraint = WORST if worst else MEAN
    wider = Constraint(metric="psnr", statistic=constraint.statistic, floor=constraint.floor - room)
    if will_miss(wider, scores, {"psnr": pattern}, 2):
        assert will_miss(constraint, scores, {"psnr": pattern}, 2)


@given(st.lists(levels, min_size=3, max_size=3), patterns, st.permutations(range(3)), st.booleans())
def test_the_order_of_what_was_seen_does_not_matter(
    scores: list[float], pattern: Expectation, order: list[int], worst: bool
) -> None:
    constraint = WORST if worst else MEAN
    differences = (*(pattern.differences[n] for n in order), pattern.differences[3])
    turned = pattern.model_copy(update={"differences": differences})
    nudged = constraint.model_copy(update={"floor": constraint.floor + 1e-6})  # sums differ
    if will_miss(constraint, scores, {"psnr": pattern}, 2):
        assert will_miss(nudged, [scores[n] for n in order], {"psnr": turned}, 2)


@dataclass
class Tally:
    """What became of simulated trials."""

    held: int = 0
    wrongly: int = 0  # would have held, and were given up
    missed: int = 0
    spared: int = 0  # would have missed, and were given up


def simulated(prompts: int, known: int, seed: int) -> Tally:
    """Judge trials around the floor, of a study in which some others are known."""
    random, tally = np.random.default_rng(seed), Tally()
    for _ in range(600):
        hard = random.normal(0.0, 2.5, prompts)
        drawn = random.uniform(-5.0, 5.0, (known + 1, 1)) + 35.0
        table = drawn + hard + random.normal(0.0, 0.5, (known + 1, prompts))
        seeds = tuple(range(prompts))
        before = [
            prior(0, MASKED).model_copy(
                update={"scores": tuple(Score(seed=s, values={"psnr": row[s]}) for s in seeds)}
            )
            for row in table[:known].tolist()
        ]
        expected = expectations(FLOORS, before, seeds)
        values = [{"psnr": value} for value in table[known].tolist()]
        early = any(hopeless(FLOORS, values[:n], expected) for n in range(1, prompts))
        if max(violations(FLOORS, values).values()) <= 0.0:
            tally.held += 1
            tally.wrongly += early
        else:
            tally.missed += 1
            tally.spared += early
    return tally


@pytest.mark.parametrize(
    ("prompts", "known", "spared"), [(3, 0, 0.8), (3, 3, 0.8), (3, 12, 0.9), (8, 3, 0.9)]
)
def test_trials_that_would_hold_are_given_up_as_seldom_as_stated(
    prompts: int, known: int, spared: float
) -> None:
    tally = simulated(prompts, known, seed=prompts + known)
    assert tally.held > 200
    assert tally.wrongly / tally.held <= 0.05
    assert tally.spared / tally.missed >= spared
