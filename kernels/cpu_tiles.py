"""The whole MoE layer on a CPU: tiles of experts' rows, dealt out to threads with one BLAS each.

A task is one tile of one expert. It gathers its rows, and if it is fused runs both GEMMs and the
gate between them while the rows are in the cache. Which thread computes a tile changes no result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from ditune.db.errors import UsageFault
from ditune.db.moe import CpuTiles, Mapping, MoeTuning
from ditune.kernels.cpu_pool import Pool, pool_of
from ditune.kernels.cpu_weights import Chain, chains
from ditune.kernels.reference import Experts, check_layer
from ditune.kernels.routing import Routing, route
from ditune.kernels.routing_bucket import routing_bucket
from ditune.kernels.task_map import ceil_div, expert_order

_COMBINED = 256  # tokens whose rows are summed at a time: the sums are still in the cache


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
            found.append([Tile(expert, *pair) for pair in pairwise(edges)])
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
        chains: Products of each expert.
        tokens: Token of each row.
        height: Rows of the highest tile.
        inner: Columns behind the gate.
        outputs: [rows, hidden], written tile by tile.
    """

    hidden: Tensor
    chains: list[Chain]
    tokens: Tensor
    height: int
    inner: int
    outputs: Tensor

    def whole(self, share: Iterable[Tile]) -> None:
        """Compute tiles from tokens to outputs."""
        tokens, gates, ups = self._rooms()
        for tile in share:
            self._second(tile, self._first(tile, tokens, gates, ups))

    def first_half(self, share: Iterable[Tile], gated: Tensor) -> None:
        """Compute tiles from tokens to rows behind the gate, [rows, inner]."""
        tokens, _, ups = self._rooms()
        for tile in share:
            place = gated[tile.begin : tile.end]
            _into(place, self._first(tile, tokens, place, ups))

    def second_half(self, share: Iterable[Tile], gated: Tensor) -> None:
        """Compute tiles from rows behind the gate to outputs."""
        for tile in share:
            self._second(tile, gated[tile.begin : tile.end])

    def _rooms(self) -> list[Tensor]:
        """Return room for the tokens of the highest tile, its gate values and its up values."""
        widths = (self.hidden.shape[1], self.inner, self.inner)
        return [self.hidden.new_empty(self.height, width) for width in widths]

    def _first(self, tile: Tile, tokens: Tensor, gates: Tensor, ups: Tensor) -> Tensor:
        chain, height = self.chains[tile.expert], tile.end - tile.begin
        rows = tokens[:height]
        torch.index_select(self.hidden, 0, self.tokens[tile.begin : tile.end], out=rows)
        gate = functional.silu(chain.gate(rows, gates[:height]), inplace=True)
        return gate.mul_(chain.up(rows, ups[:height]))

    def _second(self, tile: Tile, gated: Tensor) -> None:
        place = self.outputs[tile.begin : tile.end]
        _into(place, self.chains[tile.expert].down(gated, place))


def _into(place: Tensor, found: Tensor) -> None:
    """Copy what a product returned to its place, unless it was computed there."""
    if found.data_ptr() != place.data_ptr():
        place.copy_(found)


@torch.no_grad()
def _computed(
    hidden: Tensor,
    experts: Experts,
    routing: Routing,
    weights: Tensor,
    tiles: CpuTiles,
    pool: Pool,
) -> Tensor:
    """Return the output of a layer whose arguments were looked at."""
    if hidden.device.type != "cpu":
        raise UsageFault(f"tiles for a CPU cannot compute on {hidden.device}; bring the layer here")
    counts = routing.counts.tolist()
    here = sum(counts)
    pieces = cut(counts, tiles)
    layer = _Layer(
        hidden,
        chains(experts, pool, prepacked=tiles.prepacked),
        routing.slots // routing.top_k,
        max((tile.end - tile.begin for expert in pieces for tile in expert), default=0),
        experts.down.shape[2],
        hidden.new_empty(here + 1, hidden.shape[1]),
    )
    layer.outputs[here] = 0.0  # the row of all slots whose experts are elsewhere
    if tiles.fused:
        pool.run(layer.whole, deal(pieces, tiles.mapping, pool.size))
    else:
        gated = hidden.new_empty(here, experts.down.shape[2])
        for half in (layer.first_half, layer.second_half):
            pool.run(partial(half, gated=gated), deal(pieces, tiles.mapping, pool.size))
    return _combined(layer.outputs, routing, weights, pool)


def _combined(outputs: Tensor, routing: Routing, weights: Tensor, pool: Pool) -> Tensor:
    """Return the weighted sum of each token's rows; the last row is zero, for all that are none."""
    none = outputs.shape[0] - 1
    places = routing.places.reshape(-1, routing.top_k)
    scale = weights.to(outputs.dtype)
    if none < places.numel():
        scale = torch.where(places < none, scale, 0.0)  # their weights may be anything
        places = places.clamp(max=none)
    tokens = places.shape[0]
    result = outputs.new_empty(tokens, outputs.shape[1])

    def add_up(share: range) -> None:
        for begin in share:
            part = slice(begin, min(begin + _COMBINED, tokens))
            result[part] = functional.embedding_bag(
                places[part], outputs, mode="sum", per_sample_weights=scale[part]
            )

    blocks = range(0, tokens, _COMBINED)
    pool.run(add_up, [blocks[first :: pool.size] for first in range(pool.size)])
    return result
