"""Where things are in a diffusion transformer, found by structure, not by a list of classes."""

from __future__ import annotations

from typing import Any

from torch import nn

from ditune.db.errors import UsageFault

# How diffusers names the lists that a denoiser runs, in the order in which it runs them. Lists of
# other names (text refiners, control branches, adapters) feed the chain and are no part of it.
CHAINED = (
    "blocks",
    "transformer_blocks",
    "visual_transformer_blocks",
    "temporal_transformer_blocks",
    "single_transformer_blocks",
    "layers",
)


def denoisers(pipe: Any) -> list[nn.Module]:
    """Return the pipeline's denoising transformers, the high-noise expert first.

    Raises:
        UsageFault: The pipeline has none.
    """
    found = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    models = [model for model in found if isinstance(model, nn.Module)]
    if not models:
        raise UsageFault(
            f"{type(pipe).__name__} has no transformer: ditune accelerates diffusion transformers, "
            "pass a pipeline that has one as `transformer`"
        )
    for model in models:
        if hasattr(model, "_orig_mod"):
            raise UsageFault(
                "the transformer was replaced by torch.compile(transformer): ditune decides in the "
                "original's place, so call transformer.compile() or, to compile faster, "
                "transformer.compile_repeated_blocks() instead"
            )
    return models


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of blocks that a denoiser runs one after the other, by name, in that order.

    A model that uses none of diffusers' names is taken to run its longest list of equal blocks.

    Raises:
        UsageFault: There is no such list.
    """
    lists = {
        name: child
        for name, child in model.named_children()
        if isinstance(child, nn.ModuleList) and len(child) > 0
    }
    chained = {name: lists[name] for name in CHAINED if name in lists}
    if chained:
        return chained
    equal = {name: found for name, found in lists.items() if len(set(map(type, found))) == 1}
    if not equal:
        raise UsageFault(
            f"{type(model).__name__} has no list of repeated blocks among its children: "
            "ditune cannot see inside it"
        )
    longest = max(equal, key=lambda name: len(equal[name]))
    return {longest: equal[longest]}
