"""What the embedded miniature is worth: judge figures, reconstruction, cost ratio, realism.

The realism table says how much fewer steps and the best-known caches cost in same-seed PSNR: the
higher the figures, the easier the miniature is compared with real models.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from benchmarks.rows import Benchmark, Row, main
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import SeaCacheConfig
from diffusers.utils import logging as diffusers_logging

from ditune import miniature
from ditune.miniature.architecture import Size
from ditune.miniature.classifier import ATTRIBUTES, trained_judge
from ditune.miniature.clips import render
from ditune.miniature.system import load_transformer
from ditune.tuner.quality import metrics

JUDGED_STEPS = 30
_BATCH = 24
_LARGE_FLOORS = {"digit": 0.80, "colour": 0.97, "motion": 0.97}
_SMALL_FLOORS = {"colour": 0.90, "motion": 0.90}
_JUDGE_FLOORS = {"digit": 0.95, "colour": 0.99, "motion": 0.99}


def measure(benchmark: Benchmark, arguments: argparse.Namespace) -> None:
    """Take every figure of the model card."""
    diffusers_logging.set_verbosity_error()
    quick = arguments.quick
    benchmark.conditions["judged clips"] = f"{JUDGED_STEPS} steps, guidance 6"
    _judge(benchmark, clips=300 if quick else 1500)
    pipe = _load(benchmark)
    _codec(benchmark, pipe, clips=60 if quick else 300)
    _cost(benchmark, repeats=15 if quick else 60)
    clips = 48 if quick else 240
    large = _accuracy(benchmark, "large", _LARGE_FLOORS, clips)
    small = _accuracy(benchmark, "small", _SMALL_FLOORS, clips)
    gap = large["digit"] - small["digit"]
    benchmark.add(Row("small is worse in digit by", gap, "", "> 0.05", gap > 0.05, n=clips))
    _realism(benchmark, pipe, prompts=2 if quick else 10)


def _load(benchmark: Benchmark) -> Any:
    started = time.perf_counter()
    pipe = miniature.load()
    lasted = time.perf_counter() - started
    benchmark.add(Row("load() after imports", lasted, "s", "<= 5", lasted <= 5))
    return pipe


def _judge(benchmark: Benchmark, clips: int) -> None:
    """The judge on held-out renders."""
    shown = render(clips, torch.Generator().manual_seed(7), held_out=True)
    with torch.no_grad():
        logits = trained_judge()(shown.frames)
    for name, logit in zip(ATTRIBUTES, logits, strict=True):
        right = float((logit.argmax(-1) == getattr(shown, name)).float().mean())
        floor = _JUDGE_FLOORS[name]
        held = right >= floor
        benchmark.add(Row(f"judge on renders: {name}", right, "", f">= {floor}", held, n=clips))


def _codec(benchmark: Benchmark, pipe: Any, clips: int) -> None:
    """Reconstruction of held-out clips through encoder and decoder."""
    frames = render(clips, torch.Generator().manual_seed(8), held_out=True).frames
    scores = []
    with torch.no_grad():
        for clip in frames:
            latents = pipe.vae.encode(clip[None]).latent_dist.mode()
            decoded = pipe.vae.decode(latents).sample[0]
            scores.append(metrics()["psnr"].score(_shown(decoded), _shown(clip), ""))
    mean = float(np.mean(scores))
    benchmark.add(Row("reconstruction PSNR", mean, "dB", ">= 26", mean >= 26, n=clips))


def _shown(clip: torch.Tensor) -> np.ndarray:
    """Turn a clip [3, f, h, w] in [-1, 1] into frames [f, h, w, 3] in [0, 1]."""
    return np.asarray(((clip + 1.0) / 2.0).movedim(0, -1).numpy())


def _cost(benchmark: Benchmark, repeats: int) -> None:
    """One forward of each size, interleaved."""
    models = {size: load_transformer(size) for size in ("large", "small")}
    inputs = {
        "hidden_states": torch.randn(1, 16, 13, 4, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 8, 64),
    }
    lasted: dict[str, list[float]] = {"large": [], "small": []}
    with torch.no_grad():
        for _ in range(repeats):
            for size, model in models.items():
                started = time.perf_counter()
                model(**inputs)
                lasted[size].append((time.perf_counter() - started) * 1e3)
    for size, values in lasted.items():
        benchmark.add(Row(f"{size} forward", float(np.median(values)), "ms", n=repeats))
    ratio = float(np.median(np.array(lasted["large"]) / np.array(lasted["small"])))
    benchmark.add(Row("cost ratio large / small", ratio, "x", ">= 5", ratio >= 5, n=repeats))


def _accuracy(
    benchmark: Benchmark, size: Size, floors: dict[str, float], clips: int
) -> dict[str, float]:
    """Judge accuracies of generated clips."""
    pipe = miniature.load(size)
    prompts = miniature.captions("held-out")[:clips]
    videos: list[np.ndarray] = []
    for start in range(0, clips, _BATCH):
        batch = prompts[start : start + _BATCH]
        videos += list(_generate(pipe, batch, seed=start, steps=JUDGED_STEPS))
    found = miniature.judge(videos, prompts)
    for name, value in found.items():
        floor = floors.get(name)
        target, held = (f">= {floor}", value >= floor) if floor else ("", None)
        benchmark.add(Row(f"{size}: {name}", value, "", target, held, n=clips))
    return found


def _generate(pipe: Any, prompts: Sequence[str], seed: int, steps: int) -> np.ndarray:
    call = dict(miniature.CALL) | {"num_inference_steps": steps}
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(
        pipe(prompt=list(prompts), generator=generator, output_type="np", **call).frames
    )


def _realism(benchmark: Benchmark, pipe: Any, prompts: int) -> None:
    """Same-seed PSNR of fewer steps and of two known caches against the reference setting."""
    steps = miniature.CALL["num_inference_steps"]
    asked = miniature.captions("held-out")[:prompts]
    cases = [([prompt], 900 + i) for i, prompt in enumerate(asked)]

    def videos(count: int) -> list[np.ndarray]:
        return [_generate(pipe, prompt, seed, count)[0] for prompt, seed in cases]

    reference = videos(steps)

    def add(name: str, run: Callable[[], list[np.ndarray]], target: str = "") -> None:
        pairs = zip(run(), reference, strict=True)
        scores = [metrics()["psnr"].score(video, plain, "") for video, plain in pairs]
        mean, worst = float(np.mean(scores)), float(np.min(scores))
        held = mean <= 32 if target else None
        benchmark.add(Row(f"realism, {name}: mean PSNR", mean, "dB", target, held, n=prompts))
        benchmark.add(Row(f"realism, {name}: worst PSNR", worst, "dB", n=prompts))

    add(f"{steps // 2} steps", lambda: videos(steps // 2), "<= 32 (aim)")
    add(f"{steps // 3} steps", lambda: videos(steps // 3))
    for name, config in (
        ("FirstBlockCache 0.05", FirstBlockCacheConfig(threshold=0.05)),
        ("FirstBlockCache 0.10", FirstBlockCacheConfig(threshold=0.10)),
        ("SeaCache 0.25", SeaCacheConfig(threshold=0.25)),
        ("SeaCache 0.40", SeaCacheConfig(threshold=0.40)),
    ):
        pipe.transformer.enable_cache(config)
        add(name, lambda: videos(steps))
        pipe.transformer.disable_cache()


if __name__ == "__main__":
    main("miniature", measure, __doc__ or "")
