"""A whole small pipeline with prompts: random weights, real videos."""

from __future__ import annotations

import pytest
import torch
from tests.conftest import take_prompts, tiny_vae, wan_pipeline
from torch import nn

from ditune.profiler import timing
from ditune.tuner.source import FolderSource

TINY_STEPS = 8


class BlockClock:
    """Stands still but for the blocks that run: what is fast does not hang on who else is here."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self._seconds = 0.0
        for block in blocks:
            block.register_forward_hook(lambda *_: self._advance(1e-3))

    def perf_counter(self) -> float:
        """Return the seconds that blocks took so far; to read them takes some time, too."""
        self._advance(1e-5)
        return self._seconds

    def _advance(self, seconds: float) -> None:
        self._seconds += seconds


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> FolderSource:
    """Return a source whose prompts become embeddings by their checksum."""
    pipe = wan_pipeline()
    pipe.register_modules(vae=tiny_vae())
    take_prompts(monkeypatch)
    monkeypatch.setattr(timing, "time", BlockClock(pipe.transformer.blocks))
    call = {
        "negative_prompt_embeds": torch.zeros(1, 6, 32),
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "num_inference_steps": TINY_STEPS,
    }
    prompts = [f"prompt {i}" for i in range(16)]
    return FolderSource("tiny", pipe, None, call, tuple(prompts[:6]), tuple(prompts[6:]))
