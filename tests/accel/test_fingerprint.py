from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor, nn

from ditune.accel import fingerprint
from ditune.accel.fingerprint import detect, workload
from ditune.accel.lookup import DATABASE_VARIABLE, default_database, lookup
from ditune.accel.request import declared, observed
from ditune.accel.spans import BlockStack
from ditune.accel.tap import Observation, tapped
from ditune.db.errors import UsageFault

CALL = {
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": 12,
    "guidance_scale": 5.0,
    "prompt_embeds": torch.zeros(1, 6, 32),
}


def test_hardware_and_software_are_stable_keys() -> None:
    hardware, software, none = detect()
    assert none is None
    assert detect()[0].key == hardware.key
    assert software.torch == torch.__version__
    assert hardware.cores >= 1
    assert hardware.memory_bytes % (1 << 30) == 0


def test_what_is_declared_is_what_is_observed(pipe: WanPipeline, generate: object) -> None:
    """The key under which `tune run` stores is the key that `accelerate` looks up."""
    assert callable(generate)
    seen: list[Tensor] = []

    def watch(observation: Observation) -> None:
        seen.append(observation.latents)
        assert observed(pipe, observation.latents, 12) == declared(pipe, CALL)

    with tapped(pipe, watch):
        generate(pipe)
    assert len(seen) == 24


@pytest.mark.parametrize(
    "change",
    [
        {"height": 64},
        {"width": 48},
        {"num_frames": 9},
        {"num_inference_steps": 13},
        {"guidance_scale": 1.0},
        {"num_videos_per_prompt": 2},
    ],
)
def test_every_part_of_a_call_changes_the_key(pipe: WanPipeline, change: dict[str, object]) -> None:
    first = workload(pipe, declared(pipe, CALL))
    assert first.key == workload(pipe, declared(pipe, CALL)).key
    assert first.key != workload(pipe, declared(pipe, CALL | change)).key


def test_sizes_are_rounded_as_the_pipeline_rounds_them(pipe: WanPipeline) -> None:
    assert declared(pipe, CALL | {"num_frames": 7}).frames == 5
    assert declared(pipe, CALL | {"height": 39}).height == 32


def test_models_differ_by_configuration_and_by_weights(pipe: WanPipeline, small: nn.Module) -> None:
    first = detect(pipe, CALL)[2]
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        for parameter in other.transformer.parameters():
            parameter.add_(0.01)
    tuned = detect(other, CALL)[2]
    assert first is not None
    assert tuned is not None
    assert first.model_digest == tuned.model_digest
    assert first.model_revision != tuned.model_revision
    paired = detect(pipe, CALL, small)[2]
    assert paired is not None
    assert paired.small_model_digest not in (None, paired.model_digest)


def test_models_without_repeated_blocks_are_refused() -> None:
    with pytest.raises(UsageFault, match="no list of repeated blocks"):
        BlockStack(nn.Linear(2, 2))


def test_the_database_is_chosen_by_variable_or_lies_with_the_users_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(DATABASE_VARIABLE, str(tmp_path / "mine.db"))
    assert default_database() == tmp_path / "mine.db"
    monkeypatch.delenv(DATABASE_VARIABLE)
    assert default_database().name == "policies.db"


def test_a_lookup_reads_files_only(pipe: WanPipeline, tmp_path: Path) -> None:
    hardware, _, found = detect(pipe, CALL)
    assert found is not None
    match = lookup(hardware, found, db=f"sqlite:///{tmp_path}/none.db")
    assert match.kind == "baseline"
    with pytest.raises(UsageFault, match="sync"):
        lookup(hardware, found, db="postgresql+psycopg://host/db")


def test_nvml_without_a_driver_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert fingerprint._nvml(torch.device("cpu")) == {}
