"""The task map: every tile is computed once, whatever the routing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditune.db.errors import UsageFault
from ditune.db.moe import ExpertOrder
from ditune.kernels.task_map import (
    IDLE,
    ORDERS,
    TaskMap,
    assign,
    build_task_map,
    expert_order,
    grid_bound,
    locate,
    swizzle,
)

COUNTS = st.lists(st.one_of(st.just(0), st.integers(0, 300)), min_size=1, max_size=20)
ORDER = st.sampled_from(ORDERS)


def published() -> TaskMap:
    """The vector of the kernel notes: empty experts in front and between, one with one row."""
    return build_task_map(torch.tensor([0, 5, 0, 130, 1]), n=256, block_m=64, block_n=128)


def expected_tiles(task_map: TaskMap) -> list[tuple[int, int, int]]:
    """Every (expert, tile_m, tile_n) that must be computed, by plain loops."""
    return [
        (expert, tile_m, tile_n)
        for expert, rows in enumerate(task_map.counts.tolist())
        for tile_m in range(-(-rows // task_map.block_m))
        for tile_n in range(-(-task_map.n // task_map.block_n))
    ]


def test_published_vector_prefix() -> None:
    task_map = published()
    assert task_map.prefix.tolist() == [0, 2, 2, 8, 10]
    assert task_map.rows.tolist() == [0, 0, 5, 5, 135, 136]
    assert (task_map.total, task_map.tiles_n) == (10, 2)


def test_published_vector_programs() -> None:
    expert, local = locate(published(), torch.arange(12, dtype=torch.int32))
    assert expert.tolist() == [1, 1, 3, 3, 3, 3, 3, 3, 4, 4, IDLE, IDLE]
    assert local.tolist() == [0, 1, 0, 1, 2, 3, 4, 5, 0, 1, 0, 1]
    assert local.dtype == torch.int64


@given(COUNTS, ORDER, st.integers(1, 70), st.integers(1, 9), st.integers(1, 20))
def test_every_tile_is_assigned_once(
    counts: list[int], order: ExpertOrder, block_m: int, tiles_n: int, group_m: int
) -> None:
    task_map = build_task_map(torch.tensor(counts), tiles_n * 16 - 3, block_m, 16, order)
    bound = grid_bound(sum(counts), len(counts), task_map.n, block_m, 16)
    tiles = assign(task_map, torch.arange(bound), group_m)
    found = list(
        zip(tiles.expert.tolist(), tiles.tile_m.tolist(), tiles.tile_n.tolist(), strict=True)
    )
    assert expected_tiles(task_map) == sorted(found[: task_map.total])
    assert all(tile == (IDLE, 0, 0) for tile in found[task_map.total :])


@given(COUNTS, ORDER, st.integers(1, 70))
def test_location_equals_binary_search(counts: list[int], order: ExpertOrder, block_m: int) -> None:
    task_map = build_task_map(torch.tensor(counts), 32, block_m, 16, order)
    pids = torch.arange(task_map.total)
    slots = torch.searchsorted(task_map.prefix, pids, right=True)
    expert, _ = locate(task_map, pids)
    assert torch.equal(task_map.order[slots], expert)


@given(COUNTS, st.integers(0, 500), st.integers(1, 130), st.integers(1, 300), st.integers(1, 130))
def test_grid_bound_is_never_below_the_total(
    counts: list[int], elsewhere: int, block_m: int, n: int, block_n: int
) -> None:
    task_map = build_task_map(torch.tensor(counts), n, block_m, block_n)
    routed = sum(counts) + elsewhere  # some rows may go to experts on other devices
    assert task_map.total <= grid_bound(routed, len(counts), n, block_m, block_n)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 50))
def test_swizzle_is_a_bijection(tiles_m: int, tiles_n: int, group_m: int) -> None:
    local = torch.arange(tiles_m * tiles_n)
    rows, columns = swizzle(local, torch.tensor(tiles_m), tiles_n, group_m)
    everything = [(m, n) for m in range(tiles_m) for n in range(tiles_n)]
    assert everything == sorted(zip(rows.tolist(), columns.tolist(), strict=True))


def test_swizzle_goes_down_a_group_before_it_moves_right() -> None:
    rows, columns = swizzle(torch.arange(6), torch.tensor(3), 2, 2)
    assert rows.tolist() == [0, 1, 0, 1, 2, 2]
    assert columns.tolist() == [0, 0, 1, 1, 0, 1]


@given(COUNTS, ORDER)
def test_order_is_a_permutation(counts: list[int], order: ExpertOrder) -> None:
    slots = expert_order(torch.tensor(counts), order).tolist()
    assert list(range(len(counts))) == sorted(slots)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("id", [0, 1, 2, 3, 4]),
        ("desc", [3, 1, 0, 4, 2]),
        ("asc", [2, 0, 4, 1, 3]),
        ("interleave", [3, 4, 1, 2, 0]),
    ],
)
def test_orders(order: ExpertOrder, expected: list[int]) -> None:
    assert expected == expert_order(torch.tensor([4, 7, 0, 9, 4]), order).tolist()


def test_total_beyond_32_bits() -> None:
    rows = 2**40 + 1
    task_map = build_task_map(torch.tensor([rows, 0, rows]), 2**12, 16, 128)
    last = torch.tensor([task_map.total - 1])
    assert task_map.total == 2 * (2**36 + 1) * 32
    tiles = assign(task_map, last, 8)
    assert (int(tiles.expert), int(tiles.tile_m), int(tiles.tile_n)) == (2, 2**36, 31)
    assert task_map.total <= grid_bound(2 * rows, 3, 2**12, 16, 128)


def test_no_rows_at_all() -> None:
    task_map = build_task_map(torch.zeros(3, dtype=torch.int32), 256, 64, 128)
    assert task_map.total == 0 == grid_bound(0, 3, 256, 64, 128)
    assert assign(task_map, torch.arange(2)).expert.tolist() == [IDLE, IDLE]


@pytest.mark.parametrize(
    "counts",
    [
        torch.tensor([1, -2]),
        torch.tensor([[1, 2]]),
        torch.tensor([1.0]),
        torch.tensor([True]),
        torch.zeros(0, dtype=torch.int64),
    ],
)
def test_bad_counts_are_refused(counts: torch.Tensor) -> None:
    with pytest.raises(UsageFault, match="counts"):
        build_task_map(counts, 256, 64, 128)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(UsageFault, match="block_m is 0"):
        build_task_map(torch.tensor([1]), 256, 0, 128)
    with pytest.raises(UsageFault, match="group_m is 0"):
        swizzle(torch.arange(2), torch.tensor(1), 2, 0)
    with pytest.raises(UsageFault, match=r"expert order 'best'.*interleave"):
        expert_order(torch.tensor([1]), "best")  # type: ignore[arg-type]
