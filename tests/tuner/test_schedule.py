from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditune.profiler.trajectory import Trajectory
from ditune.tuner.schedule import StepSchedules

STEPS = 9
SIGMAS = np.linspace(1.0, 0.1, STEPS) ** 1.5


def trajectory(outputs: np.ndarray) -> Trajectory:
    """Return a trajectory of given outputs [steps, values]; the latents play no part here."""
    rows = np.concatenate([outputs, np.zeros_like(outputs)])
    return Trajectory(rows @ rows.T / outputs.shape[1], SIGMAS)


def cost(outputs: np.ndarray, computed: tuple[int, ...]) -> float:
    """Return the cost of a schedule by running it: the sum of the errors of all reused steps."""
    scale = np.sqrt((outputs**2).mean(axis=1).mean())
    widths = np.diff(np.append(SIGMAS, 0.0))
    total = 0.0
    for step in set(range(STEPS)) - set(computed):
        known = [c for c in computed if c < step][-2:]
        guess = outputs[known[-1]]
        if len(known) == 2:
            slope = (step - known[1]) / (known[1] - known[0])
            guess = guess + slope * (outputs[known[1]] - outputs[known[0]])
        total += abs(widths[step]) * np.sqrt(((outputs[step] - guess) ** 2).mean()) / scale
    return total


@given(seed=st.integers(0, 500), budget=st.integers(1, STEPS))
@settings(max_examples=40, deadline=None)
def test_no_schedule_of_the_same_budget_is_better(seed: int, budget: int) -> None:
    outputs = np.cumsum(np.random.default_rng(seed).standard_normal((STEPS, 30)), axis=0)
    found = StepSchedules([trajectory(outputs)]).computed(budget)
    assert len(found) == budget
    assert found[0] == 0
    others = itertools.combinations(range(1, STEPS), budget - 1)
    best = min(cost(outputs, (0, *other)) for other in others)
    assert pytest.approx(best, rel=1e-6, abs=1e-9) == cost(outputs, tuple(found))


def test_steps_are_computed_where_outputs_turn() -> None:
    outputs = np.zeros((STEPS, 4))
    outputs[5:] = np.arange(STEPS - 5)[:, None] + 1.0  # still, then a ramp
    found = StepSchedules([trajectory(outputs)]).computed(4)
    assert {4, 5} <= set(found) or {5, 6} <= set(found)


def test_a_tilt_moves_computed_steps() -> None:
    outputs = np.cumsum(np.random.default_rng(0).standard_normal((STEPS, 30)), axis=0)
    schedules = StepSchedules([trajectory(outputs)])
    early, late = (sum(schedules.computed(4, tilt)) for tilt in (-6.0, 6.0))
    assert early < late


def test_several_prompts_share_one_schedule() -> None:
    many = [np.random.default_rng(seed).standard_normal((STEPS, 30)) for seed in range(3)]
    schedules = StepSchedules([trajectory(outputs) for outputs in many])
    assert len(schedules.computed(5)) == 5
