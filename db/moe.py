"""How the layers of a mixture of experts are computed: tiles, and which of them for which routing.

A configuration is found for one shape of layer, one bucket of token counts and one kind of routing.
A layer or a routing that nobody tuned has the default, never the nearest neighbour's.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ditune.db.record import Count, Positive, Record, Status

TilePath = Literal["ptr", "tma_weights", "tma"]
ExpertOrder = Literal["id", "desc", "asc", "interleave"]
Mapping = Literal["static", "round_robin", "dynamic"]
Skew = Literal["even", "uneven", "steep"]
Dtype = Literal["float32", "bfloat16", "float16"]


class TileConfig(Record):
    """How one grouped GEMM is tiled and launched on a GPU.

    Args:
        block_m: Rows of a tile, a power of two >= 16.
        block_n: Columns of a tile, a power of two >= 16.
        block_k: Depth of a step, a power of two >= 16.
        num_warps: Warps of a program.
        num_stages: Steps that are loaded ahead.
        group_m: Rows of tiles that are worked off together, see `kernels.task_map.swizzle`.
        path: How the operands are read: by pointers (sm_80 on), weights by TMA descriptors, or both
            operands (sm_90 on).
        persistent: Programs per SM that stay and stride over the tiles; 0 launches one per tile.
        order: In which order experts are worked off.
        low_m: Rows of a tile of experts that have at most so many rows, in the same launch; 0 gives
            every expert tiles of `block_m` rows.
        split_k: Programs that share one tile's depth and add up what they find.
        swap_ab: Whether a tile is computed transposed, so that columns of the weight stand on the
            wide side of the matrix instruction.
    """

    block_m: Positive = 128
    block_n: Positive = 128
    block_k: Positive = 64
    num_warps: Positive = 8
    num_stages: Positive = 3
    group_m: Positive = 8
    path: TilePath = "ptr"
    persistent: Count = 0
    order: ExpertOrder = "id"
    low_m: Count = 0
    split_k: Positive = 1
    swap_ab: bool = False


class LayerTiles(Record):
    """The tiles of a layer's two grouped GEMMs; their shapes differ, and so do their best tiles."""

    kind: Literal["gpu"] = "gpu"
    up: TileConfig = TileConfig()
    down: TileConfig = TileConfig()


def default_tiles(dtype: Dtype) -> LayerTiles:
    """Return what every GPU from sm_80 on can launch: in float32 the usual tiles need too much."""
    config = TileConfig(block_n=64, block_k=32) if dtype == "float32" else TileConfig()
    return LayerTiles(up=config, down=config)


class CpuTiles(Record):
    """How a layer is cut into tasks for a pool of CPU threads, one BLAS thread each.

    Args:
        rows: Rows of an expert that are one task.
        order: In which order experts are worked off.
        mapping: Who takes a task: "static" gives whole experts to threads by their rows,
            "round_robin" deals tasks out in turn, "dynamic" lets a free thread take the next one.
        fused: Whether one task runs both GEMMs while its rows are in the cache; else all of the
            first, then all of the second.
        prepacked: Whether weights are copied once into the layout that the BLAS computes in.
    """

    kind: Literal["cpu"] = "cpu"
    rows: Positive = 256
    order: ExpertOrder = "desc"
    mapping: Mapping = "dynamic"
    fused: bool = True
    prepacked: bool = False


Tiles = Annotated[LayerTiles | CpuTiles, Field(discriminator="kind")]


class MoeShape(Record):
    """What a layer of experts is: number, widths, experts per token, dtype."""

    experts: Positive
    hidden: Positive
    inner: Positive
    top_k: Positive
    dtype: Dtype

    @property
    def words(self) -> str:
        """The shape as words."""
        return (
            f"{self.experts} experts of {self.hidden} to {self.inner}, {self.top_k} per token, "
            f"{self.dtype}"
        )


class RoutingBucket(Record):
    """Routings that are computed alike.

    Args:
        tokens: Most tokens of the bucket, a power of two; the fewest are half of them and one.
        skew: Largest count of an expert over the mean of those that have any: below 2, below 8, or
            more.
        active: Share of the experts that have any rows, rounded up to 1, 1/2, 1/4, 1/8 ...: the
            exponent of the half, 0 for more than half of them.
    """

    tokens: Positive
    skew: Skew
    active: Count

    @model_validator(mode="after")
    def _power_of_two(self) -> Self:
        if self.tokens & (self.tokens - 1):
            raise ValueError(f"a bucket of tokens ends at a power of two, not at {self.tokens}")
        return self


class MoeChoice(Record):
    """What a tuner found for one bucket of routings.

    Args:
        bucket: The routings.
        tiles: What computes them.
        status: Whether that was measured, or predicted and compiled, or predicted alone.
        speedup: Over the default configuration, as far as the status says.
    """

    bucket: RoutingBucket
    tiles: Tiles
    status: Status
    speedup: Annotated[float, Field(gt=0)]


class MoeTuning(Record):
    """All that was found for layers of one shape; a bucket that is not here has the default."""

    shape: MoeShape
    default: Tiles
    choices: tuple[MoeChoice, ...] = ()

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        buckets = [choice.bucket for choice in self.choices]
        if len(set(buckets)) != len(buckets):
            raise ValueError("a bucket of routings has one choice, and here some have two")
        return self

    def tiles(self, bucket: RoutingBucket) -> Tiles:
        """Return what computes a bucket of routings."""
        return next((c.tiles for c in self.choices if c.bucket == bucket), self.default)

    def and_of(self, other: MoeTuning) -> MoeTuning:
        """Return this tuning with another's choices for the buckets that this one lacks."""
        mine = {choice.bucket for choice in self.choices}
        more = tuple(choice for choice in other.choices if choice.bucket not in mine)
        return self.model_copy(update={"choices": self.choices + more})
