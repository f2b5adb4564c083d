"""A call asks for the same before it runs and while it does, whatever its latents look like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tests.accel.families_first import FIRST
from tests.accel.families_second import SECOND
from tests.conftest import Generate
from tests.db.conftest import file_of

from ditune.accel.apply import accelerate
from ditune.accel.fingerprint import detect
from ditune.accel.request import Request, declared, observed
from ditune.db.errors import UsageFault
from ditune.db.policy import MaskCache, Policy
from ditune.db.store import Store

STEPS = 6
COMMON = {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
Case = tuple[Any, dict[str, Any]]


def transformer(name: str) -> Any:
    config, _ = (FIRST | SECOND)[name]
    torch.manual_seed(0)
    return getattr(diffusers, name)(**config).eval()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def flux() -> Case:
    """Packed tokens, guidance distilled into the model."""
    model = transformer("FluxTransformer2DModel")
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=model,
        **dict.fromkeys(names),
    )
    call = {
        "prompt_embeds": noise(1, 5, model.config.joint_attention_dim),
        "pooled_prompt_embeds": noise(1, model.config.pooled_projection_dim),
        "height": 64,
        "width": 96,
        "guidance_scale": 3.5,
    }
    return pipe, call


def ltx() -> Case:
    """Packed tokens of a video, both branches in one batch."""
    model = transformer("LTXVideoTransformer3DModel")
    names = ("vae", "text_encoder", "tokenizer")
    pipe = diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=model,
        **dict.fromkeys(names),
    )
    width = model.config.caption_channels
    call = {
        "prompt_embeds": noise(1, 5, width),
        "prompt_attention_mask": torch.ones(1, 5),
        "negative_prompt_embeds": noise(1, 5, width),
        "negative_prompt_attention_mask": torch.ones(1, 5),
        "height": 64,
        "width": 96,
        "num_frames": 9,
        "guidance_scale": 4.0,
    }
    return pipe, call


@pytest.mark.parametrize("build", [flux, ltx])
def test_a_policy_is_found_whatever_the_latents_look_like(
    build: Callable[[], Case], tmp_path: Path
) -> None:
    pipe, call = build()
    pipe.set_progress_bar_config(disable=True)
    call |= COMMON

    def generate() -> torch.Tensor:
        latents: torch.Tensor = pipe(**call, generator=torch.Generator().manual_seed(1))[0]
        return latents

    plain = generate()
    with accelerate(pipe, db=tmp_path / "none.db"):
        assert torch.equal(plain, generate())  # nothing is known, nothing changes
    hardware, software, workload = detect(pipe, call)
    assert workload is not None
    assert (workload.height, workload.width, workload.batch) == (64, 96, 1)
    policy = Policy(cache=MaskCache(actions=("full", "full", "step", "full", "step", "full")))
    found = file_of(policy, hardware=hardware, software=software, workload=workload)
    with Store.open(str(tmp_path / "some.db")) as store:
        store.save_and_activate(found)
    with accelerate(pipe, db=tmp_path / "some.db") as applied:
        assert not torch.equal(plain, generate())
        summary = applied.summary()
    assert summary.policy_id == policy.id
    assert summary.steps == {"full": 4, "step": 2}


def test_variables_of_a_call_count_more_than_its_latents(
    pipe: Any, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Request] = []

    def watch(model: Any, args: Any, kwargs: Any) -> None:
        seen.append(observed(pipe, kwargs["hidden_states"], STEPS))

    handle = pipe.transformer.register_forward_pre_hook(watch, with_kwargs=True)
    generate(pipe, steps=STEPS, num_videos_per_prompt=2)
    handle.remove()
    call = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 5.0}
    assert set(seen) == {
        declared(pipe, {**call, "num_inference_steps": STEPS, "num_videos_per_prompt": 2})
    }


@pytest.mark.parametrize(
    ("shape", "size"), [((2, 16, 3, 4, 6), (32, 48, 9)), ((1, 16, 4, 6), (32, 48, 1))]
)
def test_without_a_call_the_latents_have_to_do(
    pipe: Any, shape: tuple[int, ...], size: tuple[int, int, int]
) -> None:
    pipe._guidance_scale = 1.0
    found = observed(pipe, torch.zeros(shape), STEPS)
    assert (found.height, found.width, found.frames) == size
    assert found.batch == shape[0]


def test_tokens_alone_do_not_say_their_size(pipe: Any) -> None:
    pipe._guidance_scale = 1.0
    with pytest.raises(UsageFault, match="cannot be told from latents of shape"):
        observed(pipe, torch.zeros(1, 24, 64), STEPS)
