"""The compressed task map of static batching: one launch whose programs find their own work.

Experts get ragged numbers of rows, so a launch grid cannot say which program computes which tile.
Instead a prefix sum of tiles per expert is built once, and program `pid` finds its expert by
comparing `pid` with the whole prefix: the number of entries <= `pid` is its slot, the largest of
them is where its expert's tiles start. Empty experts are equal neighbours in the prefix and are
stepped over by the same comparison, so they need no list of their own.

Words: a *slot* is a place in the order in which experts are worked off; *rows* are routed tokens,
laid out expert by expert without padding; a *tile* is `block_m` rows by `block_n` columns of an
expert's output. Everything here is int64: rows times columns pass 2^32 in real layers.

Source: arXiv 2501.16103, and the kernel its authors published; the swizzle is the common grouping
of tiles that share columns of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditune.db.errors import UsageFault
from ditune.db.moe import ExpertOrder

ORDERS: tuple[ExpertOrder, ...] = ("id", "desc", "asc", "interleave")
IDLE = -1  # expert of a program beyond the last tile


@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class TaskMap:
    """Where every tile of one grouped GEMM belongs.

    Args:
        counts: Rows of each expert, by expert id, [experts] int64.
        rows: First row of each expert in the packed layout and the total, [experts + 1] int64.
        order: Expert that stands in each slot, [experts] int64, a permutation.
        prefix: Tiles up to and including each slot, [experts] int64, never decreasing.
        n: Columns of an expert's output.
        block_m: Rows of a tile.
        block_n: Columns of a tile.
    """

    counts: Tensor
    rows: Tensor
    order: Tensor
    prefix: Tensor
    n: int
    block_m: int
    block_n: int

    @property
    def total(self) -> int:
        """Tiles of all experts. Synchronizes the device."""
        return int(self.prefix[-1])

    @property
    def tiles_n(self) -> int:
        """Tiles side by side in the output of any expert."""
        return ceil_div(self.n, self.block_n)


@dataclass(frozen=True, eq=False)
class Tiles:
    """The tile of each program, [programs] int64 each; `expert` is `IDLE` beyond the last tile."""

    expert: Tensor
    tile_m: Tensor
    tile_n: Tensor


def ceil_div(value: int, divisor: int) -> int:
    """Return how many pieces of size `divisor` (> 0) cover `value` (>= 0)."""
    return -(-value // divisor)


def expert_order(counts: Tensor, order: ExpertOrder) -> Tensor:
    """Return the expert for each slot, a permutation of 0 .. experts - 1.

    Args:
        counts: Rows of each expert, [experts], any integer dtype.
        order: "id" keeps ids ascending; "desc" and "asc" sort by rows, equal ones by id;
            "interleave" takes turns between the heavier and the lighter half, each from its
            heaviest on, so that tiles bound by compute and by memory run beside each other.

    Returns:
        [experts] int64 on the device of `counts`, without synchronizing it.

    Raises:
        UsageFault: `order` is not one of `ORDERS`.
    """
    if order not in ORDERS:
        raise UsageFault(f"expert order {order!r} is unknown; use one of {', '.join(ORDERS)}")
    experts = counts.numel()
    if order == "id":
        return torch.arange(experts, device=counts.device)
    by_rows = torch.argsort(counts, stable=True, descending=order != "asc")
    if order != "interleave":
        return by_rows
    half = ceil_div(experts, 2)
    turns = torch.arange(experts, device=counts.device)
    return by_rows[turns // 2 + half * (turns % 2)]


def build_task_map(
    counts: Tensor,
    n: int,
    block_m: int,
    block_n: int,
    order: ExpertOrder = "id",
) -> TaskMap:
    """Return the task map of one grouped GEMM.

    Args:
        counts: Rows of each expert, [experts] with experts >= 1, any integer dtype, each >= 0.
        n: Columns of an expert's output, >= 1.
        block_m: Rows of a tile, >= 1.
        block_n: Columns of a tile, >= 1.
        order: In which order experts are worked off, see `expert_order`.

    Returns:
        The map, its tensors on the device of `counts`. Synchronizes the device once, to refuse
        negative counts.

    Raises:
        UsageFault: A size is below 1, or `counts` is no vector of whole numbers >= 0.
    """
    _check_counts(counts)
    for name, value in (("n", n), ("block_m", block_m), ("block_n", block_n)):
        if value < 1:
            raise UsageFault(f"{name} is {value}, but a tile needs at least one row and one column")
    counts = counts.to(torch.int64)
    slots = expert_order(counts, order)
    tiles = (counts[slots] + block_m - 1) // block_m * ceil_div(n, block_n)
    rows = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return TaskMap(counts, rows, slots, tiles.cumsum(0), n, block_m, block_n)


def grid_bound(routed: int, experts: int, n: int, block_m: int, block_n: int) -> int:
    """Return a number of programs that suffices whatever the routing is.

    It depends on shapes alone, so a launch needs no look at the counts and can be captured in a
    graph; programs beyond the real total find no tile and return.

    Args:
        routed: Tokens times experts per token, >= 0.
        experts: Number of experts, >= 1.
        n: Columns of an expert's output, >= 1.
        block_m: Rows of a tile, >= 1.
        block_n: Columns of a tile, >= 1.

    Returns:
        Programs, at least the total of any map over at most `routed` rows: every expert that has
        rows adds less than one tile row to the even split, and at most min(experts, routed) have.
    """
    tiles_m = ceil_div(routed, block_m) + min(experts, routed)
    return tiles_m * ceil_div(n, block_n)


def locate(task_map: TaskMap, pids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the expert of each program and the number of its tile within that expert.

    The comparison with the whole prefix is what a kernel does too, in one load and two reductions.

    Args:
        task_map: The map.
        pids: Program numbers, [programs], any integer dtype, each >= 0.

    Returns:
        (expert, local), [programs] int64 each. Beyond the last tile expert is `IDLE` and local
        counts on from the total.
    """
    done = task_map.prefix <= pids.to(torch.int64)[:, None]
    slot = done.sum(1)
    start = torch.where(done, task_map.prefix, 0).amax(1)
    expert = torch.cat([task_map.order, task_map.order.new_full((1,), IDLE)])[slot]
    return expert, pids - start


