"""The shapes of the layers of experts of a model, from its configuration alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ditune.db.errors import UsageFault
from ditune.db.moe import Dtype, MoeShape
from ditune.kernels.adapters.layers import FoundLayer, survey

_CONFIGS = ("config.json", "*/config.json")


def shapes_of(model: str, dtype: Dtype) -> dict[MoeShape, int]:
    """Return each shape of layer that a model has, and how many layers have it.

    Weights are neither read nor fetched: the modules are built without memory.

    Args:
        model: A folder with a diffusers pipeline, a part of one, or a transformers model; or a hub
            id, of which only the configurations are fetched.
        dtype: What the layers will run in.

    Raises:
        UsageFault: There is no such model, or it has no layers that the kernels compute; the
            message says why.
    """
    found = Counter[MoeShape]()
    refused: list[str] = []
    for module in _modules(_folder(model)):
        for layer in survey(module):
            if isinstance(layer, FoundLayer):
                found[layer.shape.model_copy(update={"dtype": dtype})] += 1
            else:
                refused.append(f"{layer.name}: {layer.reason}")
    if not found:
        why = f"; {refused[0]}" if refused else ""
        raise UsageFault(
            f"{model} has no layers of experts that can be tuned{why}. Models of transformers with "
            "experts, HiDream and NucleusMoE have; or give --shape EXPERTS,HIDDEN,INNER,TOP_K"
        )
    return dict(found)


def _folder(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(_CONFIGS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UsageFault(
            f"{model} is neither a folder here nor a model that the hub gives out: {error}"
        ) from error


def _modules(folder: Path) -> Iterator[nn.Module]:
    """Yield the models whose configurations lie in a folder, or in the folders in it."""
    for pattern in _CONFIGS:
        for path in sorted(folder.glob(pattern)):
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UsageFault(f"{path} is not JSON: {error}") from error
            module = _built(path, config)
            if module is not None:
                yield module


def _built(path: Path, config: dict[str, Any]) -> nn.Module | None:
    """Return the model of a configuration, without memory; None for what is not a model."""
    import diffusers
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        if name := config.get("_class_name"):
            kind = getattr(diffusers, name, None)
            if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
                return None
            return cast(nn.Module, cast(Any, kind).from_config(config))
        if "model_type" in config:
            found: nn.Module = AutoModel.from_config(AutoConfig.from_pretrained(path.parent))
            return found
    return None
