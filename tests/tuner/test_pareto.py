"""Which points are worth a look: pure functions of numbers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditune.tuner.pareto import budgets, dominates, front, spread

NUMBERS = st.integers(0, 5).map(float)  # few, so that many are equal
POINTS = st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), max_size=12)
VALUES = st.lists(st.floats(-10.0, 10.0), max_size=12)


def test_what_is_worse_in_one_thing_and_better_in_none_is_dominated() -> None:
    points = [(1.0, 9.0), (2.0, 5.0), (1.5, 5.0), (2.0, 4.0), (3.0, 1.0)]
    assert front(points) == [0, 1, 4]
    assert not dominates((1.0, 2.0), (1.0, 2.0))


@given(POINTS)
def test_all_that_is_left_out_is_dominated_by_what_stays(
    points: list[tuple[float, float, float]],
) -> None:
    kept = front(points)
    assert kept or not points
    for place, point in enumerate(points):
        over = any(dominates(points[k], point) for k in kept)
        assert over != (place in kept)


@given(VALUES, st.integers(1, 8))
def test_a_spread_has_both_ends_and_no_more_than_asked(values: list[float], count: int) -> None:
    taken = spread(values, count)
    assert taken == sorted(set(taken))
    assert len(taken) == min(count, len(values))
    if values and count > 1:
        found = [values[place] for place in taken]
        assert (min(found), max(found)) == (min(values), max(values))


def test_a_spread_leaves_out_what_lies_close_to_another() -> None:
    assert spread([0.0, 0.1, 5.0, 5.1, 9.9, 10.0], 3) == [0, 2, 5]
    assert spread([0.0, 1.0, 2.0], 1) == [2]
    assert spread([1.0, 1.0, 1.0], 2) == [0, 1]


@given(st.integers(1, 20), st.integers(1, 60))
def test_every_budget_comes_once(fewest: int, more: int) -> None:
    most = fewest + more
    found = list(budgets({most}, fewest, most))
    assert sorted(found) == list(range(fewest, most))


@given(st.integers(1, 5), st.integers(20, 100), st.integers(2, 12))
def test_budgets_make_up_a_geometric_grid(fewest: int, most: int, count: int) -> None:
    upcoming = budgets({most}, fewest, most)
    taken = sorted([most, *(next(upcoming) for _ in range(count))])
    assert taken[0] == fewest
    gaps = [math.log(b / a) for a, b in pairwise(taken)]
    parts = 2 ** math.floor(math.log2(count))  # as many equal parts are halved by now
    coarsest = math.log((fewest + 1) / fewest)  # there is nothing between neighbours
    assert max(gaps) <= max(2.0 * math.log(most / fewest) / parts, coarsest)


@pytest.mark.parametrize(
    ("tried", "first"), [({50}, 2), ({50, 2}, 10), ({50, 2, 10}, 22), ({50, 2, 10, 22}, 5)]
)
def test_the_next_budget_is_far_from_all_that_were_tried(tried: set[int], first: int) -> None:
    assert next(budgets(tried, 2, 50)) == first
