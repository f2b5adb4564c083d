from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ditune.tuner.budgets import bracket, next_level


@given(data=st.data(), most=st.integers(2, 200))
def test_bisection_ends_at_the_least_level_that_holds(data: st.DataObject, most: int) -> None:
    fewest = data.draw(st.integers(1, most))
    needed = data.draw(st.integers(fewest, most))
    tried: list[tuple[int, bool]] = []
    while (level := next_level(bracket(tried, fewest, most))) is not None:
        assert level not in {each for each, _ in tried}
        assert fewest <= level < most
        tried.append((level, level >= needed))
    assert needed == min((level for level, held in tried if held), default=most)
    assert len(tried) <= 2 * most.bit_length()


def test_a_level_that_held_once_has_not_missed() -> None:
    """Another placement of the same number of steps may hold."""
    tried = [(12, True), (11, False)]
    assert bracket(tried, 11, 50).closed
    found = bracket([*tried, (11, True)], 4, 50)
    assert (found.held, found.missed) == (11, 3)