def swizzle(local: Tensor, tiles_m: Tensor, tiles_n: int, group_m: int) -> tuple[Tensor, Tensor]:
    """Return the row and the column of each tile in the order that is kind to the L2 cache.

    Tiles go down `group_m` rows of tiles before they move one column on: programs that run at the
    same time then share columns of the weight. Which tile is computed never changes, only when.

    Args:
        local: Number of the tile within its expert, any shape, integer, 0 <= local < m * n tiles.
        tiles_m: Rows of tiles of that expert, broadcast against `local`, >= 1.
        tiles_n: Columns of tiles, >= 1.
        group_m: Rows of tiles that are worked off together, >= 1.

    Returns:
        (tile_m, tile_n), 0 <= tile_m < tiles_m and 0 <= tile_n < tiles_n, shaped like `local`.

    Raises:
        UsageFault: `group_m` is below 1.
    """
    if group_m < 1:
        raise UsageFault(f"group_m is {group_m}, but a group needs at least one row of tiles")
    first = local // (group_m * tiles_n) * group_m
    height = (tiles_m - first).clamp(max=group_m)  # the last group may be lower
    rest = local % (group_m * tiles_n)
    return first + rest % height, rest // height


def assign(task_map: TaskMap, pids: Tensor, group_m: int = 1) -> Tiles:
    """Return the tile that each program computes; `IDLE` programs get tile (0, 0).

    Args:
        task_map: The map.
        pids: Program numbers, [programs], any integer dtype, each >= 0.
        group_m: See `swizzle`.

    Returns:
        Expert, row and column of each program's tile. The first row of a tile in the packed
        layout is `rows[expert] + tile_m * block_m`; it ends at `rows[expert + 1]` at the latest.
    """
    expert, local = locate(task_map, pids)
    busy = expert != IDLE
    tiles_m = (task_map.counts[expert.clamp(min=0)] + task_map.block_m - 1) // task_map.block_m
    tile_m, tile_n = swizzle(
        torch.where(busy, local, 0), tiles_m.clamp(min=1), task_map.tiles_n, group_m
    )
    return Tiles(expert, tile_m, tile_n)


def _check_counts(counts: Tensor) -> None:
    """Refuse counts that are no vector of whole numbers >= 0."""
    whole = not (counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool)
    if counts.ndim != 1 or counts.numel() == 0 or not whole:
        raise UsageFault(
            f"counts must be one whole number per expert, but has shape {tuple(counts.shape)} and "
            f"dtype {counts.dtype}; count the routed indices, for example with torch.bincount"
        )
    if bool((counts < 0).any()):
        raise UsageFault(f"counts holds {int(counts.min())}, but no expert has fewer than 0 rows")
