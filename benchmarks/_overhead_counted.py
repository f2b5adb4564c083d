"""The program that `benchmarks.overhead --instructions` counts: short videos, plain and tuned."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from benchmarks.instructions import Counter
from benchmarks.overhead import SHORT, policies

from ditune.accel.apply import accelerate
from ditune.cli.sources import quieten_libraries
from ditune.miniature.system import MiniatureSource

VIDEOS = 2


def run(folder: Path) -> None:
    """Count the denoising of the same videos with every policy, and without one."""
    quieten_libraries()
    source = MiniatureSource()
    source.call.update(num_inference_steps=SHORT, output_type="latent")
    counter = Counter(folder)
    _denoise(source.pipe, source, 0)
    for index in range(VIDEOS):
        with counter.piece(f"{index} plain"):
            _denoise(source.pipe, source, index)
    for name, policy in policies(SHORT).items():
        applied = accelerate(source.pipe, policy)
        _denoise(source.pipe, source, 0)
        for index in range(VIDEOS):
            with counter.piece(f"{index} {name}"):
                _denoise(source.pipe, source, index)
            assert applied.summary().steps == {"full": SHORT}
        applied.remove()


def _denoise(pipe: Any, source: MiniatureSource, index: int) -> None:
    generator = torch.Generator().manual_seed(index)
    pipe(prompt=source.held_out[index], generator=generator, **source.call)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
