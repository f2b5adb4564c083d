"""What the sieve keeps: never the best out, always the seeds in, and few enough to compile."""

from __future__ import annotations

import pytest
from benchmarks.published_moe import POINTS, SOURCES, grid_best_us, uniform_counts

from ditune.db.errors import UsageFault
from ditune.db.moe import MoeShape
from ditune.kernels.cost_model import predict
from ditune.kernels.gemm import Gemm, layer_gemms
from ditune.kernels.hardware import GPUS, Gpu
from ditune.kernels.tile_space import DEFAULT, grid, seeds, sieve

SHAPE = MoeShape(experts=64, hidden=2048, inner=1408, top_k=6, dtype="bfloat16")
UP, DOWN = layer_gemms(SHAPE)
FILTERS = ["grid", "algebra", "shared memory", "sums per thread", "occupancy", "model", "kept"]


def test_a_path_has_384_tiles_and_hopper_more_paths() -> None:
    def tiles(gemm: Gemm, gpu: str, **fields: object) -> int:
        plain = {"group_m": 8, "persistent": 0, "low_m": 0, "split_k": 1, "order": "id", **fields}
        configs = (c.model_dump() for c in grid(gemm, GPUS[gpu]))
        return sum(plain.items() <= c.items() for c in configs)

    assert tiles(DOWN, "a100") == 384
    assert tiles(DOWN, "h100", path="ptr", swap_ab=False) == 384
    assert tiles(DOWN, "h100", path="tma", swap_ab=False) == 384
    assert tiles(UP, "h100", path="tma") == 0  # its rows are gathered
    assert tiles(DOWN, "a100", swap_ab=True) == 0
    assert tiles(DOWN, "h100", path="ptr", swap_ab=True) == 2 * 3 * 3 * 2 * 4
    assert len(set(grid(DOWN, GPUS["h100"]))) == len(list(grid(DOWN, GPUS["h100"])))


def test_descriptors_are_left_out_where_they_cannot_read() -> None:
    odd = Gemm(4, 2048, 2044, 2, "bfloat16", gather=False)  # rows of 4088 bytes
    assert {"ptr"} == {config.path for config in grid(odd, GPUS["h100"])}
    narrow = Gemm(4, 96, 2048, 2, "bfloat16", gather=False)
    assert {32} == {config.block_n for config in grid(narrow, GPUS["h100"]) if config.path == "tma"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "which"), [(source, which) for source in SOURCES for which in range(2)][:-1]
)  # of the last one, one GEMM was published
def test_the_few_hold_the_best_for_every_published_point(source: str, which: int) -> None:
    points = [point for point in POINTS if point.source == source]
    gpu, gemm = points[0].gpu, points[0].gemms[which]
    found = sieve(gemm, [point.counts() for point in points], gpu)
    assert len(found.kept) <= 40
    assert found.left["grid"] >= 384
    for place, point in enumerate(points):
        best = grid_best_us(gemm, point.counts(), gpu)
        assert min(kept.us[place] for kept in found.kept) <= 1.03 * best, point


def test_filters_only_take_away_and_the_best_comes_first() -> None:
    histograms = [uniform_counts(tokens, 64, 6) for tokens in (16, 1024)]
    found = sieve(UP, histograms, GPUS["a100"])
    assert list(found.left) == FILTERS
    assert sorted(found.left.values(), reverse=True) == list(found.left.values())
    assert len(found.kept) == found.left["kept"] <= 40
    losses = [kept.loss for kept in found.kept]
    assert losses == pytest.approx(sorted(losses), abs=1e-4)
    for place, counts in enumerate(histograms):
        for kept in found.kept:
            assert kept.us[place] == predict(UP, counts, kept.config, GPUS["a100"]).us


@pytest.mark.parametrize("gpu", ["a100", "h100"])
@pytest.mark.parametrize("tokens", [1, 4096])
def test_default_and_seeds_are_kept(gpu: str, tokens: int) -> None:
    counts = uniform_counts(tokens, 64, 6)
    kept = {each.config for each in sieve(DOWN, [counts], GPUS[gpu], limit=5).kept}
    active = sum(count > 0 for count in counts)
    wanted = seeds(DOWN, sum(counts), active, GPUS[gpu])
    assert wanted[0] == DEFAULT
    assert set(wanted) <= kept
    assert len(kept) == 5


def test_seeds_follow_their_rules() -> None:
    few, many = seeds(DOWN, 6 * 16, 48, GPUS["h100"]), seeds(DOWN, 6 * 4096, 64, GPUS["h100"])
    assert [few[1].block_m, many[1].block_m] == [16, 128]
    assert [few[1].block_k, many[1].block_k] == [128, 64]
    assert [few[2].block_m, many[2].block_m] == [16, 128]
    assert [many[2].block_n, many[2].num_warps] == [256, 8]


def test_each_output_tile_has_three_of_the_few_at_most() -> None:
    counts = uniform_counts(4096, 64, 6)
    kept = [each.config for each in sieve(UP, [counts], GPUS["h100"]).kept]
    always = {*seeds(UP, sum(counts), 64, GPUS["h100"]), kept[0]}
    tiles = [
        (c.block_m, c.block_n, c.path, c.swap_ab, c.low_m, c.split_k)
        for c in kept
        if c not in always
    ]
    assert max(tiles.count(tile) for tile in tiles) == 3
    assert len(set(tiles)) >= 8


def test_low_tiles_are_kept_for_skewed_routing_and_left_out_for_even_one() -> None:
    steep = (4096, 4096, *(1,) * 62)
    low = [k.config.low_m for k in sieve(UP, [steep], GPUS["h100"]).kept]
    assert any(low)
    assert low[0] > 0
    assert not any(k.config.low_m for k in sieve(UP, [(128,) * 64], GPUS["h100"]).kept)


def test_a_depth_is_split_only_where_tiles_are_few() -> None:
    few = sieve(Gemm(8, 1024, 8192, 1, "bfloat16", False), [(16,)], GPUS["h100"])
    assert few.kept[0].config.split_k > 1
    many = sieve(UP, [(512,) * 64], GPUS["h100"])
    assert {1} == {kept.config.split_k for kept in many.kept}


def test_a_routing_without_rows_is_refused() -> None:
    with pytest.raises(UsageFault, match="no histogram has any rows"):
        sieve(UP, [(0,) * 64], GPUS["h100"])


def test_a_gpu_that_fits_nothing_is_said_so() -> None:
    tiny = Gpu("tiny", 80, 1, 1000, 1.0, 100, 1, 4096, 2048, 64, 1, 0.9)
    with pytest.raises(UsageFault, match="no tile of the grid fits"):
        sieve(UP, [(128,) * 64], tiny)
