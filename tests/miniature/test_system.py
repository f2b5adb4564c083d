"""The shipped weights: they load offline, generate what is asked, and are what the card says."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from ditune import miniature
from ditune.db.errors import UsageFault
from ditune.miniature.architecture import Z_DIM
from ditune.miniature.classifier import JudgeMetric, hits, trained_judge
from ditune.miniature.clips import FRAMES, SIZE, render
from ditune.miniature.language import subjects
from ditune.miniature.system import CALL, WEIGHTS, MiniatureSource

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source() -> MiniatureSource:
    return MiniatureSource()


def test_it_is_a_wan_pipeline_that_generates_frames(source: MiniatureSource) -> None:
    assert isinstance(source.pipe, WanPipeline)
    call = source.call | {"num_inference_steps": 2}
    first, second = (
        source.pipe(
            prompt=source.calibration[0],
            generator=torch.Generator().manual_seed(0),
            output_type="np",
            **call,
        ).frames
        for _ in range(2)
    )
    assert first.shape == (1, FRAMES, SIZE, SIZE, 3)
    assert np.array_equal(first, second)
    assert np.isfinite(first).all()


def test_generated_clips_show_what_was_asked(source: MiniatureSource) -> None:
    prompts = list(source.held_out[:6])
    call = source.call | {"num_inference_steps": 20}
    frames = source.pipe(
        prompt=prompts, generator=torch.Generator().manual_seed(1), output_type="np", **call
    ).frames
    found = miniature.judge(list(frames), prompts)
    assert {"digit", "colour", "motion"} == set(found)
    assert found["colour"] == 1.0
    assert found["motion"] >= 5 / 6


def test_the_judge_is_right_about_renders_and_says_so_when_asked_wrongly() -> None:
    clips = render(60, torch.Generator().manual_seed(3), held_out=True)
    shown = [np.asarray(((c + 1) / 2).movedim(0, -1)) for c in clips.frames]
    captions = [
        next(s for s in subjects() if (s.digit, s.colour, s.motion) == tuple(map(int, key))).caption
        for key in zip(clips.digit, clips.colour, clips.motion, strict=True)
    ]
    right = hits(trained_judge(), shown, captions).mean(axis=0)
    assert (right >= (0.9, 0.98, 0.98)).all()
    wrong = hits(trained_judge(), shown[:10], ["a red 3 moving left"] * 10)
    assert not wrong.all(axis=1).any() or captions[0] == "a red 3 moving left"
    assert JudgeMetric().score(shown[0], None, captions[0]) == 1.0


def test_the_codec_reconstructs_and_its_encoder_is_the_pca(source: MiniatureSource) -> None:
    frames = render(8, torch.Generator().manual_seed(4), held_out=True).frames
    with torch.no_grad():
        latents = source.pipe.vae.encode(frames).latent_dist.mode()
        decoded = source.pipe.vae.decode(latents).sample
    psnr = -10 * torch.log10((decoded - frames).square().flatten(1).mean(1) / 4)
    assert float(psnr.mean()) >= 26.0
    std = torch.tensor(source.pipe.vae.config.latents_std).view(1, -1, 1, 1, 1)
    assert 0.5 < float((latents / std).std()) < 2.0
    assert latents.shape[1] == Z_DIM


def test_large_and_small_share_everything_but_the_transformer() -> None:
    large, small = miniature.load("large"), miniature.load("small")
    assert large.scheduler.config == small.scheduler.config
    assert large.transformer.config.in_channels == small.transformer.config.in_channels
    assert large.transformer.num_parameters() > 5 * small.transformer.num_parameters()


def test_unknown_sizes_are_refused() -> None:
    with pytest.raises(UsageFault, match="large"):
        miniature.load("huge")  # type: ignore[arg-type]


def test_the_reference_setting_is_pinned() -> None:
    assert (CALL["num_inference_steps"], CALL["guidance_scale"]) == (50, 6.0)
    assert CALL["max_sequence_length"] == 8


def test_the_weights_are_small_and_are_those_of_the_model_card() -> None:
    files = sorted(path for path in WEIGHTS.rglob("*") if path.is_file())
    assert sum(path.stat().st_size for path in files) <= 30_000_000
    card = (ROOT / "docs" / "model-card.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"\| `([^`]+)` \| `([0-9a-f]{64})` \|", card))
    found = {
        str(path.relative_to(WEIGHTS)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    assert found == listed
