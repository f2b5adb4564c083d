"""The decision of a step on the tiny pipeline, and the guard around it."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from ditune.accel.apply import accelerate
from ditune.accel.indicator import clean_part
from ditune.db.policy import Action, Indicator, MaskCache, Policy, RuleCache

STEPS = 12
Generate = Any


def rule(**changes: Any) -> Policy:
    return Policy(cache=RuleCache(warmup_frac=0.0, cooldown_steps=0, **changes))


@pytest.mark.parametrize("indicator", ["latent", "spectral", "timestep", "first_block"])
def test_an_indicator_reuses_more_the_higher_its_threshold(
    pipe: WanPipeline, generate: Generate, indicator: Indicator
) -> None:
    reused = []
    for threshold in (1e-6, 0.1, 50.0):
        policy = rule(indicator=indicator, threshold=threshold, interval_max=4)
        with accelerate(pipe, policy) as applied:
            generate(pipe)
            reused.append(STEPS - applied.summary().steps["full"])
    assert reused[0] == 0
    assert reused[0] <= reused[1] <= reused[2]
    assert reused[2] == 8  # two full steps, then three of four are reused


def test_changes_are_added_up_or_taken_since_the_last_full_step(
    pipe: WanPipeline, generate: Generate
) -> None:
    """Random embeddings are all equally far apart: only sums of their changes grow."""
    full = {}
    for accumulated in (True, False):
        policy = rule(indicator="timestep", threshold=1.2, accumulated=accumulated, interval_max=8)
        with accelerate(pipe, policy) as applied:
            generate(pipe)
            full[accumulated] = applied.summary().steps["full"]
    assert full[True] > full[False]


@pytest.mark.parametrize("indicator", ["latent", "first_block"])
def test_a_rule_synchronises_once_per_step_and_a_mask_never(
    pipe: WanPipeline, generate: Generate, monkeypatch: pytest.MonkeyPatch, indicator: Indicator
) -> None:
    reads = 0
    original = torch.Tensor.tolist
    plan = "ditune/accel/plan.py"

    def spy(self: torch.Tensor) -> Any:
        nonlocal reads
        reads += sys._getframe(1).f_code.co_filename.endswith(plan)
        return original(self)

    monkeypatch.setattr("torch.Tensor.tolist", spy)
    with accelerate(pipe, rule(indicator=indicator, threshold=0.05)):
        generate(pipe)
    assert 0 < reads <= STEPS
    reads = 0
    actions: tuple[Action, ...] = ("full", "full", "step", "cfg", "block", "full") * 2
    with accelerate(pipe, Policy(cache=MaskCache(actions=actions))):
        generate(pipe)
    assert reads == 0


def test_a_policy_that_never_reuses_is_reported(
    pipe: WanPipeline, generate: Generate, caplog: pytest.LogCaptureFixture
) -> None:
    with accelerate(pipe, rule(indicator="latent", threshold=1e-6)) as applied:
        generate(pipe)
        assert "inert: none of 12 steps" in applied.summary().trips[0]
    assert caplog.text.count("inert") == 1


def test_a_runaway_is_stopped(pipe: WanPipeline, generate: Generate) -> None:
    policy = rule(indicator="latent", threshold=50.0, interval_max=8, reuse_max=0.25)
    with accelerate(pipe, policy) as applied:
        generate(pipe)
        summary = applied.summary()
    assert summary.steps["full"] == STEPS - 3
    assert "3 of 12 steps were reused, more than allowed" in summary.trips[0]


def test_a_decision_that_is_not_finite_ends_caching_for_this_call_only(
    pipe: WanPipeline, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = rule(indicator="latent", threshold=0.5)
    with accelerate(pipe, policy) as applied:
        clean = generate(pipe)
        reused = applied.summary().steps
        with monkeypatch.context() as patch:
            nothing = torch.tensor(float("nan"))
            patch.setattr("ditune.accel.plan.relative_l1", lambda *_: nothing)
            generate(pipe)
            summary = applied.summary()
        assert summary.steps == {"full": STEPS}
        assert "is not finite; caching is off" in summary.trips[0]
        assert torch.equal(clean, generate(pipe))
        assert applied.summary().steps == reused


def test_latents_that_change_shape_end_caching(
    pipe: WanPipeline, generate: Generate, caplog: pytest.LogCaptureFixture
) -> None:
    def shrink(_pipe: Any, step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            kwargs["latents"] = kwargs["latents"][:, :, :1]
        return kwargs

    caplog.set_level(logging.WARNING)
    actions: tuple[Action, ...] = ("full", "full", "step") * 4
    with accelerate(pipe, Policy(cache=MaskCache(actions=actions))) as applied:
        generate(pipe, callback_on_step_end=shrink)
        summary = applied.summary()
    assert summary.steps == {"full": 11, "step": 1}
    assert "changed their shape at step 5" in summary.trips[0]


def test_the_filter_takes_noise_off_and_keeps_structure() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 16, 16, generator=generator)
    flat = torch.ones(1, 16, 16)
    assert float(clean_part(noise, 0.9).std()) < 0.2
    torch.testing.assert_close(clean_part(flat, 0.5), flat * 0.5)
    torch.testing.assert_close(clean_part(noise, 0.0), noise, atol=1e-4, rtol=1e-4)
    assert torch.equal(clean_part(noise, 1.0).round(decimals=4), torch.zeros_like(noise))
    assert clean_part(noise[..., :15], 0.5).shape == (1, 16, 15)
