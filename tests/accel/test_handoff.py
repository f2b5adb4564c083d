"""Which model runs a step: rules from numbers, signals from outputs, both in a real pipeline."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
)
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import STEPS, Generate, wan_pipeline, wan_transformer
from torch import nn

from ditune.accel.apply import accelerate
from ditune.accel.handoff import Falling, Router, Signal
from ditune.accel.location import Where
from ditune.accel.mixcache import Place
from ditune.accel.noise import Prediction, denoised, prediction_of, tells_ratios
from ditune.db.policy import (
    Action,
    AdaptiveHandoff,
    BandedHandoff,
    Handoff,
    HandoffPolicy,
    MaskCache,
    Policy,
)

FLOW = SimpleNamespace(config=SimpleNamespace(prediction_type=None))


def switch(rule: AdaptiveHandoff, changes: list[float | None]) -> int | None:
    """Return the step at which a rule switches when it sees these changes, None if never."""
    falling = Falling(rule, len(changes))
    for step, change in enumerate(changes):
        falling.observe(step, change)
        if falling.switched:
            return step
    return None


# --- rules -------------------------------------------------------------------------------------


def test_it_switches_where_the_change_has_nearly_stopped_falling() -> None:
    changes = [None, 0.9, 0.5, 0.3, 0.2, 0.15, 0.12, 0.115, 0.113, 0.112]
    rule = AdaptiveHandoff(delta=0.01, min_frac=0.1, max_frac=1.0)
    assert switch(rule, changes) == 7
    assert switch(rule.model_copy(update={"delta": 0.04}), changes) == 6
    assert switch(rule.model_copy(update={"min_frac": 0.9}), changes) == 9
    assert switch(rule.model_copy(update={"max_frac": 0.4}), changes) == 4


def test_a_rising_or_unknown_change_is_not_a_slowing_one() -> None:
    rule = AdaptiveHandoff(delta=0.5, min_frac=0.0, max_frac=1.0)
    assert switch(rule, [None, 0.1, 0.2, 0.3, 0.3]) is None
    assert switch(rule, [None, 0.3, None, 0.2, None]) is None


@given(
    changes=st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=40),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
)
def test_it_switches_within_its_bounds_and_for_good(
    changes: list[float | None], ends: list[float]
) -> None:
    falling = Falling(AdaptiveHandoff(min_frac=ends[0], max_frac=ends[1]), len(changes))
    seen = []
    for step, change in enumerate(changes):
        falling.observe(step, change)
        seen.append(falling.switched)
    assert seen == sorted(seen)
    earliest, latest = math.ceil(ends[0] * len(changes)), math.floor(ends[1] * len(changes))
    assert not any(seen[:earliest])
    assert all(seen[max(earliest, latest) :])


def test_bands_and_tails() -> None:
    def taken(handoff: HandoffPolicy) -> list[int]:
        router = Router(handoff, 10, FLOW, 1.0)
        return [step for step in range(10) if router.small(step, 1.0 - step / 10)]

    assert taken(Handoff(sigma=0.65)) == [4, 5, 6, 7, 8, 9]
    assert taken(Handoff(sigma=0.65, until=0.25)) == [4, 5, 6, 7]
    assert taken(BandedHandoff(bands=((0.85, 0.65), (0.45, 0.0)))) == [2, 3, 6, 7, 8, 9]
    assert taken(Handoff(sigma=2.0)) == list(range(10))


# --- signals -----------------------------------------------------------------------------------


def gaussian(shift: float, delta: float, values: int = 200_000) -> int:
    """Return at which step Gaussian data with a power-law spectrum makes the rule switch.

    The denoiser is exact, the solver Euler in 50 steps; see `srdiffusion.md`, section 4.
    """
    even = torch.linspace(1.0, 1.0 / 50, 50, dtype=torch.float64)
    sigmas = torch.cat([shift * even / (1.0 + (shift - 1.0) * even), torch.zeros(1)]).tolist()
    spread = torch.arange(1, values + 1, dtype=torch.float64) ** (-1.6 / 3)
    spread /= spread.mean()
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 1, values, generator=random, dtype=torch.float64)
    rule = AdaptiveHandoff(delta=delta, min_frac=0.1, max_frac=1.0)
    router = Router(rule, 50, FLOW, scale=1.0)
    for step in range(50):
        sigma = sigmas[step]
        if router.small(step, sigma):
            return step - 1
        clean = (1.0 - sigma) * spread / ((1.0 - sigma) ** 2 * spread + sigma**2) * latents
        output = (latents - clean) / sigma
        router.note(Place(step, 50, "cond", latents), Where("cond", step, 50, sigma), output)
        latents = latents + (sigmas[step + 1] - sigma) * output
    raise AssertionError("it never switched")


@pytest.mark.parametrize(
    ("shift", "table"), [(3.0, [15, 11, 7, 5]), (5.0, [14, 11, 7, 5]), (8.0, [14, 11, 7, 5])]
)
def test_delta_acts_as_a_knob_on_gaussian_data(shift: float, table: list[int]) -> None:
    """The table names the earlier one of the two steps that a change lies between."""
    found = [gaussian(shift, delta) for delta in (0.005, 0.01, 0.03, 0.1)]
    assert [max(step - 1, 5) for step in found] == table


@pytest.mark.parametrize("prediction", ["flow", "velocity", "noise", "sample"])
@given(sigma=st.floats(0.01, 0.99))
def test_an_exact_output_stands_for_the_clean_latents(prediction: Prediction, sigma: float) -> None:
    clean, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).double()
    if prediction == "flow":
        latents, output = (1.0 - sigma) * clean + sigma * noise, noise - clean
    else:
        level = sigma / (1.0 - sigma)
        signal = (1.0 + level**2) ** -0.5
        latents = signal * (clean + level * noise)
        velocity = signal * (noise - level * clean)
        output = {"velocity": velocity, "noise": noise, "sample": clean}[prediction]
        sigma = level
    torch.testing.assert_close(denoised(latents, output, sigma, prediction), clean)


def test_schedulers_say_what_outputs_are() -> None:
    assert prediction_of(FlowMatchEulerDiscreteScheduler()) == "flow"
    assert prediction_of(CogVideoXDDIMScheduler(prediction_type="v_prediction")) == "velocity"
    assert prediction_of(CogVideoXDDIMScheduler()) == "noise"
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    assert prediction_of(UniPCMultistepScheduler(**flow)) == "flow"


def test_schedulers_say_what_noise_levels_are() -> None:
    cosmos = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    assert not tells_ratios(cosmos)
    cosmos.register_to_config(sigma_max=80.0)
    assert tells_ratios(cosmos)
    assert tells_ratios(CogVideoXDDIMScheduler(prediction_type="v_prediction"))
    assert tells_ratios(UniPCMultistepScheduler())
    assert not tells_ratios(UniPCMultistepScheduler(use_flow_sigmas=True))


def test_a_ratio_is_read_as_a_share_where_outputs_are_flows() -> None:
    """Cosmos Predict 2 divides its latents by 1 + sigma: they are flow matching's at the share."""
    clean, noise = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(2)).double()
    found = []
    for ratio in (True, False):
        signal = Signal("denoised", "flow", scale=1.0)
        for step, share in enumerate((0.9, 0.4)):
            latents = (1.0 - share) * clean * (step + 1) + share * noise
            sigma = share / (1.0 - share) if ratio else share
            where = Where("cond", step, 2, sigma, ratio)
            signal.note(Place(step, 2, "cond", latents), where, noise - clean * (step + 1))
            last = signal.change()
        assert last is not None
        assert last[1] is not None
        found.append(float(last[1]))
    assert found[0] == pytest.approx(found[1])
    assert found[1] == pytest.approx(float(torch.tanh(torch.tensor(1.0))))


