from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ditune.db.policy import Action, MaskCache, Policy, RuleCache
from ditune.db.records import Trial
from ditune.tuner.budgets import bracket, next_budget


def tried(computed: int, steps: int, *, holds: bool, source: str = "prior") -> Trial:
    full: list[Action] = ["full"] * computed
    reused: list[Action] = ["step"] * (steps - computed)
    return Trial(
        uuid=str(computed),
        study="study-1",
        number=computed,
        source=source,  # type: ignore[arg-type]
        policy=Policy(cache=MaskCache(actions=(*full, *reused))),
        state="complete",
        speedup=steps / computed,
        work_ratio=steps / computed,
        quality={},
        violation={"psnr": -0.1 if holds else 0.1},
        reason=None,
        duration_s=1.0,
        created_at="2026-01-01T00:00:00Z",
    )


@given(data=st.data(), steps=st.integers(2, 200))
def test_bisection_ends_at_the_fewest_steps_that_hold(data: st.DataObject, steps: int) -> None:
    fewest = data.draw(st.integers(1, steps))
    needed = data.draw(st.integers(fewest, steps))
    trials: list[Trial] = []
    while (budget := next_budget(trials, fewest, steps)) is not None:
        assert budget not in {t.policy.cache.actions.count("full") for t in trials}  # type: ignore[union-attr]
        assert fewest <= budget < steps
        trials.append(tried(budget, steps, holds=budget >= needed))
    held = [t.number for t in trials if t.feasible]
    assert needed == min(held, default=steps)
    assert len(trials) <= 2 * steps.bit_length()


def test_other_trials_do_not_move_the_bracket() -> None:
    rule = tried(9, 50, holds=True).model_copy(update={"policy": Policy(cache=RuleCache())})
    sampled = tried(5, 50, holds=True, source="search")
    assert next_budget([rule, sampled], 4, 50) == next_budget([], 4, 50)


def test_a_count_that_held_once_has_not_missed() -> None:
    """Another placement of the same number of steps may hold."""
    trials = [tried(12, 50, holds=True), tried(11, 50, holds=False)]
    assert next_budget(trials, 11, 50) is None
    found = bracket([*trials, tried(11, 50, holds=True)], 4, 50)
    assert (found.held, found.missed) == (11, 3)
