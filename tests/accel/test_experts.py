"""`ditune.accelerate_experts`: looked up, attached, reported, removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels.adapters.models import BOUNDS, MODELS, Model, gpt_oss, off
from torch import Tensor, nn

import ditune
from ditune.accel import fingerprint
from ditune.db.errors import UsageFault
from ditune.db.moe import CpuTiles, MoeShape, MoeTuning
from ditune.db.store import Store
from ditune.db.tunings import TunedLayer
from ditune.kernels import dispatch
from ditune.kernels.adapters import layers
from ditune.kernels.digest import kernels_digest

QWEN = MoeShape(experts=8, hidden=32, inner=24, top_k=2, dtype="float32")


@pytest.fixture(params=["qwen", "hidream", "nucleus"])
def tiny(request: pytest.FixtureRequest) -> Model:
    return MODELS[request.param]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "tunings.db"


def keep(database: Path, **changes: object) -> MoeTuning:
    """Store a tuning of the Qwen model's layers as if it had been found here."""
    tuning = MoeTuning(shape=QWEN, default=CpuTiles(rows=48))
    parts: dict[str, object] = {
        "hardware": fingerprint.hardware(torch.device("cpu")),
        "software": fingerprint.software(),
        "kernels": kernels_digest(),
        "tuning": tuning,
        "created_at": "2026-01-02T03:04:05Z",
    }
    with Store.open(str(database)) as store:
        store.moe.save(TunedLayer.model_validate(parts | changes))
    return tuning


def test_a_model_runs_on_the_kernels_until_they_are_removed(tiny: Model) -> None:
    model = tiny.build()
    with torch.no_grad():
        wanted = tiny.call(model)
        with ditune.accelerate_experts(model) as applied:
            assert off(tiny.call(model), wanted) <= BOUNDS[torch.float32]
        assert torch.equal(tiny.call(model), wanted)
    outcomes = applied.summary().layers
    assert [layer.attached for layer in outcomes] == [True] * tiny.layers
    assert not any(layer.tuned for layer in outcomes)
    applied.remove()  # a second time does nothing
    ditune.accelerate_experts(model).remove()


def test_a_stored_tuning_is_found_and_run(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning = keep(database)
    seen: list[MoeTuning | None] = []
    original = dispatch.moe

    def moe(*given: Any) -> object:
        seen.append(given[-1])
        return original(*given)

    monkeypatch.setattr(dispatch, "moe", moe)
    model = MODELS["qwen"].build()
    for place in (database, f"sqlite:///{database}"):
        with ditune.accelerate_experts(model, db=place) as applied, torch.no_grad():
            MODELS["qwen"].call(model)
        assert seen == [tuning] * 4  # a trial and a call of each of two layers
        assert "2 of 2 layers" in str(applied.summary())
        assert "2 with tuned tiles" in str(applied.summary())
        seen.clear()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kernels": "sha256:" + "0" * 64}, "it was tuned with other kernels"),
        (
            {"tuning": MoeTuning(shape=QWEN.model_copy(update={"inner": 8}), default=CpuTiles())},
            "no layer of this shape was tuned on this hardware",
        ),
    ],
)
def test_a_tuning_that_does_not_hold_leaves_the_defaults(
    database: Path, changes: dict[str, object], reason: str
) -> None:
    keep(database, **changes)
    with ditune.accelerate_experts(MODELS["qwen"].build(), db=database) as applied:
        assert {layer.reason for layer in applied.summary().layers} == {reason}


def test_without_a_database_the_reason_names_it(database: Path) -> None:
    with ditune.accelerate_experts(MODELS["qwen"].build(), db=database) as applied:
        assert f"nothing was tuned yet: {database} does not exist" in str(applied.summary())


def test_a_damaged_database_or_a_server_does_not_stop_a_model(database: Path) -> None:
    database.write_bytes(b"this is no database" * 100)
    for place, reason in ((database, "is damaged"), ("postgresql://host/x", "reads SQLite files")):
        with ditune.accelerate_experts(MODELS["qwen"].build(), db=place) as applied:
            outcomes = applied.summary().layers
            assert all(layer.attached and reason in layer.reason for layer in outcomes)


def test_the_summary_says_it_in_plain_words() -> None:
    applied = ditune.accelerate_experts(MODELS["hidream"].build(), db="none.db")
    assert str(applied.summary()) == (
        "ditune: 2 of 2 layers of experts run on its kernels, 0 with tuned tiles; 0.8 MiB of "
        "weights laid anew\n"
        "  2 x HiDream experts, 4 experts of 32 to 256, 2 per token, float32: default tiles: "
        "nothing was tuned yet: none.db does not exist; 0.4 MiB laid anew in place"
    )


def test_layers_that_are_refused_are_reported() -> None:
    with ditune.accelerate_experts(gpt_oss()) as applied:
        assert "0 of 2 layers" in str(applied.summary())
        assert "2 x transformers experts: left as it is: its experts have biases" in str(
            applied.summary()
        )


def test_layers_that_differ_are_left_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = MODELS["qwen"]
    model: Any = tiny.build()
    with torch.no_grad():
        wanted = tiny.call(model)
        original = dispatch.moe
        first = model.model.layers[0].mlp.experts.gate_up_proj.data_ptr()

        def moe(hidden: Tensor, *given: Any) -> Tensor:
            wrong = given[0].gate_up.data_ptr() == first
            return original(hidden, *given) * (1.1 if wrong else 1.0)

        monkeypatch.setattr(dispatch, "moe", moe)
        with ditune.accelerate_experts(model) as applied:
            assert off(tiny.call(model), wanted) <= BOUNDS[torch.float32]
    left, attached = applied.summary().layers
    assert (left.attached, attached.attached) == (False, True)
    assert "off by 1.0e-01" in left.reason


def test_what_cannot_be_attached_to_is_refused() -> None:
    with pytest.raises(UsageFault, match="Linear has no layers of experts that ditune knows"):
        ditune.accelerate_experts(nn.Linear(2, 2))
    model = MODELS["nucleus"].build()
    with (
        ditune.accelerate_experts(model),
        pytest.raises(UsageFault, match=r"already run on ditune's kernels: call \.remove"),
    ):
        ditune.accelerate_experts(model)
    moving: Any = MODELS["hidream"].build()
    moving.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level", low_cpu_mem_usage=False
    )
    with pytest.raises(UsageFault, match="moved in groups"):
        ditune.accelerate_experts(moving)


def test_an_interruption_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["qwen"].build()
    taken: list[object] = []
    original = layers.attach

    def attach(*given: Any) -> int:
        if taken:
            raise KeyboardInterrupt
        taken.append(given)
        return original(*given)

    monkeypatch.setattr(layers, "attach", attach)
    with pytest.raises(KeyboardInterrupt):
        ditune.accelerate_experts(model)
    monkeypatch.undo()
    assert not any(layers.is_attached(module) for module in model.modules())


def test_the_models_config_says_what_it_said() -> None:
    model: Any = MODELS["qwen"].build()
    before = model.config.to_json_string(), model.config._experts_implementation
    with ditune.accelerate_experts(model):
        assert (model.config.to_json_string(), model.config._experts_implementation) == before
