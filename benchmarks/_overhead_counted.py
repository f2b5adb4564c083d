"""The program that `benchmarks.overhead --instructions` counts: short videos, plain and tuned."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from benchmarks.instructions import Counter
from benchmarks.overhead import FORWARD, PLAIN, SHORT, policies

from ditune.accel.apply import accelerate
from ditune.cli.sources import quieten_libraries
from ditune.miniature.system import MiniatureSource


def count_forward(source: MiniatureSource, counter: Counter) -> None:
    """Count one forward of the large model."""
    model = source.pipe.transformer
    latents, text = torch.randn(1, 16, 13, 4, 4), torch.randn(1, 8, 64)
    with torch.no_grad():
        model(latents, torch.tensor([500]), text)
        with counter.piece(FORWARD):
            model(latents, torch.tensor([500]), text)


def count_videos(source: MiniatureSource, counter: Counter) -> None:
    """Count the denoising of one video without a policy and with every one, when all is warm."""
    source.call.update(num_inference_steps=SHORT, output_type="latent")
    _denoise(source)
    with counter.piece(PLAIN):
        _denoise(source)
    for name, policy in policies(SHORT).items():
        with accelerate(source.pipe, policy) as applied:
            _denoise(source)
            with counter.piece(name):
                _denoise(source)
            assert applied.summary().steps == {"full": SHORT}


def _denoise(source: MiniatureSource) -> None:
    generator = torch.Generator().manual_seed(0)
    source.pipe(prompt=source.held_out[0], generator=generator, **source.call)


if __name__ == "__main__":
    quieten_libraries()
    miniature, instructions = MiniatureSource(), Counter(Path(sys.argv[1]))
    count_forward(miniature, instructions)
    if sys.argv[2:] == ["videos"]:
        count_videos(miniature, instructions)
