from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditune.profiler.trajectory import Trajectory
from ditune.tuner.schedule import StepSchedules, gains

STEPS = 9
SIGMAS = np.linspace(1.0, 0.1, STEPS) ** 1.5


def trajectory_of(outputs: np.ndarray) -> Trajectory:
    """Return a trajectory of given outputs [steps, values]; the latents play no part here."""
    rows = np.concatenate([outputs, np.zeros_like(outputs)])
    sigmas = np.linspace(1.0, 0.1, len(outputs)) ** 1.5
    return Trajectory(rows @ rows.T / outputs.shape[1], sigmas)


def cost(outputs: np.ndarray, computed: tuple[int, ...], axis: np.ndarray, early: float) -> float:
    """Return the cost of a schedule by running it: how far each gap leaves the latents off."""
    scale = (outputs**2).mean(axis=1).mean()
    widths = np.diff(np.append(SIGMAS, 0.0))
    total = 0.0
    for place, start in enumerate(computed):
        following = computed[place + 1] if place + 1 < len(computed) else STEPS
        off = np.zeros_like(outputs[0])
        for step in range(start + 1, following):
            guess = outputs[start]
            if place:
                before = computed[place - 1]
                slope = (axis[step] - axis[start]) / (axis[start] - axis[before])
                guess = guess + slope * (outputs[start] - outputs[before])
            off += widths[step] * (outputs[step] - guess)
        gain = 1.0 + early * (1.0 - (start + following) // 2 / STEPS) ** 4
        total += gain**2 * (off**2).mean() / scale
    return total


@given(seed=st.integers(0, 500), budget=st.integers(1, STEPS), early=st.sampled_from([0.0, 7.0]))
@settings(max_examples=40)
def test_no_schedule_of_the_same_budget_is_better(seed: int, budget: int, early: float) -> None:
    random = np.random.default_rng(seed)
    outputs = np.cumsum(random.standard_normal((STEPS, 30)), axis=0)
    axis = np.cumsum(random.uniform(0.1, 2.0, STEPS))
    found = StepSchedules([trajectory_of(outputs)], axis.tolist()).computed(budget, early)
    assert len(found) == budget
    assert found[0] == 0
    others = itertools.combinations(range(1, STEPS), budget - 1)
    best = min(cost(outputs, (0, *other), axis, early) for other in others)
    assert pytest.approx(best, rel=1e-6, abs=1e-9) == cost(outputs, tuple(found), axis, early)


def test_outputs_that_move_evenly_over_the_axis_need_two_computed_steps() -> None:
    axis = np.array([0.0, 0.1, 0.3, 0.4, 1.0, 2.5, 2.6, 2.8, 5.0])
    outputs = 1.0 + axis[:, None] * np.array([[1.0, -2.0, 0.5]])
    schedules = StepSchedules([trajectory_of(outputs)], axis.tolist())
    assert schedules.computed(2) == [0, 1]  # any gap after the first reuses a constant
    assert cost(outputs, (0, 1), axis, 0.0) == pytest.approx(0.0, abs=1e-12)


def test_steps_are_computed_where_outputs_turn() -> None:
    outputs = np.zeros((STEPS, 4))
    outputs[5:] = np.arange(STEPS - 5)[:, None] + 1.0  # still, then a ramp
    found = StepSchedules([trajectory_of(outputs)]).computed(4)
    assert {4, 5} <= set(found) or {5, 6} <= set(found)


def test_errors_that_matter_early_move_computed_steps_there() -> None:
    outputs = np.cumsum(np.random.default_rng(0).standard_normal((STEPS, 30)), axis=0)
    schedules = StepSchedules([trajectory_of(outputs)])
    evenly, early = (sum(schedules.computed(4, weight)) for weight in (0.0, 100.0))
    assert early < evenly


def test_gains_fall_to_one() -> None:
    found = gains(10, early=4.0)
    assert found[0] == 5.0
    assert found[-1] == 1.0
    assert all(np.diff(found) < 0)


def test_several_prompts_share_one_schedule() -> None:
    many = [np.random.default_rng(seed).standard_normal((STEPS, 30)) for seed in range(3)]
    schedules = StepSchedules([trajectory_of(outputs) for outputs in many])
    assert len(schedules.computed(5)) == 5
