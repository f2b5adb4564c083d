"""Guidance in every shape: one batch of both branches, branches without a name, one branch only."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tests.accel.families_first import FIRST
from tests.accel.families_second import SECOND
from tests.accel.test_sibling import cogvideox, generate
from torch import Tensor, nn

from ditune.accel.apply import Summary, accelerate
from ditune.accel.mixcache import BATCHED, COND
from ditune.accel.spans import BlockStack
from ditune.accel.tap import Observation, tapped
from ditune.db.policy import Action, MaskCache, Policy, RuleCache
from ditune.profiler.redundancy import Redundancy
from ditune.profiler.trajectory import TrajectoryRecorder

STEPS = 6
ACTIONS: tuple[Action, ...] = ("full", "full", "cfg", "full", "step", "cfg")
FAMILIES = FIRST | SECOND


class Loop:
    """A pipeline's loop around one transformer; `forwards` are what it runs at every step."""

    def __init__(self, name: str) -> None:
        config, self.inputs = FAMILIES[name]
        torch.manual_seed(0)
        self.transformer: Any = getattr(diffusers, name)(**config).eval()
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.do_classifier_free_guidance = True
        self.batches: list[int] = []
        first = next(iter(BlockStack(self.transformer).named_blocks().values()))
        first.register_forward_hook(self._watch, with_kwargs=True)

    def _watch(self, _: nn.Module, args: Any, kwargs: dict[str, Any], _out: Any) -> None:
        self.batches.append(len(args[0] if args else kwargs["hidden_states"]))

    @torch.no_grad()
    def run(self, forward: Callable[[int], Tensor]) -> list[Tensor]:
        self.scheduler.set_timesteps(STEPS)
        self.batches.clear()
        outputs = []
        sample = torch.zeros(1)
        for step, timestep in enumerate(self.scheduler.timesteps):
            outputs.append(forward(step))
            self.scheduler.step(sample, timestep, sample)
        return outputs


def doubled(value: Any, factor: float) -> Any:
    """Return inputs with the unconditional half first, which differs from the other."""
    if isinstance(value, Tensor) and value.is_floating_point() and len(value) == 1:
        return torch.cat([value * factor, value])
    if isinstance(value, Tensor) and value.ndim and len(value) == 1:
        return torch.cat([value, value])
    return value


@pytest.mark.parametrize(
    "name", ["CogVideoXTransformer3DModel", "LTXVideoTransformer3DModel", "MochiTransformer3DModel"]
)
@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_in_a_batch_the_conditional_half_is_computed_alone(name: str) -> None:
    loop = Loop(name)

    def forward(step: int) -> Tensor:
        inputs = {
            key: doubled(value, 0.5 if key == "encoder_hidden_states" else 1.0)
            for key, value in loop.inputs(step).items()
        }
        with loop.transformer.cache_context("cond_uncond"):
            output: Tensor = loop.transformer(**inputs, return_dict=False)[0]
        return output.clone()

    plain = loop.run(forward)
    assert loop.batches == [2] * STEPS
    with accelerate(loop, Policy(cache=MaskCache(actions=ACTIONS))) as applied:
        tuned = loop.run(forward)
        summary = applied.summary()
    assert loop.batches == [2, 2, 1, 2, 1]
    assert summary.steps == {"full": 3, "cfg": 2, "step": 1}
    assert pytest.approx(6 / 4) == summary.work_ratio  # three whole steps and two halves
    for step in (2, 5):  # the inputs are the same, so the computed half is what it was
        torch.testing.assert_close(tuned[step][1], plain[step][1])
        assert not torch.equal(tuned[step][0], plain[step][0])


def unnamed(loop: Loop, branches: int) -> Callable[[int], Tensor]:
    """Return a step of a pipeline that never says which branch runs, as Wan video to video."""
    prompts = [loop.inputs(0)["encoder_hidden_states"] * (1.0 + place) for place in range(branches)]

    def forward(step: int) -> Tensor:
        outputs = [
            loop.transformer(
                **(loop.inputs(step) | {"encoder_hidden_states": prompt}), return_dict=False
            )[0]
            for prompt in prompts
        ]
        return torch.cat(outputs).clone()

    return forward


