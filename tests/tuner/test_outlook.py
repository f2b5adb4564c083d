"""A few prompts of a proof say what the others will give, once one candidate had them all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from tests.tuner.test_search import FLOORS, prior

from ditune.db.policy import Action, MaskCache, Policy
from ditune.db.records import Constraint, Score, Trial
from ditune.tuner.confirm import missed
from ditune.tuner.outlook import Outlook
from ditune.tuner.quality import parse_constraints

PROMPTS, APART_DB, OWN_DB = 30, 2.5, 0.5
Values = list[dict[str, float]]


def searched(random: np.random.Generator, trials: int) -> list[Trial]:
    """Return complete trials on three prompts."""
    prompts = random.normal(0.0, APART_DB, 3)
    found = []
    for number in range(trials):
        computed: list[Action] = ["full" for _ in range(number + 2)]
        policy = Policy(cache=MaskCache(actions=(*computed, "step")))
        own = 36.0 + number + random.normal(0.0, OWN_DB, 3)
        scores = tuple(
            Score(seed=seed, values={"psnr": float(each)})
            for seed, each in enumerate(own + prompts)
        )
        found.append(prior(number, policy).model_copy(update={"scores": scores}))
    return found


def looked(random: np.random.Generator, mean: float, prompts: np.ndarray) -> Values:
    own = mean + random.normal(0.0, OWN_DB, len(prompts))
    return [{"psnr": float(value)} for value in own + prompts]


def outlook(
    random: np.random.Generator,
    prompts: np.ndarray,
    floors: Sequence[Constraint] = FLOORS,
    looks: int = 1,
) -> Outlook:
    found = Outlook(floors, searched(random, 6))
    for _ in range(looks):
        found.learn(looked(random, 38.0, prompts))
    return found


def given_up(outlook: Outlook, values: Values) -> int | None:
    """Return after how many prompts a candidate is given up, None if never."""
    return next((n for n in range(1, len(values)) if outlook.hopeless(values[:n])), None)


@pytest.mark.parametrize("looks", [1, 4])
def test_what_misses_is_given_up_after_a_few_prompts_and_what_holds_hardly_ever(looks: int) -> None:
    random = np.random.default_rng(5)
    ends, wrongly = [], 0
    for _ in range(200):
        prompts = random.normal(0.0, APART_DB, PROMPTS)
        known = outlook(random, prompts, looks=looks)
        values = looked(random, random.uniform(34.0, 38.0), prompts)
        end = given_up(known, values)
        if missed(FLOORS, values, 0):
            ends.append(PROMPTS if end is None else end)
        else:
            wrongly += end is not None
    assert np.median(ends) <= 4
    assert len(ends) > 50
    assert wrongly <= 0.05 * (200 - len(ends))


def test_nothing_is_foreseen_before_anything_tells() -> None:
    random = np.random.default_rng(1)
    prompts = random.normal(0.0, APART_DB, PROMPTS)
    bad = looked(random, 20.0, prompts)
    assert given_up(outlook(random, prompts), bad) == 2
    assert given_up(outlook(random, prompts, looks=0), bad) is None
    unsearched = Outlook(FLOORS, [])
    unsearched.learn(looked(random, 38.0, prompts))
    assert given_up(unsearched, bad) is None
    for _ in range(2):
        unsearched.learn(looked(random, 38.0, prompts))
    assert given_up(unsearched, bad) == 2  # three candidates tell it without a search


def test_of_metrics_that_count_nothing_is_foreseen() -> None:
    random = np.random.default_rng(1)
    found = Outlook(parse_constraints("judge>=-0.03"), searched(random, 6))
    found.learn([{"judge": 0.0}] * PROMPTS)
    assert not found.hopeless([{"judge": -1.0}] * 5)


def test_the_worst_prompt_is_foreseen_too() -> None:
    random = np.random.default_rng(2)
    prompts = random.normal(0.0, APART_DB, PROMPTS)
    known = outlook(random, prompts, parse_constraints("psnr_worst>=27"))
    assert given_up(known, looked(random, 33.0, prompts)) is not None
    assert given_up(known, looked(random, 40.0, prompts)) is None
