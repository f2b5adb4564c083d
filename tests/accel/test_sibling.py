"""The small model in the large one's place: CogVideoX's conversion, refusals, where weights are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    WanVACETransformer3DModel,
)
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import wan_pipeline, wan_transformer
from torch import Tensor

from ditune.accel.apply import accelerate
from ditune.accel.conversion import Conversion, NoiseSchedule
from ditune.accel.noise import denoised
from ditune.accel.sibling import Sibling
from ditune.db.errors import UsageFault
from ditune.db.policy import Handoff, MaskCache, Policy

STEPS = 6
SCALES = {"5b": 0.7, "2b": 1.15258426}
SNR_SHIFTS = {"5b": 1.0, "2b": 3.0}


def scheduler(size: str) -> CogVideoXDDIMScheduler:
    """Return the published scheduler of a size."""
    return CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=SNR_SHIFTS[size],
        timestep_spacing="trailing",
    )


def schedule(size: str) -> NoiseSchedule:
    return NoiseSchedule(scheduler(size).alphas_cumprod.double().tolist(), SCALES[size])


def cogvideox(size: str) -> CogVideoXPipeline:
    """Return a tiny pipeline of a size: its schedule, latent scale and positions are real."""
    torch.manual_seed(len(size) + (size == "2b"))
    large = size == "5b"
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2 if large else 1,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=3 if large else 2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=8,
        use_rotary_positional_embeddings=large,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=["CogVideoXDownBlock3D"] * 4,
        up_block_types=["CogVideoXUpBlock3D"] * 4,
        block_out_channels=[8] * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=SCALES[size],
    )
    pipe = CogVideoXPipeline(None, None, vae.eval(), transformer.eval(), scheduler(size))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: CogVideoXPipeline, steps: int = STEPS, guidance_scale: float = 6.0) -> Tensor:
    """Return the latents of a tiny video."""
    random = torch.Generator().manual_seed(4)
    embeddings = torch.randn(2, 1, 8, 16, generator=random)
    found: Tensor = pipe(
        prompt_embeds=embeddings[0],
        negative_prompt_embeds=embeddings[1],
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=random,
        output_type="latent",
        return_dict=False,
    )[0]
    return found


# --- conversion --------------------------------------------------------------------------------


@given(timestep=st.integers(0, 999), seed=st.integers(0, 9))
def test_an_exact_small_model_gives_the_exact_large_velocity(timestep: int, seed: int) -> None:
    """Clean latents and noise are known, so both velocities are."""
    large, small = schedule("5b"), schedule("2b")
    clean, noise = torch.randn(2, 1, 2, 3, generator=torch.Generator().manual_seed(seed)).double()
    at = torch.tensor([timestep])
    alpha, sigma = (
        (large.alphas_cumprod[timestep] ** 0.5),
        (1 - large.alphas_cumprod[timestep]) ** 0.5,
    )
    latents = alpha * large.scaling_factor * clean + sigma * noise
    velocity = alpha * noise - sigma * large.scaling_factor * clean

    conversion = Conversion(large, small)
    asked, told = conversion.asked(latents, at)
    # which clean share and noise the small model sees in it, from the signal-to-noise ratio alone
    signal = alpha * large.scaling_factor / (sigma * small.scaling_factor)
    alpha_s, sigma_s = signal / (1 + signal**2) ** 0.5, 1 / (1 + signal**2) ** 0.5
    mixed = alpha_s * small.scaling_factor * clean + sigma_s * noise
    torch.testing.assert_close(asked, mixed, rtol=1e-5, atol=1e-5)
    answer = alpha_s * noise - sigma_s * small.scaling_factor * clean
    found = conversion.answered(latents, at, answer)
    torch.testing.assert_close(found, velocity, rtol=1e-5, atol=1e-5)
    # and it is told the timestep at which its own schedule has that ratio, where it has one
    shares = np.interp(float(told), np.arange(1000), np.sqrt(small.alphas_cumprod))
    assert shares == pytest.approx(min(alpha_s, small.alphas_cumprod[0] ** 0.5), abs=2e-3)


def test_the_two_schedules_are_as_far_apart_as_was_measured() -> None:
    """At one timestep the small one's signal-to-noise ratio is 7 to 14 % lower in pixels."""
    ratios = {}
    for size in ("5b", "2b"):
        share = np.asarray(schedule(size).alphas_cumprod)[[19, 979]]
        ratios[size] = share / (1 - share) * SCALES[size] ** 2
    assert ratios["2b"] / ratios["5b"] == pytest.approx([0.930, 0.859], abs=2e-3)


