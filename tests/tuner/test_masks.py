from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditune.db.policy import MaskCache
from ditune.db.records import StepRedundancy
from ditune.tuner.masks import arc_length, densities, mask, place


def changes(*values: float | None) -> list[StepRedundancy]:
    return [
        StepRedundancy(step=i, sigma=None, step_change=v, cfg_change=None, block_change=None)
        for i, v in enumerate(values)
    ]


def test_density_has_mean_one_and_fills_the_first_step() -> None:
    found = densities(changes(None, 1.0, 2.0, 3.0), 4)
    assert found == [0.5, 0.5, 1.0, 1.5]


def test_density_is_flat_without_a_profile() -> None:
    assert densities([], 3) == [1.0, 1.0, 1.0]
    assert densities(changes(None, None), 2) == [1.0, 1.0]


def test_arc_length_adds_changes_up_and_always_rises() -> None:
    assert arc_length([1.0, 2.0, 3.0]) == (0.0, 0.5, 1.5, 3.0)
    still = arc_length([0.0, 0.0, 4.0])
    assert still is not None
    assert all(before < after for before, after in pairwise(still))
    assert arc_length([1.0, 1.0, 1.0]) is None


def test_steps_lie_where_the_trajectory_moves() -> None:
    density = [0.1] * 25 + [1.9] * 25
    computed = place(density, budget=20, warmup=2, cooldown=1)
    late = [step for step in computed if step >= 25]
    assert len(computed) == 20
    assert len(late) > 14


def test_flat_density_is_evenly_spaced() -> None:
    computed = place([1.0] * 50, budget=25, warmup=1, cooldown=0)
    gaps = {b - a for a, b in pairwise(computed)}
    assert gaps <= {1, 2, 3}


@given(
    density=st.lists(st.floats(0.01, 10), min_size=2, max_size=80),
    share=st.floats(0, 1),
    warmup=st.integers(0, 90),
    cooldown=st.integers(0, 10),
)
def test_budget_and_protected_ends_are_kept(
    density: list[float], share: float, warmup: int, cooldown: int
) -> None:
    steps = len(density)
    budget = round(share * steps)
    computed = place(density, budget, warmup, cooldown)
    start = min(max(warmup, 1), steps)
    protected = set(range(start)) | set(range(max(steps - cooldown, start), steps))
    assert protected <= set(computed)
    assert max(len(protected), min(budget, steps)) == len(computed)
    assert sorted(set(computed)) == computed


@given(
    computed=st.sets(st.integers(1, 39)),
    cfg_share=st.floats(0, 1),
    block_share=st.floats(0, 1),
)
def test_masks_are_valid_policies(computed: set[int], cfg_share: float, block_share: float) -> None:
    actions = mask(40, [0, *computed], cfg_share, block_share)
    assert len(MaskCache(actions=actions).actions) == 40
    assert 1 + len(computed) == actions.count("full")


def test_the_oldest_reuse_is_only_half_reuse() -> None:
    assert mask(5, [0, 4], 1 / 3, 1 / 3) == ("full", "step", "cfg", "block", "full")
    assert pytest.approx(2) == mask(5, [0, 4], 0.0, 0.0).count("step") - 1
