from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditune.db.policy import AdaptiveHandoff
from ditune.tuner.handoffs import edge, first_guess, latest, ranked, small_steps, switched

curves = st.lists(st.floats(0.01, 1.0), min_size=2, max_size=12)


def levels(steps: int) -> list[float]:
    return [1.0 - step / steps for step in range(steps)]


@given(steps=st.integers(2, 60), data=st.data())
def test_a_switch_leaves_so_many_steps_to_the_large_model(steps: int, data: st.DataObject) -> None:
    head, tail = data.draw(st.integers(0, steps)), data.draw(st.integers(0, 5))
    large = data.draw(st.integers(0, steps + 1))
    handoff = switched(levels(steps), large, head_steps=head, tail_steps=tail)
    if handoff is None:
        assert large <= tail or large >= steps or head + large > steps
        return
    small = small_steps(handoff, levels(steps))
    assert small == [*range(head), *range(head + large - tail, steps - tail)]


@given(curve=curves, data=st.data())
def test_ranked_steps_add_up_the_least_squared_disagreement(
    curve: list[float], data: st.DataObject
) -> None:
    """Against every choice of so many steps."""
    steps = len(curve)
    large = data.draw(st.integers(0, steps - 1))
    handoff = ranked(levels(steps), curve, large)
    taken = small_steps(handoff, levels(steps))
    assert len(taken) == steps - large
    least = min(
        sum(curve[i] ** 2 for i in each) for each in combinations(range(steps), steps - large)
    )
    assert sum(curve[i] ** 2 for i in taken) == pytest.approx(least)


def test_nothing_left_to_the_small_model_is_no_hand_off() -> None:
    assert ranked(levels(4), [0.1] * 4, 4) is None
    assert switched(levels(4), 4) is None
    assert small_steps(None, levels(4)) == small_steps(AdaptiveHandoff(), levels(4)) == []


def test_the_curve_says_where_to_start_and_where_waiting_ends() -> None:
    curve = [0.9, 0.6, 0.3, 0.15, 0.12, 0.1, 0.2, 0.4]
    assert first_guess(curve) == 2
    assert latest(curve) == 5
    assert latest([0.1, 0.2]) == 1


def test_a_curve_that_starts_low_bounds_nothing() -> None:
    """The miniature's rises from the start: the models agree best where most is decided."""
    curve = [0.45, 0.46, 0.5, 0.7, 0.88, 0.85, 0.7, 0.66, 0.9]
    assert first_guess(curve) is None
    assert latest(curve) == 7


def test_edges_lie_between_steps() -> None:
    assert edge([1.0, 0.5, 0.25], 0) > 1.0
    assert edge([1.0, 0.5, 0.25], 1) == 0.75
    assert edge([1.0, 0.5, 0.25], 3) == 0.0


def test_schedules_that_begin_without_any_signal_have_edges_that_a_policy_holds() -> None:
    sigmas = [1e6, 108.0, 20.0, 5.0]
    assert edge(sigmas, 0) == edge(sigmas, 1) == 1000.0
    handoff = switched(sigmas, 1)
    assert handoff is not None
    assert small_steps(handoff, sigmas) == [1, 2, 3]
    begun = switched(sigmas, 2, head_steps=2)
    assert begun is not None
    assert small_steps(begun, sigmas) == [1]
    assert switched(sigmas, 3, head_steps=1) is None
    assert ranked(sigmas, [0.1, 0.2, 0.3, 0.4], 3) is None
