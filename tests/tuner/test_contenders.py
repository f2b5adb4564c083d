"""The proof looks at what probably passes, and learns from every look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from tests.tuner.test_frontier import (
    FLOOR_DB,
    PROOF_PROMPTS,
    SPREAD_DB,
    computed,
    level_db,
    qualities,
    searched,
    space,
)
from tests.tuner.test_search import prior, profile

from ditune.db.policy import Action, MaskCache, Policy
from ditune.db.records import Constraint, Trial
from ditune.tuner.confirm import Looked
from ditune.tuner.contenders import Foreseen, Narrowed, to_prove
from ditune.tuner.handoffs import large_window, switched
from ditune.tuner.quality import parse_constraints
from ditune.tuner.space import Space

__all__ = ["space"]  # the fixture
FLOORS = parse_constraints(f"psnr>={FLOOR_DB},psnr_worst>=20")
NEEDED_DB = FLOOR_DB + 0.8  # with 20 prompts that differ by 2 dB


def looked(policy: Policy, mean: float) -> Looked:
    """Return a whole look at a candidate; prompts lie evenly around the mean."""
    values = [{"psnr": mean + SPREAD_DB * (1 if n % 2 else -1)} for n in range(PROOF_PROMPTS)]
    reason = "" if mean >= NEEDED_DB else "missed"
    return Looked(policy, values, qualities(mean, n=PROOF_PROMPTS), reason)


def proved(space: Space, trials: list[Trial], shift_db: float, most: int = 8) -> list[Looked]:
    """Return all looks of a proof on prompts that give so much more than those of the search."""
    candidates = Foreseen(space, trials, PROOF_PROMPTS, most)
    seen: list[Looked] = []
    while (policy := candidates.next(seen)) is not None:
        seen.append(looked(policy, level_db(space, policy) + shift_db))
    return seen


@pytest.mark.parametrize("shift_db", [0.0, 3.0])
def test_the_winner_is_near_the_fastest_that_passes(space: Space, shift_db: float) -> None:
    trials = searched(space, 14)
    seen = proved(space, trials, shift_db)
    won = min(computed(each.policy) for each in seen if not each.reason)
    passing = [t.policy for t in trials[1:] if level_db(space, t.policy) + shift_db >= NEEDED_DB]
    assert won <= min(map(computed, passing)) + 1
    assert len({each.policy.id for each in seen}) == len(seen) <= 6


def test_harder_prompts_ask_for_more_steps(space: Space) -> None:
    trials = searched(space, 14)
    won = [
        min(computed(each.policy) for each in proved(space, trials, shift) if not each.reason)
        for shift in (3.0, 0.0, -3.0)
    ]
    assert won[0] < won[1] < won[2]


def test_the_fast_are_looked_at_first(space: Space) -> None:
    trials = searched(space, 14)
    for shift in (3.0, 0.0, -3.0):
        seen = proved(space, trials, shift)
        won = min(computed(each.policy) for each in seen if not each.reason)
        assert computed(seen[0].policy) <= won
        assert sum(not each.reason for each in seen) <= 2  # a look that holds takes all prompts


def test_a_prompt_that_falls_alone_is_not_met_by_one_mask_after_the_other(space: Space) -> None:
    trials = searched(space, 14)
    fastest = min(computed(each.policy) for each in proved(space, trials, 0.0) if not each.reason)
    candidates = Foreseen(space, trials, PROOF_PROMPTS, 8)
    seen: list[Looked] = []
    while (policy := candidates.next(seen)) is not None:
        found = looked(policy, level_db(space, policy))
        falls = computed(policy) <= fastest  # whatever its mean is
        seen.append(replace(found, reason="a prompt") if falls else found)
    held = [computed(each.policy) for each in seen if not each.reason]
    assert held and min(held) <= fastest + 2
    assert sum(computed(each.policy) <= fastest for each in seen) <= 5


def test_a_proof_ends(space: Space) -> None:
    trials = searched(space, 8)
    assert len(proved(space, trials, -30.0, most=3)) == 3
    assert not proved(space, trials, 0.0, most=0)


def test_what_cannot_be_foreseen_is_listed_fastest_first() -> None:
    def trial(number: int, speedup: float) -> Trial:
        policy = Policy(cache=MaskCache(actions=("full", *["step"] * number)))  # type: ignore[arg-type]
        found = {"speedup": speedup, "work_ratio": speedup, "violation": {"x": -1.0}}
        return prior(number, policy).model_copy(update=found)

    plain = Space(profile(), handoff=False)
    trials = [trial(n, 1.5 + n) for n in range(1, 6)]

    def first(constraints: tuple[Constraint, ...], most: int) -> list[int]:
        candidates = to_prove(trials, plain, constraints, PROOF_PROMPTS, most)
        assert isinstance(candidates, Narrowed)
        seen: list[Looked] = []
        while (policy := candidates.next(seen)) is not None:
            seen.append(Looked(policy, [], {}, "missed"))
        return [next(t.number for t in trials if t.policy == each.policy) for each in seen]

    assert first(FLOORS, 2) == [5, 4]
    counting = parse_constraints("judge_digit>=-0.03")
    assert first(counting, 1) == [5, 4, 3]  # three times as many


SIGMAS = [1.0 - step / 50 for step in range(50)]


def window(start: int, stop: int) -> Policy:
    return Policy(handoff=switched(SIGMAS, stop - start, head_steps=start))


def narrowed(listed: list[Policy], holds: Callable[[range], bool]) -> list[range | None]:
    """Return the windows of all looks of a proof in which some windows hold."""
    candidates = Narrowed(listed, SIGMAS)
    seen: list[Looked] = []
    while (policy := candidates.next(seen)) is not None:
        large = large_window(policy, SIGMAS)
        passed = large is not None and holds(large)
        seen.append(Looked(policy, [], {}, "" if passed else "missed"))
    return [large_window(each.policy, SIGMAS) for each in seen]


def test_the_proof_closes_the_gap_that_a_ladder_left() -> None:
    levels = [window(50 - n, 50) for n in (9, 14, 21)]
    seen = narrowed(levels, lambda large: len(large) >= 12)
    assert seen == [range(41, 50), range(36, 50), range(39, 50), range(38, 50)]


def test_an_end_that_was_given_up_is_narrowed_from_where_it_begins() -> None:
    levels = [window(36, 41), window(36, 45)]
    seen = narrowed(levels, lambda large: len(large) >= 7)
    assert seen == [range(36, 41), range(36, 45), range(36, 43), range(36, 42)]
    switches = [window(0, 5), window(0, 9)]
    assert narrowed(switches, lambda large: len(large) >= 6)[2:] == [range(7), range(6)]


def test_nothing_lies_between_others() -> None:
    reused: list[Action] = ["step"] * 9
    cache = Policy(cache=MaskCache(actions=("full", *reused)))
    one_end, other = window(41, 50), window(10, 20)
    assert narrowed([cache, one_end], lambda large: True) == [None, range(41, 50)]
    assert len(narrowed([one_end, other], lambda large: len(large) == 10)) == 2
    assert len(narrowed([one_end], lambda large: False)) == 1
