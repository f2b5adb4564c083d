from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ditune.db.errors import UsageFault
from ditune.profiler.statistics import (
    counts_lower_bound,
    counts_needed,
    mean_below,
    mean_lower_bound,
    paired_speedup,
    quantiles,
    worst_below,
    worst_lower_bound,
)


def test_pairs_cancel_drift() -> None:
    drift = np.linspace(1.0, 3.0, 21)
    found = paired_speedup(list(200 * drift), list(100 * drift))
    assert pytest.approx(2.0) == found.median
    assert pytest.approx((2.0, 2.0)) == found.ci95
    assert found.n == 21


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    source = np.random.default_rng(3)
    covered = 0
    for _ in range(100):
        tuned = 100 * np.exp(source.normal(0, 0.05, 21))
        low, high = paired_speedup([150.0] * 21, list(tuned)).ci95
        covered += low <= 1.5 <= high
    assert covered >= 85


@given(st.lists(st.tuples(st.floats(1, 1e4), st.floats(1, 1e4)), min_size=1, max_size=30))
def test_median_lies_in_its_interval(pairs: list[tuple[float, float]]) -> None:
    found = paired_speedup([a for a, _ in pairs], [b for _, b in pairs])
    assert found.ci95[0] <= found.median * (1 + 1e-9)
    assert found.median <= found.ci95[1] * (1 + 1e-9)


def test_lists_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(UsageFault, match="needs pairs"):
        paired_speedup([], [])
    with pytest.raises(UsageFault, match="2 and 1"):
        paired_speedup([1.0, 2.0], [1.0])


def test_bounds_lie_below_what_was_seen() -> None:
    values = [36.0, 38.0, 40.0, 37.0, 39.0]
    assert mean_lower_bound(values) < 38.0
    assert worst_lower_bound(values, unseen=20) < 36.0
    assert 5.0 == mean_lower_bound([5.0]) == worst_lower_bound([5.0], unseen=3)


@pytest.mark.parametrize("count", [8, 30])
def test_the_worst_of_unseen_values_holds_its_bound_as_often_as_promised(count: int) -> None:
    source = np.random.default_rng(1)
    bounds = [worst_lower_bound(list(source.normal(38, 3, count)), 20) for _ in range(2000)]
    each_holds = 1.0 - stats.norm.cdf((np.array(bounds) - 38) / 3)
    kept = (each_holds**20 >= 0.9).mean()
    assert 0.94 <= kept <= 0.975  # 95 % confidence, a little more by Bonferroni


def test_quantiles() -> None:
    assert quantiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)


def test_no_difference_in_a_few_pairs_proves_little() -> None:
    assert counts_lower_bound([0.0] * 20) < -0.06
    assert mean_lower_bound([0.0] * 20) == 0.0
    for floor in (-0.1, -0.03, -0.01):
        n = counts_needed(floor)
        assert counts_lower_bound([0.0] * n) >= floor > counts_lower_bound([0.0] * (n - 1))


@pytest.mark.parametrize("worse", [0.01, 0.03, 0.1])
def test_the_bound_of_counts_holds_as_often_as_it_says(worse: float) -> None:
    """As many pairs get better as get worse: the true mean is zero."""
    source = np.random.default_rng(2)
    draws = source.choice([-1.0, 0.0, 1.0], p=[worse, 1 - 2 * worse, worse], size=(2000, 200))
    held = np.mean([counts_lower_bound(pairs) <= 0.0 for pairs in draws])
    assert 0.94 <= held <= 0.995


@given(st.lists(st.floats(-50.0, 50.0), min_size=2, max_size=30))
def test_bounds_lie_so_many_spreads_below_the_mean(values: list[float]) -> None:
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    below_mean = mean - mean_below(len(values)) * spread
    assert mean_lower_bound(values) == pytest.approx(below_mean, abs=1e-6)
    below_worst = mean - worst_below(len(values), 20) * spread
    assert worst_lower_bound(values, 20) == pytest.approx(min(*values, below_worst), abs=1e-6)
