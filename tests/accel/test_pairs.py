"""Which models pair: the families' real sizes as configurations, and folders on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import wan_pipeline, wan_transformer

from ditune.accel.pairs import (
    configs_in,
    configs_of,
    converted,
    differences,
    require_pair,
)
from ditune.db.errors import UsageFault

Configs = dict[str, dict[str, Any]]


def wan(heads: int, layers: int, **changes: Any) -> Configs:
    transformer = {
        "_class_name": "WanTransformer3DModel",
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": [1, 2, 2],
        "text_dim": 4096,
        "image_dim": None,
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "num_layers": layers,
    }
    vae = {"_class_name": "AutoencoderKLWan", "z_dim": 16, "latents_mean": [0.1] * 16}
    scheduler = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}
    return {"transformer": transformer | changes, "vae": vae, "scheduler": scheduler}


def cog(layers: int, scaling: float, shift: float, rotary: bool) -> Configs:
    return {
        "transformer": {
            "_class_name": "CogVideoXTransformer3DModel",
            "in_channels": 16,
            "num_attention_heads": 48 if rotary else 30,
            "attention_head_dim": 64,
            "num_layers": layers,
            "use_rotary_positional_embeddings": rotary,
        },
        "vae": {"_class_name": "AutoencoderKLCogVideoX", "scaling_factor": scaling},
        "scheduler": {
            "_class_name": "CogVideoXDDIMScheduler",
            "prediction_type": "v_prediction",
            "snr_shift_scale": shift,
        },
    }


LARGE, SMALL = wan(40, 40), wan(12, 30)


def test_a_family_pairs_whatever_its_schedulers_are_called() -> None:
    other = dict(SMALL, scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 8.0})
    assert not differences(LARGE, SMALL)
    assert not differences(LARGE, other)
    assert not differences(LARGE, {"transformer": SMALL["transformer"]})


def family(heads: int, layers: int, **fields: Any) -> Configs:
    """Return a transformer's configuration as the published sizes have it."""
    sizes = {"num_attention_heads": heads, "attention_head_dim": 128, "num_layers": layers}
    return {"transformer": {**sizes, **fields}}


SKYREELS = {
    "_class_name": "SkyReelsV2Transformer3DModel",
    "text_dim": 4096,
    "patch_size": [1, 2, 2],
}
COSMOS = {"_class_name": "CosmosTransformer3DModel", "text_embed_dim": 1024, "out_channels": 16}
VACE = {"_class_name": "WanVACETransformer3DModel", "in_channels": 16, "vace_in_channels": 96}
LTX = {"_class_name": "LTXVideoTransformer3DModel", "in_channels": 128, "caption_channels": 4096}


@pytest.mark.parametrize(
    ("large", "small"),
    [
        (
            family(40, 40, **VACE, vace_layers=list(range(0, 40, 5))),
            family(12, 30, **VACE, vace_layers=list(range(0, 30, 2))),
        ),
        (family(40, 40, **SKYREELS, in_channels=16), family(12, 30, **SKYREELS, in_channels=16)),
        (
            family(40, 40, **SKYREELS, in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
            family(12, 30, **SKYREELS, in_channels=36, image_dim=1280, added_kv_proj_dim=1536),
        ),
        (
            family(40, 36, **COSMOS, in_channels=17, rope_scale=[0.8333, 2.0, 2.0]),
            family(16, 28, **COSMOS, in_channels=17, rope_scale=[1.0, 3.0, 3.0]),
        ),
        (
            family(32, 48, **LTX, cross_attention_dim=4096),
            family(32, 28, **LTX, cross_attention_dim=2048),
        ),
    ],
    ids=["Wan VACE", "SkyReels DF", "SkyReels I2V", "Cosmos Predict 2", "LTX"],
)
def test_published_families_pair_one_way_round(large: Configs, small: Configs) -> None:
    assert not differences(large, small)
    assert [each.field for each in differences(small, large)] == [
        "transformer size (layers x width^2)"
    ]


def test_image_to_video_does_not_pair_with_text_to_video() -> None:
    large = family(40, 36, **COSMOS, in_channels=17)
    found = differences(large, family(16, 28, **COSMOS, in_channels=16))
    assert [each.field for each in found] == ["transformer.in_channels"]


@pytest.mark.parametrize(
    ("small", "named"),
    [
        (wan(24, 30, in_channels=48, out_channels=48), {"in_channels", "out_channels"}),
        (wan(12, 30, in_channels=36, image_dim=1280), {"in_channels", "image_dim"}),
        (wan(12, 30, patch_size=[1, 1, 1]), {"patch_size"}),
        (dict(SMALL, vae=SMALL["vae"] | {"latents_mean": [0.2] * 16}), {"latents_mean"}),
        (dict(SMALL, scheduler={"prediction_type": "epsilon"}), {"prediction_type"}),
        (cog(30, 1.15258426, 3.0, rotary=False), {"_class_name", "scaling_factor"}),
    ],
    ids=["channels", "image to video", "patch", "latent space", "prediction", "family"],
)
def test_each_field_that_differs_is_named(small: Configs, named: set[str]) -> None:
    found = {each.field.split(".")[1] for each in differences(LARGE, small)}
    assert named <= found
    with pytest.raises(UsageFault, match="cannot take over") as fault:
        require_pair(LARGE, small, ("large", "small"))
    assert all(name in str(fault.value) for name in named)


def test_the_two_cogvideox_pair_by_conversion() -> None:
    large, small = cog(42, 0.7, 1.0, rotary=True), cog(30, 1.15258426, 3.0, rotary=False)
    fields = {
        "transformer.use_rotary_positional_embeddings",
        "vae.scaling_factor",
        "scheduler.snr_shift_scale",
    }
    assert not differences(large, small)
    assert {each.field for each in converted(large, small)} == fields
    bare = {"transformer": small["transformer"]}
    assert not converted(large, bare)
    with pytest.raises(UsageFault, match="give its whole pipeline"):
        require_pair(large, bare, ("5B", "2B"))


def test_swapped_models_are_told_so() -> None:
    with pytest.raises(UsageFault, match=r"are they swapped\?"):
        require_pair(SMALL, LARGE, ("small", "large"))
    with pytest.raises(UsageFault, match=r"are they swapped\?"):
        require_pair(LARGE, LARGE, ("one", "the same"))


def test_live_models_and_folders_say_the_same(tmp_path: Path) -> None:
    pipe = wan_pipeline()
    for name in ("transformer", "scheduler"):
        getattr(pipe, name).save_pretrained(tmp_path / name)
    small = configs_of(wan_transformer(layers=2))
    assert not differences(configs_of(pipe), small)
    assert not differences(configs_in(tmp_path), small)
    assert differences(configs_in(tmp_path), configs_of(pipe))  # a model is not smaller than itself


@pytest.mark.parametrize(("text", "says"), [("[1]", "no JSON object"), ("{", "cannot read")])
def test_damaged_configurations_are_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageFault, match=r"transformer/config\.json"):
        configs_in(tmp_path)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(text)
    with pytest.raises(UsageFault, match=says):
        configs_in(tmp_path)


def test_long_values_are_cut_in_messages() -> None:
    small = dict(SMALL, vae=SMALL["vae"] | {"latents_mean": [0.2] * 400})
    (found,) = differences(LARGE, small)
    assert len(str(found)) < 200
    assert json.dumps(found.small)[:20] in str(found)
