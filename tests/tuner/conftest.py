"""A whole small pipeline with prompts: random weights, real videos."""

from __future__ import annotations

import pytest
import torch
from tests.conftest import take_prompts, tiny_vae, wan_pipeline

from ditune.tuner.source import FolderSource

TINY_STEPS = 8


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> FolderSource:
    """Return a source whose prompts become embeddings by their checksum."""
    pipe = wan_pipeline()
    pipe.register_modules(vae=tiny_vae())
    take_prompts(monkeypatch)
    call = {
        "negative_prompt_embeds": torch.zeros(1, 6, 32),
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "num_inference_steps": TINY_STEPS,
    }
    prompts = [f"prompt {i}" for i in range(16)]
    return FolderSource("tiny", pipe, None, call, tuple(prompts[:6]), tuple(prompts[6:]))