@pytest.mark.parametrize("kind", ["denoised", "latent", "output"])
def test_branches_are_guided_in_any_order_and_form(kind: Any) -> None:
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 1, 4, 8, generator=random)
    cond, uncond = torch.randn(2, 2, 1, 4, 8, generator=random)
    found = []
    for form in (("cond", "uncond"), ("uncond", "cond"), ("cond_uncond",)):
        signal = Signal(kind, "flow", scale=5.0)
        assert signal.change() is None
        for step in range(2):
            outputs = {"cond": cond[step][None], "uncond": uncond[step][None]}
            outputs["cond_uncond"] = torch.stack([uncond[step], cond[step]])
            for branch in form:
                place = Place(step, 2, branch, latents[step][None].expand_as(outputs[branch]))
                signal.note(place, Where(branch, step, 2, 0.9 - 0.1 * step), outputs[branch])
            last = signal.change()
        assert last is not None
        step, change = last
        assert step == 1
        assert change is not None
        found.append(float(change))
    assert found == pytest.approx([found[0]] * 3)
    assert 0.0 < found[0] < 1.0


# --- pipelines ---------------------------------------------------------------------------------


@pytest.fixture
def small() -> nn.Module:
    found: nn.Module = wan_transformer(layers=2, seed=7)
    return found


