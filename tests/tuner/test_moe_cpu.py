"""Tuning tiles for a CPU: on scripted times, and once on a small layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from ditune.db.errors import EvaluationFault
from ditune.db.moe import CpuTiles, MoeShape
from ditune.kernels.cpu_pool import Pool
from ditune.kernels.cpu_tiles import run_tiles
from ditune.tuner import moe_cpu
from ditune.tuner.moe import Routed
from ditune.tuner.moe_cpu import candidates, dealt_otherwise, in_passes, timed

SHAPE = MoeShape(experts=4, hidden=32, inner=32, top_k=2, dtype="float32")
EVEN = Routed("even", 32, (16, 16, 16, 16))
OTHER = Routed("other", 32, (18, 14, 16, 16))
STEEP = Routed("steep", 32, (32, 32, 0, 0))


def test_tall_tiles_that_are_all_the_same_are_tried_once() -> None:
    assert {one.rows for one in candidates(100, prepack=True)} == {64, 128}
    assert {one.rows for one in candidates(0, prepack=True)} == {64}
    assert {one.rows for one in candidates(5000, prepack=False)} == set(moe_cpu.ROWS)
    assert not any(one.prepacked for one in candidates(5000, prepack=False))
    every = list(candidates(5000, prepack=True))
    assert len(set(every)) == len(every) == len(moe_cpu.ROWS) * 2
    assert CpuTiles() in every


def test_what_is_varied_later_varies_alone() -> None:
    tiles = CpuTiles(rows=64, fused=False, prepacked=True)
    assert {*in_passes(tiles)} == {tiles, CpuTiles(rows=64, prepacked=True)}
    variants = list(dealt_otherwise(tiles))
    assert len(set(variants)) == len(moe_cpu.ORDERS) * len(moe_cpu.MAPPINGS)
    assert tiles in variants
    assert {(v.rows, v.fused, v.prepacked) for v in variants} == {(64, False, True)}


@pytest.mark.parametrize("threads", [1, 2])
def test_a_small_layer_is_tuned_bucket_by_bucket(threads: int) -> None:
    told: list[str] = []
    found = timed(SHAPE, [EVEN, STEEP, OTHER], told.append, threads=threads)
    assert [each.choice.bucket for each in found] == [EVEN.bucket, STEEP.bucket]
    assert [each.routings for each in found] == [("even", "other"), ("steep",)]
    for each in found:
        assert each.choice.status == "measured"
        assert (each.choice.speedup == 1.0) is (each.choice.tiles == CpuTiles())
        assert each.choice.speedup >= 1.0
        assert each.us > 0.0
    assert told == ["timing even", "timing steep"]


def test_the_fastest_tiles_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run takes follows its tiles, by a script."""

    def scripted(pool: Pool, work: Callable[[], object]) -> float:
        tiles: CpuTiles = work.args[4]  # type: ignore[attr-defined]
        slow = abs(tiles.rows - 64) / 1000 + tiles.fused * 0.1 - tiles.prepacked * 0.05
        return 1.0 + slow + (tiles.mapping != "static") * 0.2

    monkeypatch.setattr(Pool, "makespan", scripted)
    (one,) = timed(SHAPE, [EVEN], print, threads=2)
    best = CpuTiles(rows=64, fused=False, prepacked=True, mapping="static")
    assert one.choice.tiles == best
    assert one.choice.speedup == pytest.approx(1.492 / 0.95)
    assert one.us == pytest.approx(0.95e6)


def test_caches_are_cold_before_every_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    makespan = Pool.makespan

    def timing(pool: Pool, work: Callable[[], object]) -> float:
        events.append("timed")
        return makespan(pool, work)

    monkeypatch.setattr(Pool, "makespan", timing)
    monkeypatch.setattr(moe_cpu, "clear_caches", lambda: events.append("cold"))
    timed(SHAPE, [EVEN], print, threads=1)
    assert len(events) > 20
    assert events == ["cold", "timed"] * (len(events) // 2)


def test_no_packed_weights_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def watched(*given: Any) -> Tensor:
        seen.append(given[4].prepacked)
        return run_tiles(*given)

    monkeypatch.setattr(moe_cpu, "run_tiles", watched)
    timed(SHAPE, [EVEN], print, threads=1, prepack=False)
    assert not any(seen)


def test_what_computes_something_else_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*given: Any) -> Tensor:
        found = run_tiles(*given)
        return found if given[4] == CpuTiles() else found.mul_(1.01)

    def undone(*given: Any) -> Tensor:
        return run_tiles(*given).mul_(float("nan"))

    monkeypatch.setattr(moe_cpu, "run_tiles", wrong)
    (only,) = timed(SHAPE, [EVEN], print, threads=1)
    assert only.choice.tiles == CpuTiles()
    monkeypatch.setattr(moe_cpu, "run_tiles", undone)
    with pytest.raises(EvaluationFault, match="default tiles"):
        timed(SHAPE, [EVEN], print, threads=1)
