from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor, nn

from ditune.accel.tap import Observation, tapped
from ditune.profiler.redundancy import Redundancy


def seen(step: int, branch: str, value: float, sibling: float | None = None) -> Observation:
    def full(number: float) -> Tensor:
        return torch.full((1, 2, 2), number)

    return Observation(
        step=step,
        steps=3,
        sigma=1.0 - step / 3,
        branch=branch,
        latents=full(0.0),
        output=full(value),
        span=full(2.0 * value),
        sibling=None if sibling is None else full(sibling),
    )


def test_changes_are_relative_to_the_step_before() -> None:
    redundancy = Redundancy(guidance_scale=3.0)
    for step, (cond, uncond) in enumerate([(1.0, 2.0), (1.5, 2.0), (1.5, 2.0)]):
        redundancy.watch(seen(step, "cond", cond))
        redundancy.watch(seen(step, "uncond", uncond))
    first, second, third = redundancy.steps()
    assert (first.step_change, first.cfg_change, first.block_change) == (None, None, None)
    assert pytest.approx(0.5) == second.step_change == second.block_change
    assert pytest.approx(0.5 / 1.5) == second.cfg_change  # the gap fell from 1 to 0.5
    assert (third.step_change, third.cfg_change, third.block_change) == (0.0, 0.0, 0.0)
    assert redundancy.disagreement() is None


def test_disagreement_is_measured_on_the_guided_output() -> None:
    redundancy = Redundancy(guidance_scale=3.0)
    redundancy.watch(seen(0, "cond", 2.0, sibling=3.0))
    redundancy.watch(seen(0, "uncond", 1.0, sibling=1.0))
    assert pytest.approx((3.0 / 4.0,)) == redundancy.disagreement()


def test_disagreement_of_a_batched_model_is_guided_too() -> None:
    redundancy = Redundancy(guidance_scale=3.0)
    both = replace(
        seen(0, "cond_uncond", 0.0),
        output=torch.tensor([[1.0], [2.0]]),  # unconditional first
        sibling=torch.tensor([[1.0], [3.0]]),
    )
    redundancy.watch(both)
    assert pytest.approx((3.0 / 4.0,)) == redundancy.disagreement()


def test_one_branch_has_no_guidance_gap() -> None:
    redundancy = Redundancy(guidance_scale=1.0)
    for step in range(3):
        redundancy.watch(seen(step, "cond", 1.0 + step))
    assert [row.cfg_change for row in redundancy.steps()] == [None, None, None]


def test_watching_changes_nothing_and_sees_everything(
    pipe: WanPipeline, small: nn.Module, generate: object
) -> None:
    assert callable(generate)
    plain = generate(pipe)
    redundancy = Redundancy(guidance_scale=5.0)
    with tapped(pipe, redundancy.watch, small):
        assert torch.equal(plain, generate(pipe))
        generate(pipe)
    assert torch.equal(plain, generate(pipe))
    rows = redundancy.steps()
    assert list(range(12)) == [row.step for row in rows]
    assert all(row.step_change is not None for row in rows[1:])
    curve = redundancy.disagreement()
    assert curve is not None
    assert len(curve) == 12
    assert min(curve) > 0.0
