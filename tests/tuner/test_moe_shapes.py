"""Shapes of layers are found from configurations, without any weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.kernels.adapters.models import MODELS, gpt_oss

from ditune.db.errors import UsageFault
from ditune.tuner.moe_shapes import shapes_of


def saved(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


@pytest.mark.parametrize("name", list(MODELS))
def test_the_configuration_of_a_model_tells_its_shapes(name: str, tmp_path: Path) -> None:
    wanted = MODELS[name]
    saved(wanted.build(), tmp_path)
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()
    (shape, count), *others = shapes_of(str(tmp_path), "bfloat16").items()
    assert not others
    assert count == wanted.layers
    assert (shape.experts, shape.inner, shape.top_k) == (wanted.experts, wanted.inner, wanted.top_k)
    assert (shape.hidden, shape.dtype) == (32, "bfloat16")


def test_the_transformer_of_a_pipeline_is_found_in_its_folder(tmp_path: Path) -> None:
    saved(MODELS["hidream"].build(), tmp_path / "transformer")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "config.json").write_text('{"_class_name": "DDIMScheduler"}')
    (tmp_path / "model_index.json").write_text('{"_class_name": "HiDreamImagePipeline"}')
    assert sum(shapes_of(str(tmp_path), "float16").values()) == MODELS["hidream"].layers


def test_a_model_without_layers_that_can_be_tuned_says_why(tmp_path: Path) -> None:
    saved(gpt_oss(), tmp_path)
    with pytest.raises(UsageFault, match=r"has no layers of experts that can be tuned; .*experts"):
        shapes_of(str(tmp_path), "bfloat16")


def test_what_is_no_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"neither": 1}))
    with pytest.raises(UsageFault, match="give --shape"):
        shapes_of(str(tmp_path), "bfloat16")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageFault, match=r"config\.json is not JSON"):
        shapes_of(str(tmp_path), "bfloat16")
    with pytest.raises(UsageFault, match="neither a folder here nor a model"):
        shapes_of("no such/model at all", "bfloat16")
