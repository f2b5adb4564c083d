"""Tiles for a CPU: every way to cut and deal them gives the reference, and the same bits."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.moe_cases import BOUNDS, CASES, EDGES, Case, error, layer

from ditune.db.errors import UsageFault
from ditune.db.moe import (
    CpuTiles,
    LayerTiles,
    Mapping,
    MoeChoice,
    MoeShape,
    MoeTuning,
    RoutingBucket,
)
from ditune.kernels.cpu_pool import pool_of
from ditune.kernels.cpu_tiles import Tile, cut, deal, moe_cpu, run_tiles
from ditune.kernels.reference import Experts, moe_reference
from ditune.kernels.task_map import ORDERS

SHAPE = MoeShape(experts=4, hidden=64, inner=48, top_k=2, dtype="float32")
MAPPINGS: tuple[Mapping, ...] = ("static", "round_robin", "dynamic")
WAYS = [
    CpuTiles(rows=rows, order=order, mapping=mapping, fused=fused, prepacked=prepacked)
    for (rows, order), mapping, fused, prepacked in zip(
        itertools.product((1, 16, 1024), ORDERS),
        itertools.cycle(MAPPINGS),
        itertools.cycle((True, True, False, False)),
        itertools.cycle((True, False, False, True, True)),
        strict=False,
    )
]


@pytest.mark.parametrize("case", CASES + EDGES, ids=lambda case: case.name)
def test_every_way_gives_the_reference(case: Case) -> None:
    given = layer(case, torch.float32, "cpu")
    wanted = moe_reference(*given)
    for tiles, threads in itertools.product(WAYS, (1, 2)):
        found = run_tiles(*given, tiles, pool_of(threads))
        assert error(found, wanted) <= BOUNDS[torch.float32], tiles


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    given = layer(CASES[0], dtype, "cpu")
    found = run_tiles(*given, CpuTiles(rows=16), pool_of(2))
    assert error(found, moe_reference(*given)) <= BOUNDS.get(dtype, 1e-12)


def test_neither_mapping_nor_threads_change_a_bit() -> None:
    given = layer(Case("skewed", 70, 6, 32, 32, 2, "each"), torch.float32, "cpu")
    found = [
        run_tiles(*given, CpuTiles(rows=16, mapping=mapping, order=order), pool_of(threads))
        for mapping in MAPPINGS
        for order in ORDERS[:2]
        for threads in (1, 2, 3)
    ]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_weights_of_experts_elsewhere_are_not_looked_at() -> None:
    hidden, experts, indices, weights = layer(CASES[0], torch.float32, "cpu")
    indices[:, 1] = -1
    wanted = run_tiles(hidden, experts, indices, weights, CpuTiles(), pool_of(1))
    weights[:, 1] = float("nan")
    assert torch.equal(wanted, run_tiles(hidden, experts, indices, weights, CpuTiles(), pool_of(1)))


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=9),
    st.integers(1, 130),
    st.sampled_from(MAPPINGS),
    st.integers(1, 4),
)
def test_tiles_cover_every_row_once(
    counts: list[int], rows: int, mapping: Mapping, threads: int
) -> None:
    pieces = cut(counts, CpuTiles(rows=rows))
    heights = [[tile.end - tile.begin for tile in expert] for expert in pieces]
    assert all(max(h) <= rows and max(h) - min(h) <= 1 for h in heights)
    assert sorted(map(sum, heights), reverse=True) == [*map(sum, heights)]  # desc
    shares = deal(pieces, mapping, threads)
    dealt = [tile for share in shares for tile in share]
    covered = sorted((tile.begin, tile.end) for tile in dealt)
    assert [*itertools.chain.from_iterable(range(*pair) for pair in covered)] == [
        *range(sum(counts))
    ]
    starts = [0, *itertools.accumulate(counts)]
    assert all(starts[t.expert] <= t.begin and t.end <= starts[t.expert + 1] for t in dealt)


def test_who_gets_what() -> None:
    pieces = [[Tile(0, 0, 4), Tile(0, 4, 8)], [Tile(1, 8, 12)], [Tile(2, 12, 15)]]
    static = [[t.begin for t in share] for share in deal(pieces, "static", 2)]
    assert static == [[0, 4], [8, 12]]
    turns = [[t.begin for t in share] for share in deal(pieces, "round_robin", 2)]
    assert turns == [[0, 8], [4, 12]]
    free = deal(pieces, "dynamic", 2)
    assert [next(iter(share)).begin for share in free] == [0, 4]


def set_data(weight: torch.Tensor, factor: float) -> None:
    weight.data = weight * factor  # other memory, and by torch's count the same version


def test_packed_copies_follow_their_weight_and_die_with_it() -> None:
    hidden, experts, indices, weights = layer(CASES[0], torch.float32, "cpu")
    packed = CpuTiles(prepacked=True)
    for change in (torch.Tensor.mul_, set_data):
        run_tiles(hidden, experts, indices, weights, packed, pool_of(1))
        change(experts.down, 2.0)
        found = run_tiles(hidden, experts, indices, weights, packed, pool_of(1))
        assert error(found, moe_reference(hidden, experts, indices, weights)) <= 2e-5
    alive = weakref.ref(experts.down)
    del experts
    gc.collect()
    assert alive() is None


def test_inference_mode_reaches_the_threads() -> None:
    with torch.inference_mode():
        given = layer(CASES[0], torch.float32, "cpu")
        for tiles in (CpuTiles(fused=False), CpuTiles(prepacked=True)):
            found = run_tiles(*given, tiles, pool_of(2))
            assert error(found, moe_reference(*given)) <= 2e-5
        given[1].down.mul_(2.0)  # weights that are made here have no count of changes
        found = run_tiles(*given, CpuTiles(prepacked=True), pool_of(2))
        assert error(found, moe_reference(*given)) <= 2e-5


def test_the_routing_chooses_the_tiles() -> None:
    given = layer(CASES[0], torch.float32, "cpu")
    bucket = RoutingBucket(tokens=64, skew="even", active=0)
    gpu = MoeChoice(bucket=bucket, tiles=LayerTiles(), status="measured", speedup=1.0)
    tuned = MoeTuning(shape=SHAPE, default=CpuTiles(), choices=(gpu,))
    with pytest.raises(UsageFault, match="tiles for a GPU"):
        moe_cpu(*given, tuned)
    hidden, experts, indices, weights = given
    few = hidden[:8], experts, indices[:8], weights[:8]
    assert error(moe_cpu(*few, tuned), moe_reference(*few)) <= 2e-5


def test_what_does_not_fit_is_refused() -> None:
    hidden, experts, indices, weights = layer(CASES[0], torch.float32, "cpu")
    with pytest.raises(UsageFault, match="down must be"):
        run_tiles(
            hidden,
            Experts(experts.gate_up, experts.down[:1]),
            indices,
            weights,
            CpuTiles(),
            pool_of(1),
        )
    elsewhere = Experts(experts.gate_up.to("meta"), experts.down.to("meta"))
    moved = hidden.to("meta"), elsewhere, indices.to("meta"), weights.to("meta")
    with pytest.raises(UsageFault, match="cannot compute on meta"):
        run_tiles(*moved, CpuTiles(), pool_of(1))
