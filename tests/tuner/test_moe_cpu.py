"""Tuning tiles for a CPU: on scripted times, and once on a small layer."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest
from torch import Tensor

from ditune.db.errors import EvaluationFault, UsageFault
from ditune.db.moe import CpuTiles, MoeShape
from ditune.kernels.cpu_tiles import run_tiles
from ditune.kernels.routing_bucket import routing_bucket
from ditune.tuner import moe_cpu
from ditune.tuner.moe_cpu import candidates, dealt_otherwise, halved, in_passes, run_off, tune_cpu

SHAPE = MoeShape(experts=4, hidden=32, inner=32, top_k=2, dtype="float32")
EVEN, STEEP = (16, 16, 16, 16), (64, 0, 0, 0)


class Script:
    """Times that follow the tiles, with some noise that is always the same."""

    def __init__(self, noise: float = 0.0) -> None:
        self.calls: Counter[CpuTiles] = Counter()
        self._noise: Iterator[float] = itertools.cycle((0.0, noise, noise / 2))

    def __call__(self, tiles: CpuTiles) -> float:
        self.calls[tiles] += 1
        slow = abs(tiles.rows - 512) / 1000 + (not tiles.fused) * 0.1 - tiles.prepacked * 0.05
        return 1.0 + slow + next(self._noise)


def test_tall_tiles_that_are_all_the_same_are_tried_once() -> None:
    assert {one.rows for one in candidates(100, prepack=True)} == {64, 128}
    assert {one.rows for one in candidates(0, prepack=True)} == {64}
    assert {one.rows for one in candidates(5000, prepack=False)} == set(moe_cpu.ROWS)
    assert not any(one.prepacked for one in candidates(5000, prepack=False))
    every = list(candidates(5000, prepack=True))
    assert len(set(every)) == len(every) == len(moe_cpu.ROWS) * 2
    assert CpuTiles() in every


def test_halving_finds_the_fastest_and_spends_little_on_the_rest() -> None:
    script = Script(noise=0.02)
    best = halved(candidates(5000, prepack=True), script)
    assert best[0] == CpuTiles(rows=512, prepacked=True)
    assert len(best) == 2
    assert script.calls[CpuTiles(rows=64)] == 2
    assert script.calls.total() == 2 * (10 + 5)
    assert halved([CpuTiles()], script) == [CpuTiles()]


def test_what_is_varied_later_varies_alone() -> None:
    tiles = CpuTiles(rows=64, fused=False, prepacked=True)
    assert {*in_passes(tiles)} == {tiles, CpuTiles(rows=64, prepacked=True)}
    variants = list(dealt_otherwise(tiles))
    assert len(set(variants)) == len(moe_cpu.ORDERS) * len(moe_cpu.MAPPINGS)
    assert tiles in variants
    assert {(v.rows, v.fused, v.prepacked) for v in variants} == {(64, False, True)}


def test_the_default_stays_unless_another_is_faster_with_confidence() -> None:
    quick, slow = CpuTiles(rows=512), CpuTiles(rows=64)
    tiles, speedup = run_off([slow, quick], Script())
    assert tiles == quick
    assert speedup == pytest.approx(1.256 / 1.0)
    assert run_off([slow], Script()) == (CpuTiles(), 1.0)
    assert run_off([CpuTiles()], Script()) == (CpuTiles(), 1.0)
    turns = itertools.cycle((0.9, 1.1))  # faster in every other pair
    doubtful = run_off([quick], lambda one: 1.0 if one == CpuTiles() else next(turns))
    assert doubtful == (CpuTiles(), 1.0)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_small_layer_is_tuned_bucket_by_bucket(threads: int) -> None:
    told: list[tuple[int, int]] = []

    class Told:
        def update(self, stage: str, done: int, total: int, note: str) -> None:
            told.append((done, total))

    tuning = tune_cpu(SHAPE, [EVEN, STEEP, EVEN], threads=threads, progress=Told())
    buckets = [routing_bucket(EVEN, 32), routing_bucket(STEEP, 32)]
    assert [choice.bucket for choice in tuning.choices] == buckets
    assert all(choice.status == "measured" for choice in tuning.choices)
    for choice in tuning.choices:
        assert (choice.speedup == 1.0) is (choice.tiles == tuning.default)
        assert choice.speedup >= 1.0
    assert told == [(0, 2), (1, 2), (2, 2)]


def test_no_packed_weights_where_memory_is_short() -> None:
    tuning = tune_cpu(SHAPE, [EVEN], threads=1, prepack=False)
    assert not any(choice.tiles.prepacked for choice in tuning.choices)  # type: ignore[union-attr]


def test_what_computes_something_else_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*given: object) -> Tensor:
        found = run_tiles(*given)  # type: ignore[arg-type]
        return found if given[4] == CpuTiles() else found.mul_(1.01)

    def undone(*given: object) -> Tensor:
        return run_tiles(*given).mul_(float("nan"))  # type: ignore[arg-type]

    monkeypatch.setattr(moe_cpu, "run_tiles", wrong)
    tuning = tune_cpu(SHAPE, [EVEN], threads=1)
    assert tuning.choices[0].tiles == CpuTiles()
    monkeypatch.setattr(moe_cpu, "run_tiles", undone)
    with pytest.raises(EvaluationFault, match="default tiles"):
        tune_cpu(SHAPE, [EVEN], threads=1)


@pytest.mark.parametrize("counts", [(16, 16), (1, 0, 0, 0), (4, -2, 0, 0)])
def test_routings_that_this_layer_cannot_have(counts: tuple[int, ...]) -> None:
    with pytest.raises(UsageFault, match="rows for 4 experts"):
        tune_cpu(SHAPE, [counts], threads=1)