def test_one_schedule_is_converted_into_itself() -> None:
    conversion = Conversion(schedule("5b"), schedule("5b"))
    latents, output = torch.randn(2, 3, 4, 5)
    timestep = torch.tensor([999, 500, 0])
    asked, told = conversion.asked(latents, timestep)
    torch.testing.assert_close(asked, latents)
    torch.testing.assert_close(told, timestep.float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(conversion.answered(latents, timestep, output), output)


@pytest.mark.parametrize("timestep", [999, 800, 333, 20])
def test_clean_estimates_are_the_small_models_own(timestep: int) -> None:
    """A random small model, asked in its own terms and through the conversion."""
    large, small = cogvideox("5b"), cogvideox("2b")
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 3, 4, 8, 8, generator=random)
    text = torch.randn(1, 8, 16, generator=random)
    at = torch.tensor([timestep])
    rest = {"encoder_hidden_states": text, "return_dict": False}
    with torch.no_grad():
        ours = Sibling.of(large, small)(
            hidden_states=latents, timestep=at, image_rotary_emb=("for", "the large"), **rest
        )[0]
        asked, told = Conversion(schedule("5b"), schedule("2b")).asked(latents, at)
        own = small.transformer(hidden_states=asked, timestep=told, **rest)[0]
    share = schedule("5b").alphas_cumprod[timestep]
    if share == 0.0:  # nothing but noise: the velocity is the clean estimate, turned around
        torch.testing.assert_close(ours * SCALES["2b"], own * SCALES["5b"], rtol=1e-4, atol=1e-5)
        return
    level = ((1 - share) / share) ** 0.5
    wanted = denoised(asked, own, level * SCALES["2b"] / SCALES["5b"], "velocity") / SCALES["2b"]
    found = denoised(latents, ours, level, "velocity") / SCALES["5b"]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_cogvideox_pipeline_hands_over() -> None:
    large, small = cogvideox("5b"), cogvideox("2b")
    plain = generate(large)
    large.scheduler.set_timesteps(STEPS)
    share = large.scheduler.alphas_cumprod[large.scheduler.timesteps[2]]
    handoff = Handoff(sigma=float(((1 - share) / share) ** 0.5) * 1.001)
    mask = MaskCache(actions=("full", "full", "full", "step", "full", "full"))
    for cache, forwards in ((None, 4), (mask, 3)):
        with accelerate(large, Policy(handoff=handoff, cache=cache), small=small) as applied:
            handed = generate(large)
            summary = applied.summary()
        assert summary.reason == "given by the caller"
        assert summary.small_forwards == forwards
        assert torch.isfinite(handed).all()
        assert not torch.equal(handed, plain)
    assert torch.equal(plain, generate(large))


def test_vace_gets_as_many_control_scales_as_it_has_layers() -> None:
    def vace(layers: int, control_layers: list[int]) -> WanVACETransformer3DModel:
        torch.manual_seed(0)
        return WanVACETransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=layers,
            rope_max_seq_len=32,
            vace_layers=control_layers,
            vace_in_channels=8,
        ).eval()

    small = vace(3, [0, 2])
    random = torch.Generator().manual_seed(0)
    given = {
        "hidden_states": torch.randn(1, 4, 3, 8, 8, generator=random),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 6, 16, generator=random),
        "control_hidden_states": torch.randn(1, 8, 3, 8, 8, generator=random),
        "return_dict": False,
    }
    sibling = Sibling.of(vace(6, [0, 2, 4, 5]), small)
    with torch.no_grad():
        ours = sibling(control_hidden_states_scale=torch.tensor([0.5, 1.0, 2.0, 3.0]), **given)[0]
        own = small(control_hidden_states_scale=torch.tensor([0.5, 3.0]), **given)[0]
    assert torch.equal(ours, own)


# --- refusals ----------------------------------------------------------------------------------


def refused(pipe: Any, small: Any) -> str:
    with pytest.raises(UsageFault) as fault:
        accelerate(pipe, Policy(), small=small)
    return str(fault.value)


def test_cogvideox_needs_the_small_pipeline() -> None:
    said = refused(cogvideox("5b"), cogvideox("2b").transformer)
    assert "use_rotary_positional_embeddings: True against False" in said
    assert "give its whole pipeline" in said


def test_models_that_do_not_pair_are_refused_before_anything_is_attached() -> None:
    pipe = wan_pipeline(layers=2)
    assert "are they swapped?" in refused(pipe, wan_transformer(layers=4))
    assert "in_channels" in refused(pipe, cogvideox("2b").transformer)
    assert "not a str" in refused(pipe, "a/folder")
    assert "not a Linear" in refused(pipe, torch.nn.Linear(2, 2))
    accelerate(pipe, Policy()).remove()


def test_a_small_pipeline_with_another_vae_is_refused() -> None:
    small = cogvideox("2b")
    small.vae.register_to_config(temporal_compression_ratio=8)
    assert "vae.temporal_compression_ratio" in refused(cogvideox("5b"), small)
    small = cogvideox("2b")
    small.scheduler.register_to_config(prediction_type="epsilon")
    said = refused(cogvideox("5b"), small)
    assert "scheduler.prediction_type: v_prediction against epsilon" in said
    assert "vae.scaling_factor" in said


def test_a_small_model_in_another_type_is_refused() -> None:
    pipe = wan_pipeline(layers=4)
    small = wan_transformer(layers=2).to(torch.bfloat16)
    said = refused(pipe, small)
    assert "in torch.bfloat16 and the large one in torch.float32" in said
    assert "torch_dtype=torch.float32" in said
    small.register_to_config(quantization_config={"quant_method": "torchao"})
    accelerate(pipe, Policy(), small=small).remove()
