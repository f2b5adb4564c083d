"""The cost model against figures that were worked out for it, times others published, and sense."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from benchmarks.published_moe import POINTS, error_factor
from hypothesis import given
from hypothesis import strategies as st

from ditune.db.moe import LayerTiles, MoeShape, TileConfig
from ditune.kernels.cost_model import (
    Prediction,
    Resources,
    estimate,
    occupancy,
    predict,
    predict_layer,
)
from ditune.kernels.gemm import Gemm, layer_gemms
from ditune.kernels.hardware import GPUS
from ditune.kernels.matrix_path import matrix_path

Counts = tuple[int, ...]
Tile = tuple[int, int, int, int, int]


def gemm(counts: Counts, n: int, k: int) -> Gemm:
    return Gemm(len(counts), n, k, 1, "bfloat16", gather=False)


def config(tile: Tile, **fields: object) -> TileConfig:
    names = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
    return TileConfig.model_validate({**dict(zip(names, tile, strict=True)), **fields})


EVEN = (128,) * 16
SKEWED = (0, 1000, 0, 24, 1, 1023, 0, 0)
VECTORS: list[tuple[str, Counts, tuple[int, int], Tile, tuple[float, ...]]] = [
    # occupancy, registers, shared bytes, tiles, compute us, memory us, bytes, us
    (
        "h100",
        EVEN,
        (2048, 1024),
        (128, 128, 64, 8, 3),
        (2, 109, 98_304, 256, 14.3, 25.8, 79_691_776, 30.5),
    ),
    (
        "h100",
        EVEN,
        (2048, 1024),
        (64, 128, 64, 4, 3),
        (3, 109, 73_728, 512, 22.7, 25.8, 79_691_776, 31.7),
    ),
    (
        "h100",
        (16,) * 64,
        (2048, 1024),
        (16, 128, 128, 4, 4),
        (2, 92, 110_592, 1024, 32.2, 89.1, 274_726_912, 96.4),
    ),
    (
        "a100",
        EVEN,
        (2048, 1024),
        (128, 128, 64, 8, 3),
        (1, 148, 65_536, 256, 44.3, 42.5, 79_691_776, 53.2),
    ),
    (
        "a100",
        EVEN,
        (2048, 1024),
        (64, 64, 64, 4, 4),
        (3, 108, 49_152, 1024, 45.8, 42.5, 79_691_776, 54.7),
    ),
    (
        "h20",
        (512,) * 8,
        (14336, 4096),
        (128, 256, 64, 8, 3),
        (1, 177, 147_456, 1792, 3482.5, 323.7, 1_191_182_336, 3533.6),
    ),
    (
        "h200",
        SKEWED,
        (4096, 2048),
        (128, 128, 64, 8, 4),
        (1, 109, 131_072, 576, 69.7, 20.9, 92_274_688, 75.3),
    ),
    (
        "b200",
        (512,) * 8,
        (14336, 4096),
        (128, 256, 64, 8, 3),
        (1, 155, 147_456, 1792, 513.4, 153.9, 1_090_519_040, 539.0),
    ),
    (
        "rtx4090",
        (256,) * 8,
        (4096, 2048),
        (64, 128, 64, 4, 3),
        (2, 164, 49_152, 1024, 246.0, 171.9, 159_383_552, 274.3),
    ),
]


@pytest.mark.parametrize(("gpu", "counts", "size", "tile", "expected"), VECTORS)
def test_the_model_is_the_one_that_was_worked_out(
    gpu: str, counts: Counts, size: tuple[int, int], tile: Tile, expected: tuple[float, ...]
) -> None:
    found = predict(gemm(counts, *size), counts, config(tile), GPUS[gpu])
    whole = (found.occupancy, found.registers, found.shared_bytes, found.tiles)
    times = (found.compute_us, found.memory_us, found.us)
    assert expected[:4] == whole
    assert expected[6] == found.bytes
    assert (*expected[4:6], expected[7]) == tuple(round(time, 1) for time in times)
    assert found.padding == (1.125 if counts == SKEWED else 1.0)


@pytest.mark.parametrize(
    ("source", "expected"),
    [("#24700", 1.05), ("#44818", 1.11), ("#40542", 1.10), ("#44152", 1.06)],
)
def test_published_times_are_off_by_what_is_stated(source: str, expected: float) -> None:
    points = [point for point in POINTS if point.source == source]
    assert expected == round(error_factor(points), 2)


@pytest.mark.parametrize(
    ("size", "slots", "often"),
    [
        ((28672, 4096), 1, 3),  # 2 by 112 tiles of an expert, 132 at a time: 3 waves at most
        ((4096, 14336), 1, 2),  # 2 by 16 tiles: all in one wave, or in two neighbours
        ((28672, 4096), 2, 2),  # 264 at a time
        ((2560, 4096), 1, 1),  # the whole weight stays in the cache
    ],
)
def test_rows_are_read_once_for_all_programs_that_run_together(
    size: tuple[int, int], slots: int, often: int
) -> None:
    counts, (n, k) = (256,) * 64, size
    small = Resources(100, 100_000)
    tiles = config((128, 256, 64, 8, 3), persistent=slots)
    found = predict(gemm(counts, n, k), counts, tiles, GPUS["h100"], small)
    rows = sum(counts)
    assert found.occupancy == slots
    assert found.bytes == 2 * (64 * n * k + often * rows * k + rows * n)


def test_weights_are_read_by_groups_but_once_for_all_that_run_together() -> None:
    counts, n, k = (640, 256), 5120, 3584
    tiles = config((128, 256, 64, 8, 3), group_m=1)
    found = predict(gemm(counts, n, k), counts, tiles, GPUS["h200"])
    # 5 groups are 100 tiles, 132 of them run at a time: two waves at most; 2 groups as they are
    assert found.bytes == 2 * ((2 + 2) * n * k + sum(counts) * (k + n))


@pytest.mark.parametrize(
    ("counts", "tile", "us"),
    [
        ((512,) * 64, (128, 256, 64, 8, 3), 2065),
        ((4096,) * 8 + (0,) * 56, (128, 256, 64, 8, 3), 1972),
        ((128,) * 8 + (0,) * 56, (16, 128, 128, 4, 4), 361),
    ],
)
def test_tiles_without_groups_take_about_what_was_measured(
    counts: Counts, tile: Tile, us: float
) -> None:
    # on an H200; were every row of tiles to read its weight alone, it would be 24 to 60 % more
    found = predict(gemm(counts, 5120, 3584), counts, config(tile, group_m=1), GPUS["h200"])
    assert 0.8 < found.us / us < 1.1


def test_there_are_35_published_times() -> None:
    assert len(POINTS) == 35


@st.composite
def cases(draw: st.DrawFn) -> tuple[Gemm, Counts, TileConfig, str]:
    counts = tuple(draw(st.lists(st.integers(0, 3000), min_size=1, max_size=16)))
    tile = (
        draw(st.sampled_from((16, 32, 64, 128))),
        draw(st.sampled_from((32, 64, 128, 256))),
        draw(st.sampled_from((32, 64, 128))),
        draw(st.sampled_from((4, 8))),
        draw(st.integers(2, 5)),
    )
    size = (draw(st.sampled_from((64, 1408, 8192))), draw(st.sampled_from((64, 704, 4096))))
    group = draw(st.sampled_from((1, 8, 16)))
    return gemm(counts, *size), counts, config(tile, group_m=group), draw(st.sampled_from([*GPUS]))


@given(cases(), st.floats(1.0, 8.0), st.data())
def test_more_work_takes_longer_and_a_better_gpu_does_not(
    case: tuple[Gemm, Counts, TileConfig, str], factor: float, data: st.DataObject
) -> None:
    shape, counts, tiles, name = case
    gpu = GPUS[name]
    before = predict(shape, counts, tiles, gpu).us
    longest = before * (1 + 1e-9)  # sums of floats are not exact
    faster = replace(gpu, teraflops=factor * gpu.teraflops)
    wider = replace(gpu, gigabytes_per_s=factor * gpu.gigabytes_per_s)
    assert predict(shape, counts, tiles, faster).us <= longest
    assert predict(shape, counts, tiles, wider).us <= longest
    more = list(counts)
    more[data.draw(st.integers(0, len(counts) - 1))] += data.draw(st.integers(1, 500))
    assert predict(shape, more, tiles, gpu).us * (1 + 1e-9) >= before


@pytest.mark.parametrize(
    ("resources", "warps", "expected"),
    [
        (Resources(109, 98_304), 8, 2),
        (Resources(32, 1_000), 4, 16),  # warps of an SM, 64 in all
        (Resources(16, 0), 1, 32),  # programs of an SM
        (Resources(128, 232_448), 4, 1),
        (Resources(128, 232_449), 4, 0),  # over the limit of a program
        (Resources(256, 0), 4, 0),
        (Resources(255, 0), 16, 0),  # over the registers of an SM
    ],
)
def test_occupancy_on_an_h100(resources: Resources, warps: int, expected: int) -> None:
    assert expected == occupancy(resources, warps, GPUS["h100"])


def test_what_does_not_fit_never_ends() -> None:
    found = predict(gemm(EVEN, 2048, 1024), EVEN, config((128, 256, 128, 8, 5)), GPUS["h100"])
    assert (found.occupancy, found.us) == (0, math.inf)


def test_no_row_costs_a_launch() -> None:
    found = predict(gemm((0, 0), 2048, 1024), (0, 0), TileConfig(), GPUS["h100"])
    assert Prediction(2.5, 0.0, 0.0, 0, 0, 1.0, 2, 109, 98_304) == found


def test_resources_of_a_compiled_kernel_replace_the_estimate() -> None:
    work = gemm(EVEN, 2048, 1024)
    found = predict(work, EVEN, TileConfig(), GPUS["h100"], Resources(200, 60_000))
    assert (found.occupancy, found.registers, found.shared_bytes) == (1, 200, 60_000)


@pytest.mark.parametrize(
    ("tile", "swap", "cc", "path", "shared"),
    [
        ((16, 128, 64, 4, 4), False, 90, "HMMA", 55_296),
        ((16, 128, 64, 4, 4), True, 90, "HGMMA", 73_728),
        ((32, 128, 64, 4, 4), False, 100, "HMMA", 61_440),
        ((32, 128, 64, 4, 4), True, 100, "UTCHMMA", 81_920),
        ((64, 128, 64, 4, 3), False, 90, "HGMMA", 73_728),
        ((64, 128, 64, 4, 3), False, 80, "HMMA", 49_152),
        ((16, 32, 64, 4, 4), True, 90, "HMMA", 18_432),  # 32 columns are no wide side either
    ],
)
def test_the_wide_instructions_want_64_on_their_side(
    tile: Tile, swap: bool, cc: int, path: str, shared: int
) -> None:
    found = config(tile, swap_ab=swap)
    assert path == matrix_path(found, "bfloat16", cc)
    assert shared == estimate(found, "bfloat16", cc).shared_bytes


def test_few_rows_compute_faster_swapped_on_hopper() -> None:
    counts = (32,) * 8
    work, plain = gemm(counts, 8192, 4096), config((32, 128, 64, 4, 4))
    swapped = plain.model_copy(update={"swap_ab": True})
    gpu = GPUS["h20"]  # little compute: products are what is waited for
    assert predict(work, counts, swapped, gpu).compute_us < (
        0.9 * predict(work, counts, plain, gpu).compute_us
    )


def test_low_tiles_pay_where_many_experts_have_one_row() -> None:
    counts = (2000, 2000, *(1,) * 62)
    work, high = gemm(counts, 4096, 4096), config((128, 128, 64, 8, 3))
    both = predict(work, counts, high.model_copy(update={"low_m": 16}), GPUS["h100"])
    alone = predict(work, counts, high, GPUS["h100"])
    assert both.compute_us < alone.compute_us
    assert both.padding < 1.4 < alone.padding
    assert both.tiles == alone.tiles
    assert both.bytes == alone.bytes


def test_one_height_is_two_heights_without_low_experts() -> None:
    work, high = gemm(EVEN, 4096, 4096), TileConfig()
    low = high.model_copy(update={"low_m": 16})
    assert predict(work, EVEN, low, GPUS["h100"]) == predict(work, EVEN, high, GPUS["h100"])


def test_a_split_depth_pays_for_few_tiles_alone() -> None:
    plain = config((16, 128, 64, 4, 3))
    split = plain.model_copy(update={"split_k": 4})
    gpu, few, many = GPUS["h100"], (16,), (512,) * 16
    work = gemm(few, 1024, 16384)
    assert predict(work, few, split, gpu).us < predict(work, few, plain, gpu).us
    work = gemm(many, 8192, 1024)
    assert predict(work, many, split, gpu).us > predict(work, many, plain, gpu).us


def test_programs_that_stay_are_as_many_as_they_ask_for() -> None:
    work = gemm(EVEN, 2048, 1024)
    stays = predict(work, EVEN, TileConfig(persistent=1), GPUS["h100"])
    assert (stays.occupancy, predict(work, EVEN, TileConfig(), GPUS["h100"]).occupancy) == (1, 2)


def test_float32_has_twice_the_bytes_and_no_matrix_instruction() -> None:
    short = gemm(EVEN, 2048, 1024)
    long = replace(short, dtype="float32")
    tiles = config((64, 64, 32, 4, 3))
    two, four = (predict(work, EVEN, tiles, GPUS["h100"]) for work in (short, long))
    assert four.bytes == 2 * two.bytes
    assert four.compute_us > 5 * two.compute_us
    assert matrix_path(tiles, "float32", 90) == "FFMA"


def test_a_layer_is_its_two_gemms_and_what_is_between() -> None:
    shape = MoeShape(experts=16, hidden=1024, inner=512, top_k=2, dtype="bfloat16")
    gpu, tiles = GPUS["h100"], LayerTiles(down=TileConfig(block_m=64))
    up, down = layer_gemms(shape)
    both = predict(up, EVEN, tiles.up, gpu).us + predict(down, EVEN, tiles.down, gpu).us
    values = 2048 * 3 * 512 + 2048 * 1024 + 1024 * 1024
    between = values * 2 / (0.7 * 3352e3) + 12
    assert predict_layer(shape, EVEN, tiles, gpu) == pytest.approx(both + between)
