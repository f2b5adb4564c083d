from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler

from ditune.accel.internals import Context
from ditune.accel.location import Locator, Where

STEPS = 4


def pipe(scheduler: Any) -> Any:
    scheduler.set_timesteps(STEPS)
    return SimpleNamespace(scheduler=scheduler)


def test_what_the_pipeline_says_counts() -> None:
    locator = Locator(pipe(FlowMatchEulerDiscreteScheduler()))
    said = Context(branch="cond", step=2, steps=9, sigma=0.4)
    assert locator.locate(said, {}) == Where("cond", 2, 9, 0.4)


def test_a_name_alone_takes_the_step_from_the_scheduler() -> None:
    owner = pipe(FlowMatchEulerDiscreteScheduler())
    locator = Locator(owner)
    named = Context(branch="uncond", step=None, steps=None, sigma=None)
    sample = torch.zeros(1, 2)
    for step, timestep in enumerate(owner.scheduler.timesteps):
        sigma = float(owner.scheduler.sigmas[step])
        assert locator.locate(named, {}) == Where("uncond", step, STEPS, sigma)
        owner.scheduler.step(sample, timestep, sample)


def test_a_scheduler_without_an_index_is_read_by_its_timestep() -> None:
    owner = pipe(CogVideoXDDIMScheduler())
    locator = Locator(owner)
    named = Context(branch="cond_uncond", step=None, steps=None, sigma=None)
    for step, timestep in enumerate(owner.scheduler.timesteps):
        found = locator.locate(named, {"timestep": timestep.expand(2)})
        assert found is not None
        assert (found.step, found.branch) == (step, "cond_uncond")
        assert found.sigma is not None
    owner.current_timestep = owner.scheduler.timesteps[1]
    found = locator.locate(named, {})
    assert found is not None
    assert found.step == 1


def test_branches_without_names_are_told_apart_by_their_prompts() -> None:
    locator = Locator(pipe(FlowMatchEulerDiscreteScheduler()))
    first, second = torch.zeros(1, 3), torch.zeros(1, 3)
    seen = [locator.locate(None, {"encoder_hidden_states": t}) for t in (first, second, first)]
    assert [where.branch for where in seen if where] == ["branch 0", "branch 1", "branch 0"]
    assert locator.locate(None, {}) is None


@pytest.mark.parametrize("again", [[("cond", 0)], [("cond", 3), ("cond", 3)]])
def test_a_call_begins_when_the_step_falls_or_a_branch_returns(
    again: list[tuple[str, int]],
) -> None:
    locator = Locator(pipe(FlowMatchEulerDiscreteScheduler()))

    def begins(branch: str, step: int) -> bool:
        where = locator.locate(Context(branch, step, STEPS, 0.5), {})
        assert where is not None
        return locator.begins(where)

    first = [(branch, step) for step in range(3) for branch in ("cond", "uncond")]
    assert [begins(*place) for place in first] == [True] + [False] * 5
    assert [begins(*place) for place in again][-1]


def test_a_scheduler_that_is_never_stepped_is_noticed() -> None:
    """SkyReels' diffusion forcing steps copies of its own: every step looks like the first."""
    locator = Locator(pipe(FlowMatchEulerDiscreteScheduler()))

    def forward(branch: str, step: int) -> bool:
        where = locator.locate(Context(branch, step, STEPS, 0.5), {})
        assert where is not None
        locator.begins(where)
        return locator.stands_still

    interrupted = [forward(branch, 0) for _ in range(3) for branch in ("cond", "uncond")]
    assert not any(interrupted)
    assert forward("cond", 0)
    assert not forward("cond", 1)
