"""CLIP-score with a real, tiny CLIP of random weights: it works, and says what it misses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizerFast,
)

from ditune.db.errors import UsageFault
from ditune.tuner.clip_score import FOLDER_VARIABLE, ClipScore
from ditune.tuner.quality import counts, metrics, needs_reference, parse_constraints, prepare

TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Save a CLIP whose tokenizer knows letters."""
    torch.manual_seed(0)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{each}</w>" for each in letters)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = CLIPTokenizerFast(vocab=vocabulary, merges=[], model_max_length=16)
    config = CLIPConfig(
        text_config={
            **TEXT,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 16,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
        vision_config={**TEXT, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(tmp_path)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(tmp_path)
    return tmp_path


def test_a_local_clip_scores_frames_against_their_prompt(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    metric = ClipScore()
    video = np.random.default_rng(0).random((13, 40, 48, 3), dtype=np.float32)
    scores = [metric.score(video, None, prompt) for prompt in ("a red ball", "two green cats")]
    assert all(0.0 <= score <= 1.0 for score in scores)
    assert scores[0] != scores[1]
    assert scores[0] == metric.score(video, None, "a red ball")
    still = np.repeat(video[:1], 13, axis=0)
    assert metric.score(still, None, "a red ball") == pytest.approx(
        metric.score(still[:1], None, "a red ball"), abs=1e-6
    )


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "clip"}'])
def test_without_a_usable_folder_it_says_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    if content is not None:
        (tmp_path / "config.json").write_text(content)
        monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(UsageFault, match="CLIP model"):
        ClipScore().score(np.zeros((1, 32, 32, 3), dtype=np.float32), None, "a")
    with pytest.raises(UsageFault, match="CLIP model"):
        prepare(parse_constraints("psnr>=30,clip>=-0.01"))


def test_it_is_a_metric_like_others() -> None:
    assert isinstance(metrics()["clip"], ClipScore)
    (floor,) = parse_constraints("clip>=-0.01")
    assert not needs_reference([floor])
    assert not counts(floor)
