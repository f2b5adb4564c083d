"""A whole small pipeline with prompts: random weights, real videos."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from tests.conftest import wan_pipeline

from ditune.tuner.source import FolderSource

TINY_STEPS = 8


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> FolderSource:
    """Return a source whose prompts become embeddings by their checksum."""
    pipe = wan_pipeline()
    torch.manual_seed(3)
    pipe.register_modules(
        vae=AutoencoderKLWan(
            base_dim=8,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ).eval()
    )
    original: Callable[..., Any] = WanPipeline.__call__

    def called(self: WanPipeline, prompt: str, **arguments: Any) -> Any:
        generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        embeds = torch.randn(1, 6, 32, generator=generator)
        return original(self, prompt_embeds=embeds, **arguments)

    monkeypatch.setattr(WanPipeline, "__call__", called)
    call = {
        "negative_prompt_embeds": torch.zeros(1, 6, 32),
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "num_inference_steps": TINY_STEPS,
    }
    prompts = [f"prompt {i}" for i in range(16)]
    return FolderSource("tiny", pipe, None, call, tuple(prompts[:6]), tuple(prompts[6:]))
