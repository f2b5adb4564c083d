"""The whole recipe for a few steps: every stage, resumed and skipped, up to the shipped folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from ditune.miniature import architecture
from ditune.miniature.flow import Schedule
from ditune.miniature.train import STAGES, Recipe, Run, export_stage


def recipe(steps: int = 2) -> Recipe:
    return Recipe(
        text_steps=2,
        pca_clips=40,
        judge_steps=2,
        decoder_steps=2,
        shallow=Schedule(steps=steps, batch=4),
        large=Schedule(steps=1, batch=2),
        young=Schedule(steps=steps, batch=4),
        small=Schedule(steps=steps, batch=4, below=0.5),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    prepared = Run(tmp_path_factory.mktemp("run"), recipe())
    for name, (stage, leaves) in STAGES.items():
        if name != "export":
            assert not prepared.done(leaves)
            stage(prepared)
            assert prepared.done(leaves)
    return prepared


def test_every_stage_leaves_its_result_and_a_log(run: Run) -> None:
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert {"judge", "vae"} <= {line["stage"] for line in lines}
    assert json.loads((run.folder / "recipe.json").read_text())["seed"] == 0


def test_export_writes_a_folder_that_loads(run: Run, tmp_path: Path) -> None:
    export_stage(run, tmp_path)
    large = WanTransformer3DModel.from_pretrained(
        tmp_path / "transformer", torch_dtype=torch.float32
    )
    assert len(large.blocks) == architecture.TRANSFORMERS["large"]["num_layers"]
    stored = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    names = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.safetensors")}
    assert "judge/judge.safetensors" in names
    assert "vae/diffusion_pytorch_model.safetensors" in names


@pytest.mark.slow
def test_two_processes_train_one_model(run: Run) -> None:
    together = Run(run.folder, recipe(), processes=2)
    (together.folder / "small" / "config.json").unlink()
    STAGES["small"][0](together)
    assert together.done("small/config.json")
