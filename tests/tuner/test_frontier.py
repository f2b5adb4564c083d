"""Masks are chosen by what is expected of them in the proof, not by what the search saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tuner.test_schedule import trajectory_of
from tests.tuner.test_search import STEPS, prior, profile

from ditune.db.policy import MaskCache, Policy, RuleCache
from ditune.db.records import Quality, Score, Trial
from ditune.tuner.frontier import Choice, Frontier, Glimpse, foreseeable, proposed
from ditune.tuner.pace import whole_mask
from ditune.tuner.schedule import gains
from ditune.tuner.space import Space

PROOF_PROMPTS = 20
FLOOR_DB = 35.0
SPREAD_DB = 2.0


@pytest.fixture(scope="module")
def space() -> Space:
    random = np.random.default_rng(7)
    outputs = np.cumsum(random.standard_normal((STEPS, 30)), axis=0)
    return Space(profile(), handoff=False, trajectories=[trajectory_of(outputs)])


def level_db(space: Space, policy: Policy) -> float:
    """Return a truth that asks for more steps late than is usual."""
    assert isinstance(policy.cache, MaskCache)
    assert space.schedules is not None
    computed = [step for step, action in enumerate(policy.cache.actions) if action == "full"]
    where, _, squared = space.schedules.errors(computed)
    weights = gains(STEPS, 5.0) ** 2 * np.exp(np.linspace(-3.0, 1.0, STEPS + 1))
    return (
        22.0
        - 10.0 * float(np.log10(squared @ weights[where]))
        - 4.0 * (2 - policy.cache.payload.order)
    )


def qualities(mean: float, worst_floor: float = 20.0, n: int = 3) -> dict[str, Quality]:
    worst = mean - SPREAD_DB * 0.87  # of three
    return {
        "psnr": Quality(floor=FLOOR_DB, mean=mean, worst=worst, n=n),
        "psnr_worst": Quality(floor=worst_floor, mean=mean, worst=worst, n=n),
    }


def tried(number: int, policy: Policy, mean: float, worst_floor: float = 20.0) -> Trial:
    work_ratio = 1.0
    if isinstance(policy.cache, MaskCache):
        work_ratio = STEPS / policy.cache.actions.count("full")
    found = {
        "speedup": 1.0 / (0.1 + 0.9 / work_ratio),
        "work_ratio": work_ratio,
        "quality": qualities(mean, worst_floor),
    }
    return prior(number, policy).model_copy(update=found)


def searched(space: Space, count: int) -> list[Trial]:
    """Return the trials of a search that always takes what is proposed."""
    trials = [tried(0, Policy(), 100.0)]
    while len(trials) < count:
        proposal = proposed(space, trials, PROOF_PROMPTS)
        assert proposal is not None
        policy = proposal.policy or space.policy(proposal.parameters)
        trials.append(tried(len(trials), policy, level_db(space, policy)))
    return trials


def choice(frontier: Frontier, policy: Policy, *, elsewhere: bool = True) -> Choice:
    return next(c for c in frontier.choices(elsewhere=elsewhere) if c.policy == policy)


def computed(policy: Policy) -> int:
    assert isinstance(policy.cache, MaskCache)
    return policy.cache.actions.count("full")


def test_a_search_is_foreseen_where_errors_are_measured(space: Space) -> None:
    trials = [tried(0, Policy(), 100.0)]
    assert foreseeable(space, trials)
    assert not foreseeable(space, [])
    assert not foreseeable(Space(profile(), handoff=False), trials)
    judged = trials[0].model_copy(update={"quality": {"judge_digit": qualities(0.0)["psnr"]}})
    assert not foreseeable(space, [judged])


def test_only_masks_of_whole_steps_are_foreseen() -> None:
    assert whole_mask(Policy(cache=MaskCache(actions=("full", "step", "full"))))
    assert not whole_mask(Policy(cache=MaskCache(actions=("full", "block", "step"))))
    assert not whole_mask(Policy(cache=RuleCache()))
    assert not whole_mask(Policy())


def test_a_search_finds_masks_that_the_usual_ones_do_not_reach(space: Space) -> None:
    trials = searched(space, 14)
    ids = [trial.policy.id for trial in trials]
    assert len(set(ids)) == len(ids)  # nothing is proposed twice
    needed = FLOOR_DB + 1.0
    held = [t.policy for t in trials[1:] if t.quality["psnr"].mean >= needed]
    usual = next(
        n
        for n in range(space.fewest, STEPS)
        if level_db(space, space.policy(space.prior(n).parameters)) >= needed
    )
    assert min(map(computed, held)) <= usual - 2


def test_faster_masks_pass_less_often(space: Space) -> None:
    trials = searched(space, 8)
    frontier = Frontier(space, trials, (), PROOF_PROMPTS)
    by_budget: dict[int, float] = {}
    for each in frontier.choices(elsewhere=True):
        if whole_mask(each.policy):
            budget = computed(each.policy)
            by_budget[budget] = max(by_budget.get(budget, 0.0), each.chance)
    chances = [by_budget[budget] for budget in sorted(by_budget)]
    assert chances[0] < 0.1
    assert chances[-1] > 0.99
    assert all(low <= high + 0.05 for low, high in pairwise(chances))


def test_a_mask_just_at_its_floor_seldom_passes(space: Space) -> None:
    policies = [space.policy(space.prior(n).parameters) for n in (4, 8, 12)]
    means = (28.0, FLOOR_DB, 41.0)
    trials = [tried(n, p, m) for n, (p, m) in enumerate(zip(policies, means, strict=True))]
    frontier = Frontier(space, trials, (), PROOF_PROMPTS)
    assert choice(frontier, policies[1]).chance < 0.45
    assert choice(frontier, policies[2]).chance > 0.9
    # on the prompts of the search nothing but the margin of the proof is missing
    assert choice(frontier, policies[1], elsewhere=False).chance < 0.2


def test_the_worst_prompt_binds_where_prompts_differ_much(space: Space) -> None:
    policies = [space.policy(space.prior(n).parameters) for n in (4, 8, 12)]
    means = (28.0, 38.0, 41.0)
    both = list(enumerate(zip(policies, means, strict=True)))
    loose = Frontier(space, [tried(n, p, m) for n, (p, m) in both], (), PROOF_PROMPTS)
    tight = Frontier(space, [tried(n, p, m, 34.0) for n, (p, m) in both], (), PROOF_PROMPTS)
    assert choice(loose, policies[1]).chance > 0.8
    assert choice(tight, policies[1]).chance < 0.3


def test_a_proof_moves_what_is_expected_of_all(space: Space) -> None:
    trials = searched(space, 8)
    policy = max((t.policy for t in trials[1:]), key=computed)
    level = level_db(space, policy)
    before = Frontier(space, trials, (), PROOF_PROMPTS)
    others = [t.policy for t in trials[1:] if t.policy != policy]
    for shift, moves in ((-4.0, -1), (4.0, 1)):
        quality = qualities(level + shift, n=PROOF_PROMPTS)
        seen = Glimpse(policy, quality, {"psnr": SPREAD_DB}, elsewhere=True)
        after = Frontier(space, trials, [seen], PROOF_PROMPTS)
        apart = [choice(after, p).chance - choice(before, p).chance for p in others]
        assert moves * max(apart, key=abs) > 0.1
        assert all(moves * each > -0.05 for each in apart)


def test_a_rule_counts_by_what_it_gave(space: Space) -> None:
    trials = searched(space, 6)
    rule = Policy(cache=RuleCache())
    low, high = (tried(20, rule, mean) for mean in (33.0, 42.0))
    for trial, passes in ((low, False), (high, True)):
        frontier = Frontier(space, [*trials, trial], (), PROOF_PROMPTS)
        assert (choice(frontier, rule).chance > 0.5) == passes


@given(st.floats(1.0, 20.0), st.floats(0.01, 1.0), st.floats(0.001, 0.1))
def test_over_its_reserve_a_candidate_promises_what_a_look_costs(
    speedup: float, chance: float, cost: float
) -> None:
    candidate = Choice(Policy(), speedup, chance)
    assert candidate.promise(math.exp(candidate.reserve(cost))) == pytest.approx(cost)


def test_nothing_faster_promises_nothing() -> None:
    slower = Choice(Policy(), speedup=2.0, chance=1.0)
    assert slower.promise(2.0) == slower.promise(3.0) == 0.0
    assert slower.promise(1.0) == pytest.approx(np.log(2.0))


def test_while_no_mask_has_a_result_the_first_ones_differ(space: Space) -> None:
    """With several workers masks are asked for before any came back."""
    trials = [tried(0, Policy(), 100.0)]
    pending: list[Trial] = []
    for number in range(1, 4):
        proposal = proposed(space, [*trials, *pending], PROOF_PROMPTS)
        assert proposal is not None
        policy = space.policy(proposal.parameters)
        imagined = tried(number, policy, 50.0).model_copy(
            update={"quality": {}, "violation": {"psnr": 1.0, "psnr_worst": 1.0}}
        )
        pending.append(imagined)
    assert foreseeable(space, pending)
    budgets = [computed(trial.policy) for trial in pending]
    assert budgets == sorted(set(budgets))
    first = tried(1, pending[0].policy, 33.0)
    explicit = proposed(space, [trials[0], first, *pending[1:]], PROOF_PROMPTS)
    assert explicit is not None
    assert explicit.policy is not None
    assert explicit.policy.id not in {trial.policy.id for trial in pending}


def test_a_surprise_of_a_mask_is_mostly_its_own(space: Space) -> None:
    trials = searched(space, 12)
    surprising = tried(6, trials[6].policy, trials[6].quality["psnr"].mean + 4.0)
    trials[6] = surprising
    frontier = Frontier(space, trials, (), PROOF_PROMPTS)
    cache = surprising.policy.cache
    assert isinstance(cache, MaskCache)
    fitted, _ = frontier._surrogates["psnr"].predict([cache])
    expected, _ = frontier._predicted("psnr", [cache], False)
    left, missed = surprising.quality["psnr"].mean - np.array([expected[0], fitted[0]])
    assert missed > 0.3  # the fit does not follow one mask alone
    assert left < 0.4 * missed


def test_what_was_given_up_after_an_easy_prompt_is_not_taken_for_good(space: Space) -> None:
    """Once other trials had all prompts, one of them says what the others would have given."""
    hard = {0: 4.0, 1: 0.0, 2: -4.0}  # by how much prompts are easier than their mean

    def scored(trial: Trial, seeds: Sequence[int]) -> Trial:
        mean = level_db(space, trial.policy)
        noise = np.random.default_rng(trial.number).normal(0.0, 0.1, len(hard))
        scores = tuple(Score(seed=s, values={"psnr": mean + hard[s] + noise[s]}) for s in seeds)
        quality = qualities(float(np.mean([s.values["psnr"] for s in scores])), n=len(seeds))
        return trial.model_copy(update={"scores": scores, "quality": quality})

    trials = [scored(trial, (0, 1, 2)) for trial in searched(space, 7)[1:]]
    given_up = tried(9, space.policy(space.prior(5).parameters), 0.0)
    given_up = given_up.model_copy(update={"state": "rejected"})
    truth = level_db(space, given_up.policy)
    for seeds in ((0,), (2,)):
        frontier = Frontier(space, [*trials, scored(given_up, seeds)], (), PROOF_PROMPTS)
        seen = frontier._glimpses[-1]
        assert frontier._seen("psnr", seen).decibels == pytest.approx(truth, abs=0.5)
        assert frontier._seen("psnr", seen).sd < 0.7 + 0.1 * abs(truth - FLOOR_DB)
