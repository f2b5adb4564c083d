from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from tests.conftest import two_experts
from torch import nn

from ditune.accel.apply import accelerate
from ditune.accel.payload import History
from ditune.db.errors import UsageFault
from ditune.db.kill_switch import DISABLE_VARIABLE
from ditune.db.policy import Action, Handoff, MaskCache, Payload, Policy, RuleCache

STEPS = 12
Generate = Any


def masked(*actions: Action, **changes: Any) -> Policy:
    return Policy(cache=MaskCache(actions=actions, **changes))


def repeated(*actions: Action, **changes: Any) -> Policy:
    return masked(*(actions * STEPS)[:STEPS], **changes)


class BlockCalls:
    """Counts how often each block of a transformer runs."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.counts = [0] * len(blocks)
        for index, block in enumerate(blocks):
            block.register_forward_hook(lambda *_, i=index: self._count(i))

    def _count(self, index: int) -> None:
        self.counts[index] += 1


@pytest.mark.parametrize("form", ["output", "latent", "hidden"])
def test_all_full_mask_is_bit_identical(pipe: WanPipeline, generate: Generate, form: str) -> None:
    plain = generate(pipe)
    policy = repeated("full", payload=Payload(form=form))  # type: ignore[arg-type]
    with accelerate(pipe, policy) as applied:
        assert torch.equal(plain, generate(pipe))
        assert applied.summary().steps == {"full": STEPS}


@pytest.mark.parametrize("action", ["step", "cfg", "block"])
@pytest.mark.parametrize("form", ["output", "latent", "hidden"])
def test_removal_is_bit_identical(
    pipe: WanPipeline, generate: Generate, action: Action, form: str
) -> None:
    plain, keys = generate(pipe), list(pipe.transformer.state_dict())
    policy = repeated("full", "full", action, payload=Payload(form=form))  # type: ignore[arg-type]
    with accelerate(pipe, policy):
        changed = generate(pipe)
    assert not torch.equal(plain, changed)
    assert torch.equal(plain, generate(pipe))
    assert keys == list(pipe.transformer.state_dict())


@pytest.mark.parametrize(
    ("action", "form", "outer", "inner"),
    [  # 8 of 12 steps full, 4 reused; two branches
        ("step", "output", 16, 16),
        ("step", "latent", 16, 16),
        ("step", "hidden", 16, 16),
        ("cfg", "output", 20, 20),
        ("block", "output", 24, 16),
    ],
)
def test_blocks_run_as_often_as_the_mask_says(
    pipe: WanPipeline, generate: Generate, action: Action, form: str, outer: int, inner: int
) -> None:
    calls = BlockCalls(pipe.transformer.blocks)
    policy = repeated("full", "full", action, payload=Payload(form=form))  # type: ignore[arg-type]
    with accelerate(pipe, policy) as applied:
        generate(pipe)
        summary = applied.summary()
    assert [outer, inner, inner, inner] == calls.counts
    assert {"full": 8, action: 4} == summary.steps
    assert pytest.approx(24 * 4 / sum(calls.counts)) == summary.work_ratio


def test_cached_steps_never_write_a_cache(pipe: WanPipeline, generate: Generate) -> None:
    """Rule 2: a step that reuses one granularity leaves every cache as it was."""
    reused: tuple[Action, ...] = ("cfg", "block", "step")
    policy = masked("full", "full", *(reused * 4)[: STEPS - 2])
    written: list[int] = []
    original = History.add

    def spy(self: History, step: int, *value: torch.Tensor) -> None:
        written.append(step)
        original(self, step, *value)

    with pytest.MonkeyPatch.context() as patch, accelerate(pipe, policy):
        patch.setattr(History, "add", spy)
        generate(pipe)
    assert {0, 1} == set(written)


def test_scheduler_gets_an_output_at_every_step(pipe: WanPipeline, generate: Generate) -> None:
    """Rule 5: no step of the solver is left out."""
    count = 0
    original = pipe.scheduler.step

    def spy(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return original(*args, **kwargs)

    pipe.scheduler.step = spy
    with accelerate(pipe, repeated("full", "step")):
        generate(pipe)
    assert count == STEPS


def test_second_call_repeats_the_first(pipe: WanPipeline, generate: Generate) -> None:
    with accelerate(pipe, repeated("full", "full", "step", "cfg", "block")):
        assert torch.equal(generate(pipe), generate(pipe))


def test_a_call_that_raised_leaves_no_state_behind(pipe: WanPipeline, generate: Generate) -> None:
    def stop(_pipe: Any, step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 5:
            raise RuntimeError("stopped by the test")
        return kwargs

    with accelerate(pipe, repeated("full", "full", "step", "cfg")):
        clean = generate(pipe)
        with pytest.raises(RuntimeError, match="stopped by the test"):
            generate(pipe, callback_on_step_end=stop)
        assert torch.equal(clean, generate(pipe))


def test_two_pipelines_do_not_disturb_each_other(pipe: WanPipeline, generate: Generate) -> None:
    second = copy.deepcopy(pipe)
    plain = generate(second)
    with accelerate(pipe, repeated("full", "step")):
        generate(pipe)
        assert torch.equal(plain, generate(second))


def test_without_guidance_cfg_becomes_a_full_step(pipe: WanPipeline, generate: Generate) -> None:
    plain = generate(pipe, guidance_scale=1.0)
    with accelerate(pipe, repeated("full", "full", "cfg")):
        assert torch.equal(plain, generate(pipe, guidance_scale=1.0))


def test_rule_adapts_and_reports(pipe: WanPipeline, generate: Generate) -> None:
    with accelerate(pipe, Policy(cache=RuleCache(delta2=5.0))) as applied:
        generate(pipe)
        steps = applied.summary().steps
    assert sum(steps.values()) == STEPS
    assert 0 < steps["full"] < STEPS


def test_mask_for_other_steps_is_left_out_with_a_reason(
    pipe: WanPipeline, generate: Generate, caplog: pytest.LogCaptureFixture
) -> None:
    plain = generate(pipe, steps=7)
    with accelerate(pipe, repeated("full", "step")) as applied:
        assert torch.equal(plain, generate(pipe, steps=7))
        assert "lists 12 steps and this call has 7" in applied.summary().reason
    assert "lists 12 steps" in caplog.text


def test_kill_switch(
    pipe: WanPipeline, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = generate(pipe)
    monkeypatch.setenv(DISABLE_VARIABLE, "1")
    with accelerate(pipe, repeated("full", "step")):
        assert torch.equal(plain, generate(pipe))


def test_applying_twice_is_refused_and_the_first_stays(
    pipe: WanPipeline, generate: Generate
) -> None:
    with accelerate(pipe, repeated("full", "step")):
        changed = generate(pipe)
        with pytest.raises(UsageFault, match="already carries a ditune hook"):
            accelerate(pipe, repeated("full"))
        assert torch.equal(changed, generate(pipe))


def test_pipeline_without_transformer_is_refused() -> None:
    with pytest.raises(UsageFault, match="has no transformer"):
        accelerate(object())


def test_summary_before_a_call_is_refused(pipe: WanPipeline) -> None:
    with accelerate(pipe) as applied, pytest.raises(UsageFault, match="call the pipeline first"):
        applied.summary()


def test_without_a_policy_the_pipeline_runs_as_it_is(
    pipe: WanPipeline, generate: Generate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = generate(pipe)
    with accelerate(pipe, db=tmp_path / "none.db") as applied:
        assert torch.equal(plain, generate(pipe))
        assert applied.summary().policy_id is None
    assert caplog.text.count("running without a policy") == 1


# --- hand-off --------------------------------------------------------------------------------


@pytest.mark.parametrize("large_steps", [3, 6, 11])
def test_handoff_equals_the_native_two_expert_switch(
    pipe: WanPipeline, small: nn.Module, generate: Generate, large_steps: int
) -> None:
    pipe.scheduler.set_timesteps(STEPS)
    sigmas, times = pipe.scheduler.sigmas, pipe.scheduler.timesteps
    between = float(sigmas[large_steps - 1] + sigmas[large_steps]) / 2
    with accelerate(pipe, Policy(handoff=Handoff(sigma=between)), small=small) as applied:
        ours = generate(pipe)
        summary = applied.summary()
    assert 2 * (STEPS - large_steps) == summary.small_forwards
    boundary = float(times[large_steps - 1] + times[large_steps]) / 2
    share = boundary / pipe.scheduler.config.num_train_timesteps
    native = two_experts(pipe, small, share)
    assert torch.equal(generate(native), ours)


def test_handoff_without_a_small_model_is_left_out(pipe: WanPipeline, generate: Generate) -> None:
    plain = generate(pipe)
    with accelerate(pipe, Policy(handoff=Handoff(sigma=0.5))) as applied:
        assert torch.equal(plain, generate(pipe))
        assert "none was given" in applied.summary().reason


def test_caches_of_the_large_model_are_never_used_in_the_small_one(
    pipe: WanPipeline, small: nn.Module, generate: Generate
) -> None:
    pipe.scheduler.set_timesteps(STEPS)
    between = float(pipe.scheduler.sigmas[5] + pipe.scheduler.sigmas[6]) / 2
    calls = BlockCalls(small.blocks)  # type: ignore[arg-type]
    full: list[Action] = ["full"] * 6
    step: list[Action] = ["step"] * 6
    policy = masked(*full, *step).model_copy(update={"handoff": Handoff(sigma=between)})
    with accelerate(pipe, policy, small=small):
        generate(pipe)
    assert calls.counts == [2, 2]  # its first step is computed, and the others reuse that one
