"""The noise of a few pairs does not turn the order of work around."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tests.tuner.test_search import prior, profile

from ditune.db.policy import Action, AdaptiveHandoff, MaskCache, Payload, Policy, RuleCache
from ditune.db.records import LayerTiming, Trial
from ditune.tuner.handoffs import switched
from ditune.tuner.pace import Pace, candidates
from ditune.tuner.space import Space

STEPS = 20
SIGMAS = [1.0 - step / STEPS for step in range(STEPS)]
REST, LARGE, SMALL = 0.05, 0.95, 0.1  # shares of the plain call; a small forward is a ninth


def measured(number: int, policy: Policy, speedup: float, work_ratio: float = 2.0) -> Trial:
    found = {"speedup": speedup, "work_ratio": work_ratio, "violation": {"psnr": -0.1}}
    return prior(number, policy).model_copy(update=found)


def cached(number: int, work_ratio: float, speedup: float) -> Trial:
    reused: list[Action] = ["step"] * number
    return measured(number, Policy(cache=MaskCache(actions=("full", *reused))), speedup, work_ratio)


def handed(large_steps: int, computed: Sequence[int] | None = None) -> Policy:
    cache = None
    if computed is not None:
        cache = MaskCache(actions=tuple("full" if s in computed else "step" for s in range(STEPS)))
    return Policy(cache=cache, handoff=switched(SIGMAS, large_steps))


def true_speedup(large: int, small: int) -> float:
    return 1.0 / (REST + (LARGE * large + SMALL * small) / STEPS)


def test_one_unlucky_pair_does_not_turn_the_order_of_work_around() -> None:
    trials = [cached(1, 2.0, 1.9), cached(2, 3.1, 3.0), cached(3, 3.6, 2.95)]
    assert [t.number for t in candidates(trials, 3, Pace(trials, ()))] == [3, 2, 1]
    slow = [*trials[:2], cached(3, 3.6, 1.0)]  # so slow that it is no accident
    assert [t.number for t in candidates(slow, 3, Pace(slow, ()))] == [2, 3, 1]


def masked(computed: int, speedup: float | None = None, pairs: int = 1) -> Trial:
    actions: list[Action] = ["full" if step < computed else "step" for step in range(STEPS)]
    policy = Policy(cache=MaskCache(actions=tuple(actions)))
    expected = 1.0 / (0.2 + 0.8 * computed / STEPS)
    found = measured(computed, policy, speedup or expected, STEPS / computed)
    return found.model_copy(update={"pairs": pairs})


def test_five_masks_tell_how_fast_every_other_will_be() -> None:
    timed = [masked(computed) for computed in (4, 6, 9, 13, 18)]
    unseen = masked(2)
    assert Pace(timed[:4], SIGMAS).foreseen(unseen.policy) is None
    assert Pace(timed, SIGMAS).foreseen(unseen.policy) == pytest.approx(unseen.speedup)
    for unknown in (Policy(), handed(8), handed(8, computed=(0, 4)), Policy(cache=RuleCache())):
        assert Pace(timed, SIGMAS).foreseen(unknown) is None


def test_reused_hidden_states_cost_what_lies_outside_of_the_blocks() -> None:
    timed = [masked(computed) for computed in (4, 6, 9, 13, 18)]
    plain = masked(5).policy
    assert isinstance(plain.cache, MaskCache)
    reused = plain.cache.model_copy(update={"payload": Payload(form="hidden")})
    pace = Pace(timed, SIGMAS, outside_blocks=0.1)
    assert pace.foreseen(plain) == pytest.approx(masked(5).speedup)
    computed = 5 / STEPS
    expected = 1.0 / (0.2 + 0.8 * (computed + 0.1 * (1.0 - computed)))
    assert pace.foreseen(Policy(cache=reused)) == pytest.approx(expected)


def layer(name: str, median_ms: float, calls: int) -> LayerTiming:
    return LayerTiming(name=name, median_ms=median_ms, p20_ms=median_ms, p80_ms=median_ms, n=calls)


def test_the_profile_says_how_much_lies_outside_of_the_blocks() -> None:
    found = profile()  # ten blocks of 1 ms
    beside = (layer("transformer.embedder", 0.75, 18), layer("transformer.proj_out", 1.0, 9))
    timed = (layer("transformer", 12.5, 9), *beside, layer("vae.decoder", 9.0, 1))
    reused: list[Action] = ["step"] * (STEPS - 1)
    cache = MaskCache(actions=("full", *reused), payload=Payload(form="hidden"))
    trial = measured(1, Policy(cache=cache), 1.0, STEPS)
    for layers, work in ((found.layers, 0.05), ((*found.layers, *timed), 0.05 + 0.2 * 0.95)):
        space = Space(found.model_copy(update={"layers": layers}), handoff=False)
        expected = space.pace([]).expected(trial.policy, trial.work_ratio)
        assert expected == pytest.approx(1.0 / work)


def test_a_speedup_that_was_only_expected_teaches_nothing() -> None:
    timed = [masked(computed) for computed in (4, 6, 9, 13, 18)]
    wrong = masked(2, speedup=50.0, pairs=0)
    pace = Pace([*timed, wrong], SIGMAS)
    assert pace.foreseen(wrong.policy) == pytest.approx(masked(2).speedup)
    assert pace.speedup(wrong) == pytest.approx(masked(2).speedup)


def test_what_all_trials_agree_on_is_left_as_it_was_measured() -> None:
    trials = [measured(n, handed(n), true_speedup(n, STEPS - n)) for n in (3, 8, 14)]
    mixed = handed(8, computed=(0, 4, 8, 14))  # two forwards of each model
    trials.append(measured(20, mixed, true_speedup(2, 2)))
    pace = Pace(trials, SIGMAS)
    for trial in trials:
        assert pace.speedup(trial) == pytest.approx(trial.speedup)


def test_a_lucky_hand_off_with_more_large_steps_does_not_go_first() -> None:
    lucky = {8: 1.25}
    trials = [
        measured(n, handed(n), lucky.get(n, 1.0) * true_speedup(n, STEPS - n))
        for n in (4, 5, 7, 8, 11, 14)
    ]
    assert max(trials[2:], key=lambda t: t.speedup or 0.0).number == 8
    assert [t.number for t in candidates(trials, 6, Pace(trials, SIGMAS))] == [4, 5, 7, 8, 11, 14]
    assert [t.number for t in candidates(trials, 2, Pace(trials, SIGMAS))] == [4, 5]


def test_work_that_shows_only_in_the_run_says_nothing() -> None:
    trials = [measured(n, handed(n), true_speedup(n, STEPS - n)) for n in (4, 8)]
    adaptive = measured(30, Policy(handoff=AdaptiveHandoff(delta=0.01)), 3.0)
    blocks: list[Action] = ["block"] * (STEPS - 1)
    partial = handed(8).model_copy(update={"cache": MaskCache(actions=("full", *blocks))})
    both = [adaptive, measured(31, partial, 9.0)]
    pace = Pace([*trials, *both], SIGMAS)
    assert [pace.speedup(t) for t in both] == [3.0, 9.0]
    assert pace.speedup(trials[0]) == pytest.approx(trials[0].speedup)
    assert Pace(trials, ()).speedup(trials[0]) == trials[0].speedup


def test_the_first_trial_stands_for_itself() -> None:
    first = cached(1, 2.0, 1.9)
    assert Pace([first], ()).speedup(first) == pytest.approx(1.9)


def test_what_may_have_been_unlucky_is_looked_at_and_what_missed_for_sure_is_not() -> None:
    held, unlucky, sure = cached(1, 2.0, 2.0), cached(2, 3.0, 3.0), cached(3, 4.0, 4.0)
    unlucky = unlucky.model_copy(update={"violation": {"judge_digit": 0.5}})
    sure = sure.model_copy(update={"violation": {"judge_digit": 2.0}, "reason": "misses"})
    early = cached(4, 5.0, 5.0).model_copy(update={"state": "rejected"})
    trials = [held, unlucky, sure, early]
    assert [t.number for t in candidates(trials, 4, Pace(trials, ()))] == [2, 1]
