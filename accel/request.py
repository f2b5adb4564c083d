"""What one pipeline call asks for: sizes, steps, guidance, batch; before it runs and while it does.

Both ways have to agree, or a policy is stored under one key and looked up under another.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import Tensor

from ditune.db.errors import UsageFault


@dataclass(frozen=True)
class Request:
    """What one pipeline call asks for; sizes in pixels and frames."""

    height: int
    width: int
    frames: int
    steps: int
    guidance: bool
    batch: int


def arguments(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call, with the pipeline's defaults for those it leaves out."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    return defaults | dict(call)


def declared(pipe: Any, call: Mapping[str, Any]) -> Request:
    """Return what a call asks for, from its arguments and the pipeline's defaults.

    Sizes are rounded as the pipeline rounds them: to whole latents.
    """
    asked = arguments(pipe, call)
    prompts, embeddings = asked.get("prompt"), asked.get("prompt_embeds")
    count = len(prompts) if isinstance(prompts, list) else 1
    if prompts is None and isinstance(embeddings, Tensor):
        count = len(embeddings)
    time = getattr(pipe, "vae_scale_factor_temporal", None)
    if time is not None and asked.get("num_frames"):
        asked["num_frames"] = _whole_frames(int(asked["num_frames"]), int(time))
    return _request(pipe, asked, count, float(asked.get("guidance_scale") or 0.0) > 1.0)


def observed(pipe: Any, latents: Tensor, steps: int) -> Request:
    """Return what a running call asks for; only to be used from within it.

    The call's own variables say it best, because tokens do not show which size they were packed
    from. Where no call is on the stack, the latents have to do.

    Args:
        pipe: The pipeline that is running.
        latents: The transformer's input.
        steps: The number of denoising steps.

    Raises:
        UsageFault: No call of the pipeline is on the stack, and the latents are tokens.
    """
    guided = getattr(pipe, "do_classifier_free_guidance", None)
    running = _running(pipe)
    if running is not None:
        count = running.get("batch_size")
        scale = float(running.get("guidance_scale") or 0.0)
        guidance = scale > 1.0 if guided is None else bool(guided)
        asked = {**running, "num_inference_steps": steps}
        return _request(pipe, asked, count if isinstance(count, int) else 1, guidance)
    time, space = _latent_scales(pipe)
    if latents.ndim not in (4, 5):
        raise UsageFault(
            f"the size of this call of {type(pipe).__name__} cannot be told from latents of shape "
            f"{tuple(latents.shape)}: hand the policy over, accelerate(pipe, policy)"
        )
    frames = latents.shape[2] if latents.ndim == 5 else 1
    return Request(
        height=latents.shape[-2] * space,
        width=latents.shape[-1] * space,
        frames=(frames - 1) * time + 1,
        steps=steps,
        guidance=bool(guided),
        batch=len(latents),
    )


def guides(pipe: Any) -> bool | None:
    """Whether the call that runs has a second, unconditional branch, None if nothing says.

    Some pipelines say so in a property, others only in a variable of the call.
    """
    said = getattr(pipe, "do_classifier_free_guidance", None)
    if said is None:
        running = _running(pipe) or {}
        said = running.get("do_classifier_free_guidance", running.get("do_true_cfg"))
    return None if said is None else bool(said)


def _request(pipe: Any, asked: Mapping[str, Any], count: int, guidance: bool) -> Request:
    """Return a request from the arguments of a call, or from its variables."""
    _, space = _latent_scales(pipe)
    videos = asked.get("num_videos_per_prompt") or asked.get("num_images_per_prompt") or 1
    return Request(
        height=int(asked.get("height") or 1) // space * space or space,
        width=int(asked.get("width") or 1) // space * space or space,
        frames=int(asked.get("num_frames") or 1),  # a running call has rounded it
        steps=int(asked["num_inference_steps"]),
        guidance=guidance,
        batch=count * int(videos),
    )


def _running(pipe: Any) -> dict[str, Any] | None:
    """Return the variables of the pipeline's call that is on the stack, None if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipe:
            return dict(frame.f_locals)
        frame = frame.f_back
    return None


def _latent_scales(pipe: Any) -> tuple[int, int]:
    time = int(getattr(pipe, "vae_scale_factor_temporal", 1) or 1)
    space = int(getattr(pipe, "vae_scale_factor_spatial", 1) or 1)
    return time, space


def _whole_frames(frames: int, time: int) -> int:
    """Round a frame count as WanPipeline does: to a whole number of latents, plus the first."""
    if frames % time != 1:
        frames = frames // time * time + 1
    return max(frames, 1)