def test_an_adaptive_switch_is_the_static_one_at_its_step(
    pipe: WanPipeline, small: nn.Module, generate: Generate
) -> None:
    """Forced at the latest step, so that it is known; both calls of one handle switch there."""
    pipe.scheduler.set_timesteps(STEPS)
    sigmas = pipe.scheduler.sigmas
    last = int(0.5 * STEPS)  # of the large model
    between = float(sigmas[last] + sigmas[last + 1]) / 2
    until = float(sigmas[STEPS - 2] + sigmas[STEPS - 1]) / 2
    with accelerate(pipe, Policy(handoff=Handoff(sigma=between, until=until)), small=small):
        wanted = generate(pipe)
    rule = AdaptiveHandoff(delta=1e-9, min_frac=0.5, max_frac=0.5, until=until)
    with accelerate(pipe, Policy(handoff=rule), small=small) as applied:
        for _ in range(2):
            assert torch.equal(wanted, generate(pipe))
            assert applied.summary().small_forwards == 2 * (STEPS - last - 2)


def test_a_multistep_solver_keeps_its_history(small: nn.Module, generate: Generate) -> None:
    """The hand-off gives the solver the outputs that a swap in a callback would give it."""
    pipe = wan_pipeline()
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    pipe.scheduler = UniPCMultistepScheduler(**config)
    pipe.scheduler.set_timesteps(STEPS)
    between = float(pipe.scheduler.sigmas[4] + pipe.scheduler.sigmas[5]) / 2
    with accelerate(pipe, Policy(handoff=Handoff(sigma=between)), small=small):
        ours = generate(pipe)
    large = pipe.transformer

    def swap(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        if step == 4:
            pipe.transformer = small
        return kwargs

    swapped = generate(pipe, callback_on_step_end=swap)
    pipe.transformer = large
    assert torch.equal(ours, swapped)


def test_a_model_that_comes_back_starts_with_an_empty_cache(
    pipe: WanPipeline, small: nn.Module, generate: Generate
) -> None:
    """Its first step is computed, whatever the mask says: what it held is too old."""
    pipe.scheduler.set_timesteps(STEPS)
    edges = [float(a + b) / 2 for a, b in pairwise(pipe.scheduler.sigmas.tolist())]
    handoff = BandedHandoff(bands=((edges[3], edges[7]),))  # steps 4 to 7
    reused: list[Action] = ["step"] * (STEPS - 1)
    mask = MaskCache(actions=("full", *reused))
    with accelerate(pipe, Policy(handoff=handoff, cache=mask), small=small) as applied:
        generate(pipe)
        summary = applied.summary()
    assert summary.steps == {"full": 3, "step": STEPS - 3}
    assert (summary.computed, summary.small_forwards) == (6, 2)


def test_an_interrupted_call_leaves_no_switch_behind(
    pipe: WanPipeline, small: nn.Module, generate: Generate
) -> None:
    rule = AdaptiveHandoff(delta=1e-9, min_frac=0.2, max_frac=0.2)

    def fail(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        if step == 6:
            raise KeyboardInterrupt
        return kwargs

    with accelerate(pipe, Policy(handoff=rule), small=small):
        wanted = generate(pipe)
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, callback_on_step_end=fail)
        assert torch.equal(wanted, generate(pipe))


def test_a_scheduler_without_noise_levels_keeps_the_large_model(
    pipe: WanPipeline, small: nn.Module, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = generate(pipe)
    monkeypatch.setattr("ditune.accel.location.Locator._sigma", lambda *_: None)
    monkeypatch.setattr("ditune.accel.internals.ForwardHook.context", lambda *_: None)
    with accelerate(pipe, Policy(handoff=Handoff(sigma=0.5)), small=small) as applied:
        assert torch.equal(plain, generate(pipe))
        assert "tells none" in applied.summary().reason


def test_a_call_without_a_sketch_is_the_plain_one(
    pipe: WanPipeline, small: nn.Module, generate: Generate
) -> None:
    plain = generate(pipe)
    with accelerate(pipe, Policy(handoff=Handoff(sigma=2.0)), small=small) as applied:
        assert torch.equal(plain, generate(pipe))
        assert "no step of its sketch" in applied.summary().reason


@pytest.mark.parametrize(
    "handoff", [Handoff(sigma=0.5), AdaptiveHandoff(), BandedHandoff(bands=((0.5, 0.0),))]
)
def test_too_few_steps_to_hand_over_are_the_large_models_and_said_so(
    pipe: WanPipeline, small: nn.Module, generate: Generate, handoff: HandoffPolicy
) -> None:
    plain = generate(pipe, steps=1)
    with accelerate(pipe, Policy(handoff=handoff), small=small) as applied:
        assert torch.equal(plain, generate(pipe, steps=1))
        assert "the small model ran none of 1 steps" in applied.summary().trips[0]


def test_without_guidance_a_given_hand_off_still_works(
    pipe: WanPipeline, small: nn.Module, generate: Generate
) -> None:
    plain = generate(pipe, guidance_scale=1.0)
    with accelerate(pipe, Policy(handoff=Handoff(sigma=0.5)), small=small) as applied:
        assert not torch.equal(plain, generate(pipe, guidance_scale=1.0))
        assert 0 < applied.summary().small_forwards < STEPS


def test_a_call_that_is_all_the_small_models_says_so(
    pipe: WanPipeline, small: nn.Module, generate: Generate
) -> None:
    policy = Policy(handoff=BandedHandoff(bands=((1000.0, 0.0),)))
    with accelerate(pipe, policy, small=small) as applied:
        generate(pipe)
        (trip,) = applied.summary().trips
    assert f"the large model ran none of {STEPS} steps" in trip


def test_a_small_model_compiled_as_a_whole_sees_what_stands_in_for_blocks(
    pipe: WanPipeline, generate: Generate
) -> None:
    """One graph cannot hold them: those forwards run uncompiled."""
    small = wan_transformer(layers=4, seed=7)
    small.register_to_config(num_attention_heads=1)  # smaller, as far as one can tell
    actions: tuple[Action, ...] = ("full",) * 7 + ("block",) * 2 + ("full",) * (STEPS - 9)
    pipe.scheduler.set_timesteps(STEPS)
    middle = float(pipe.scheduler.sigmas[4:6].mean())
    policy = Policy(cache=MaskCache(actions=actions), handoff=Handoff(sigma=middle))
    found = []
    for compiled in (False, True):
        if compiled:
            small.compile(backend="eager", fullgraph=True)
        with accelerate(pipe, policy, small=small) as applied:
            found.append(generate(pipe))
            assert applied.summary().steps["block"] == 2
            assert applied.summary().work_ratio > 1.0
    torch.testing.assert_close(found[0], found[1])