def test_branches_without_names_are_reused_apart() -> None:
    loop = Loop("WanTransformer3DModel")
    forward = unnamed(loop, branches=2)
    plain = loop.run(forward)
    with accelerate(loop, Policy(cache=MaskCache(actions=ACTIONS))) as applied:
        tuned = loop.run(forward)
        assert applied.summary().steps == {"full": 5, "step": 1}  # nobody knows which is which
        again = loop.run(forward)
        assert applied.summary().forwards == 2 * STEPS
    assert len(loop.batches) == 2 * 5
    assert all(torch.equal(a, b) for a, b in zip(tuned, again, strict=True))
    assert all(torch.equal(tuned[step], plain[step]) for step in (0, 1, 2, 3, 5))
    first, second = tuned[4]
    assert not torch.allclose(first, second)


def test_one_branch_has_no_guidance_to_reuse() -> None:
    loop = Loop("FluxTransformer2DModel")
    loop.do_classifier_free_guidance = False
    forward = unnamed(loop, branches=1)
    with accelerate(loop, Policy(cache=MaskCache(actions=ACTIONS))) as applied:
        loop.run(forward)
        assert applied.summary().steps == {"full": 5, "step": 1}


def test_state_belongs_to_an_expert() -> None:
    loop = Loop("WanTransformer3DModel")
    other = Loop("WanTransformer3DModel").transformer
    loop.transformer_2 = other  # type: ignore[attr-defined]

    def forward(step: int) -> Tensor:
        expert = loop.transformer if step < 3 else other
        with expert.cache_context("cond"):
            output: Tensor = expert(**loop.inputs(step), return_dict=False)[0]
        return output.clone()

    plain = loop.run(forward)
    actions: tuple[Action, ...] = ("full", "full", "step", "step", "step", "step")
    with accelerate(loop, Policy(cache=MaskCache(actions=actions))) as applied:
        tuned = loop.run(forward)
        assert applied.summary().steps == {"full": 3, "step": 3}
    assert torch.equal(tuned[3], plain[3])  # the second expert's first step is computed


# --- a pipeline that always names its forwards after both branches --------------------------------


def cogvideox_under(policy: Policy, guidance_scale: float) -> tuple[Summary, Tensor]:
    pipe = cogvideox("5b")
    with accelerate(pipe, policy) as applied:
        latents = generate(pipe, guidance_scale=guidance_scale)
        return applied.summary(), latents


def test_guidance_is_noticed_where_only_the_call_knows_it() -> None:
    summary, latents = cogvideox_under(Policy(cache=MaskCache(actions=ACTIONS)), 6.0)
    assert summary.steps == {"full": 3, "cfg": 2, "step": 1}
    assert bool(latents.isfinite().all())


@pytest.mark.parametrize(
    "policy", [Policy(cache=MaskCache(actions=ACTIONS)), Policy(cache=RuleCache())]
)
def test_without_guidance_a_batch_has_one_branch(policy: Policy) -> None:
    summary, latents = cogvideox_under(policy, 1.0)
    assert "cfg" not in summary.steps
    assert bool(latents.isfinite().all())


@pytest.mark.parametrize(("guidance_scale", "branch"), [(6.0, BATCHED), (1.0, COND)])
def test_a_tap_knows_step_and_noise_level_where_the_pipeline_says_neither(
    guidance_scale: float, branch: str
) -> None:
    pipe, seen = cogvideox("5b"), list[Observation]()
    redundancy, trajectories = Redundancy(guidance_scale), TrajectoryRecorder(guidance_scale)

    def watch(observation: Observation) -> None:
        seen.append(observation)
        redundancy.watch(observation)
        trajectories.watch(observation)

    with tapped(pipe, watch):
        for _ in range(2):
            generate(pipe, guidance_scale=guidance_scale)
    assert [each.step for each in seen] == [*range(STEPS), *range(STEPS)]
    assert {each.branch for each in seen} == {branch}
    levels = [each.sigma for each in seen[:STEPS]]
    assert all(a is not None and b is not None and a > b for a, b in pairwise(levels))
    steps = redundancy.steps()
    assert [step.step for step in steps] == list(range(STEPS))
    assert all(step.sigma is not None for step in steps)
    assert not trajectories.trajectories()  # its steps are not those of flow matching
