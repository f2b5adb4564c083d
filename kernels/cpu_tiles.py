"""The whole MoE layer on a CPU: tiles of experts' rows, dealt out to threads with one BLAS each.

A task is one tile of one expert. It gathers its rows, and if it is fused runs both GEMMs and the
gate between them while the rows are in the cache. Which thread computes a tile changes no result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from ditune.db.errors import UsageFault
from ditune.db.moe import CpuTiles, Mapping, MoeTuning
from ditune.kernels.cpu_pool import Pool, pool_of
from ditune.kernels.reference import Experts, check_layer
from ditune.kernels.routing import Routing, route
from ditune.kernels.routing_bucket import routing_bucket
from ditune.kernels.task_map import ceil_div, expert_order

_COMBINED = 256  # tokens whose rows are summed at a time, so that the sums are still in the cache


@dataclass(frozen=True)
class Tile:
    """Rows `begin` to `end` of the packed layout, all of one expert."""

    expert: int
    begin: int
    end: int


def moe_cpu(
    hidden: Tensor, experts: Experts, indices: Tensor, weights: Tensor, tuning: MoeTuning
) -> Tensor:
    """Return the output of a mixture-of-experts layer; see `moe_reference` for what it computes.

    The routing chooses the tiles. Intermediate rows and routing weights are rounded to the dtype
    of `hidden`, sums run in float32. No gradients flow.

    Args:
        hidden: Tokens, [tokens, hidden], on a CPU.
        experts: Packed weights. Hand in the same tensors at every call: copies of prepacked weights
            are kept for them.
        indices: Expert of each slot, [tokens, top_k].
        weights: Routing weight of each slot, [tokens, top_k].
        tuning: Tiles for every kind of routing.

    Raises:
        UsageFault: Arguments do not fit together, are not on a CPU, or the tiles are a GPU's.
    """
    check_layer(hidden, experts, indices, weights)
    routing = route(indices, experts.count)
    counts = routing.counts.tolist()
    tiles = tuning.tiles(routing_bucket(counts, hidden.shape[0]))
    if not isinstance(tiles, CpuTiles):
        raise UsageFault("the tuning holds tiles for a GPU; tune the layer on this CPU")
    return _computed(hidden, experts, routing, weights, tiles, pool_of())


def run_tiles(
    hidden: Tensor,
    experts: Experts,
    indices: Tensor,
    weights: Tensor,
    tiles: CpuTiles,
    pool: Pool,
) -> Tensor:
    """Return what `moe_cpu` returns, computed with given tiles by given threads."""
    check_layer(hidden, experts, indices, weights)
    return _computed(hidden, experts, route(indices, experts.count), weights, tiles, pool)


def cut(counts: list[int], tiles: CpuTiles) -> list[list[Tile]]:
    """Return the tiles of each expert that has rows, experts in the order of `tiles`.

    An expert's tiles are of equal height, give or take a row, and no higher than `tiles.rows`: a
    low rest would run at a fraction of the speed.

    Args:
        counts: Rows of each expert.
        tiles: How rows are cut.
    """
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    found = []
    for expert in expert_order(torch.tensor(counts), tiles.order).tolist():
        count, start = counts[expert], starts[expert]
        pieces = ceil_div(count, tiles.rows)
        edges = [start + count * piece // pieces for piece in range(pieces)] + [start + count]
        if count:
            found.append([Tile(expert, *pair) for pair in zip(edges, edges[1:], strict=False)])
    return found


def deal(tiles: list[list[Tile]], mapping: Mapping, threads: int) -> list[Iterable[Tile]]:
    """Return each thread's tiles.

    Args:
        tiles: Of each expert, see `cut`.
        mapping: See `CpuTiles`; "dynamic" gives all threads one iterator to take from.
        threads: How many.
    """
    flat = [tile for expert in tiles for tile in expert]
    if mapping == "dynamic":
        shared = iter(flat)
        return [shared] * threads
    if mapping == "round_robin":
        return [flat[first::threads] for first in range(threads)]
    shares: list[list[Tile]] = [[] for _ in range(threads)]
    rows = [0] * threads
    for expert in tiles:
        least = rows.index(min(rows))
        shares[least] += expert
        rows[least] += expert[-1].end - expert[0].begin
    return list(shares)


@dataclass(frozen=True, eq=False)
class _Layer:
    """What all threads read, and the rows that they write.

    Args:
        hidden: Tokens, [tokens, hidden].
        up: First weight of each expert, [hidden, 2 * inner].
        down: Second weight of each expert, [inner, hidden].
        tokens: Token of each row.
        rows: Rows of the highest tile.
        outputs: [rows, hidden], written tile by tile.
    """

    hidden: Tensor
    up: tuple[Tensor, ...]
    down: tuple[Tensor, ...]
    tokens: Tensor
    rows: int
    outputs: Tensor

    def fused(self, share: Iterable[Tile]) -> None:
        """Compute tiles from tokens to outputs."""
        gated = self.hidden.new_empty(self.rows, self.down[0].shape[0])
        first = self.first(gated, packed=False)
        for tile in share:
            first(tile)
            self.second(tile, gated[: tile.end - tile.begin])
