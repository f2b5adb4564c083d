"""Whether a small model can take over from a large one: configurations compared, no weights read.

Two models pair if they denoise the same latents under the same conditions. The solver and its
steps are the large pipeline's; of the small one's scheduler only what it was trained on counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditune.db.errors import UsageFault

Config = Mapping[str, Any]
_FILES = ("config.json", "scheduler_config.json")
# What has to agree, by part: what a model is given and gives. A name that neither has does not
# count; widths of attention over it (added_kv_proj_dim, cross_attention_dim) are a model's own.
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "transformer": (
        *("_class_name", "in_channels", "out_channels", "patch_size", "patch_size_t"),
        *("text_dim", "text_embed_dim", "caption_channels"),
        *("joint_attention_dim", "pooled_projection_dim", "image_dim"),
        *("vace_in_channels", "guidance_embeds", "use_rotary_positional_embeddings"),
    ),
    "vae": (
        *("_class_name", "latent_channels", "z_dim", "latents_mean", "latents_std"),
        *("scaling_factor", "shift_factor", "temporal_compression_ratio"),
        *("scale_factor_temporal", "scale_factor_spatial", "spatial_compression_ratio"),
        *("temperal_downsample", "patch_size"),
    ),
    "scheduler": (
        *("prediction_type", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule"),
        *("snr_shift_scale", "rescale_betas_zero_snr"),
    ),
}
# What is converted at every forward where both models predict velocities and come with schedules.
_CONVERTIBLE = frozenset(
    {
        "transformer.use_rotary_positional_embeddings",
        "vae.scaling_factor",
        *(f"scheduler.{name}" for name in ("beta_start", "beta_end", "beta_schedule")),
        *("scheduler.snr_shift_scale", "scheduler.rescale_betas_zero_snr"),
    }
)
_CONVERTED_CLASS = "CogVideoXTransformer3DModel"
_FLOW, _VELOCITY = "flow_prediction", "v_prediction"
_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Difference:
    """One thing that two pipelines do not agree in."""

    field: str  # part and name, "vae.scaling_factor"
    large: Any
    small: Any

    def __str__(self) -> str:
        """Say it in a few words."""
        return f"{self.field}: {_short(self.large)} against {_short(self.small)}"


def differences(large: Mapping[str, Config], small: Mapping[str, Config]) -> list[Difference]:
    """Return what keeps a small model from taking over; empty if nothing does.

    Args:
        large: Configurations by part: "transformer", and "vae" and "scheduler" where known.
        small: Likewise; parts that only one of them has are not compared.
    """
    found = _differences(large, small)
    converts = _converts(large, small)
    return [each for each in found if not (converts and each.field in _CONVERTIBLE)]


def unknown(large: Mapping[str, Config], small: Mapping[str, Config]) -> list[str]:
    """Return the parts that cannot be compared, because one of the two does not have them."""
    return [part for part in _FIELDS if part not in large or part not in small]


def converted(large: Mapping[str, Config], small: Mapping[str, Config]) -> list[Difference]:
    """Return in what two models differ that pair nevertheless: every forward is converted."""
    if not _converts(large, small):
        return []
    return [each for each in _differences(large, small) if each.field in _CONVERTIBLE]


def _converts(large: Mapping[str, Config], small: Mapping[str, Config]) -> bool:
    """Whether forwards can be converted: velocities of one kind of model, and all is known."""
    if not set(_FIELDS) <= set(large) & set(small):
        return False
    return all(
        each["transformer"].get("_class_name") == _CONVERTED_CLASS
        and each["scheduler"].get("prediction_type") == _VELOCITY
        and each["transformer"].get("out_channels")
        in (None, each["transformer"].get("in_channels"))
        for each in (large, small)
    )


def _differences(large: Mapping[str, Config], small: Mapping[str, Config]) -> list[Difference]:
    found = []
    for part, names in _FIELDS.items():
        if part not in large or part not in small:
            continue
        one, other = _settled(part, large[part]), _settled(part, small[part])
        for name in names:
            if _plain(one.get(name)) != _plain(other.get(name)):
                found.append(Difference(f"{part}.{name}", one.get(name), other.get(name)))
    sizes = _size(large["transformer"]), _size(small["transformer"])
    if all(sizes) and sizes[1] >= sizes[0]:
        found.append(Difference("transformer size (layers x width^2)", *sizes))
    return found


def require_pair(
    large: Mapping[str, Config], small: Mapping[str, Config], names: tuple[str, str]
) -> None:
    """Refuse two models that do not pair.

    Raises:
        UsageFault: Each field in which they differ is named.
    """
    found = differences(large, small)
    if not found:
        return
    advice = "give the small model of the same family"
    if all(each.field.startswith("transformer size") for each in found):
        advice = "are they swapped?"
    elif all(each.field in _CONVERTIBLE for each in found):
        advice = (
            "give its whole pipeline: only that knows its schedule and the scale of its latents"
        )
    listed = "; ".join(map(str, found))
    raise UsageFault(f"{names[1]} cannot take over from {names[0]}: {listed} ({advice})")


def configs_in(folder: Path) -> dict[str, Config]:
    """Return the configurations of a saved pipeline, without loading anything else.

    Raises:
        UsageFault: The folder holds no pipeline with a transformer, or a file cannot be read.
    """
    found: dict[str, Config] = {}
    for part in _FIELDS:
        path = next((folder / part / f for f in _FILES if (folder / part / f).is_file()), None)
        if path is None:
            continue
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as fault:
            raise UsageFault(f"cannot read the configuration {path}: {fault}") from fault
        if not isinstance(read, dict):
            raise UsageFault(f"the configuration {path} is no JSON object: save the pipeline anew")
        found[part] = read
    if "transformer" not in found:
        raise UsageFault(
            f"{folder} has no transformer/config.json: give a folder that "
            "pipe.save_pretrained(...) wrote"
        )
    return found


def configs_of(pipe: Any) -> dict[str, Config]:
    """Return the configurations of a live pipeline, or of a transformer alone."""
    parts = {"transformer": pipe}
    if hasattr(pipe, "transformer"):
        parts = {part: getattr(pipe, part, None) for part in _FIELDS}
    return {
        part: {"_class_name": type(each).__name__, **each.config}
        for part, each in parts.items()
        if each is not None
    }


def _settled(part: str, config: Config) -> Config:
    """Return a configuration in which unlike spellings of one thing are alike.

    Flow matching is the same for all its schedulers: betas and training steps play no part in it.
    """
    if part != "scheduler":
        return config
    flow = "FlowMatch" in str(config.get("_class_name")) or config.get("use_flow_sigmas")
    if flow or config.get("prediction_type") == _FLOW:
        return {"prediction_type": _FLOW}
    return config


def _plain(value: Any) -> Any:
    """Return a value as JSON would give it back, numbers without float noise."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return round(value, 6) if isinstance(value, float) else value


def _size(config: Config) -> int:
    """Return layers x width^2, which grows with the cost of a forward; 0 where it is not told."""
    layers = int(config.get("num_layers") or 0) + int(config.get("num_single_layers") or 0)
    heads, each = config.get("num_attention_heads"), config.get("attention_head_dim")
    width = int(heads) * int(each) if isinstance(heads, int) and isinstance(each, int) else 0
    return layers * (width or int(config.get("hidden_size") or 0)) ** 2


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
