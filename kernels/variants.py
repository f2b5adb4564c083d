"""Which configurations a launch must hold ready for all routings that its tokens may have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ditune.db.errors import UsageFault
from ditune.db.moe import LayerTiles, MoeTuning, RoutingBucket, TileConfig, Tiles
from ditune.kernels.routing_bucket import SKEWS, most_tokens

EVERY_KIND = -1  # all bits set
_EXPONENTS = 16  # as many as `count_tiles` has for each skew


@dataclass(frozen=True)
class Variant:
    """One configuration of a GEMM and the kinds of routing that it is for.

    Args:
        config: Tiles and launch.
        kinds: Bits, see `kind_bit`.
    """

    config: TileConfig
    kinds: int = EVERY_KIND


def kind_bit(bucket: RoutingBucket) -> int:
    """Return the bit of a bucket's kind of routing, whatever its tokens."""
    return 1 << (SKEWS.index(bucket.skew) * _EXPONENTS + bucket.active)


def variants(tuning: MoeTuning, tokens: int, gemm: Literal["up", "down"]) -> tuple[Variant, ...]:
    """Return what must be launched for one GEMM of a layer so that each routing has its tiles.

    Every kind of routing is in exactly one variant. What nobody tuned has the default.

    Args:
        tuning: What was found for the layer.
        tokens: Tokens of the layer, >= 0.
        gemm: Which of the two.

    Raises:
        UsageFault: The tuning is one for a CPU.
    """
    kinds = {_config(tuning.default, gemm): EVERY_KIND}
    default = next(iter(kinds))
    for choice in tuning.choices:
        if choice.bucket.tokens != most_tokens(tokens):
            continue
        bit = kind_bit(choice.bucket)
        config = _config(choice.tiles, gemm)
        kinds[default] &= ~bit
        kinds[config] = kinds.get(config, 0) | bit
    return tuple(Variant(config, bits) for config, bits in kinds.items())


def _config(tiles: Tiles, gemm: Literal["up", "down"]) -> TileConfig:
    """Return the configuration of one GEMM in a layer's tiles."""
    if not isinstance(tiles, LayerTiles):
        raise UsageFault(
            f"this tuning holds tiles for a {tiles.kind} and the layer is on a GPU: tune it there, "
            "or give a tuning with the default LayerTiles"
        )
    return tiles.up if gemm == "up" else tiles.down
