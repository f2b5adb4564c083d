"""Tiles that are timed on a GPU: on a scripted clock in the interpreter, and on a real device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tuner.moe_gpu_races import FAST, SHAPE, WRONG

from ditune.db.moe import LayerTiles, MoeShape, MoeTuning, TileConfig
from ditune.kernels.histograms import router_output
from ditune.kernels.reference import Experts, moe_reference
from ditune.kernels.triton_moe import moe_triton
from ditune.tuner.moe import by_bucket, kinds_of_routing
from ditune.tuner.moe_gpu import bench_of, timed

PROGRAM = Path(__file__).with_name("moe_gpu_races.py")


@pytest.fixture(scope="module")
def races() -> dict[str, Any]:
    """What the program found; the interpreter needs a process of its own."""
    root = PROGRAM.parents[2]
    path = {"PYTHONPATH": f"{root / 'src'}:{root}", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", str(PROGRAM)]
    done = subprocess.run(
        command, env={**os.environ, **path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def tiles(row: dict[str, Any]) -> LayerTiles:
    return LayerTiles.model_validate(row["tiles"])


def test_every_bucket_gets_the_fastest_tiles_that_are_right(races: dict[str, Any]) -> None:
    rows = races["fast"]["found"]
    wanted = by_bucket(kinds_of_routing(SHAPE, (16, 24, 32), ("balanced", "best")))
    assert [row["bucket"] for row in rows] == [bucket.model_dump() for bucket in wanted]
    assert [row["routings"] for row in rows] == [
        [each.name for each in group] for group in wanted.values()
    ]
    assert max(len(row["routings"]) for row in rows) == 2
    for row in rows:  # WRONG and what cannot be launched would have been faster
        assert tiles(row) == LayerTiles(up=FAST, down=FAST)
        assert (row["status"], row["speedup"]) == ("measured", 2.0)
        assert row["us"] == 100.0  # of the layer under one routing: two GEMMs


def test_the_default_stays_where_nothing_is_faster(races: dict[str, Any]) -> None:
    (row,) = races["flat"]["found"]
    assert tiles(row) == LayerTiles()
    assert (row["status"], row["speedup"], row["us"]) == ("measured", 1.0, 200.0)


def test_what_is_compiled_is_what_the_sieve_leaves_for_each_number_of_tokens(
    races: dict[str, Any],
) -> None:
    sieved, said = races["fast"]["sieved"], races["fast"]["said"]
    assert len(sieved) == 4  # two GEMMs, buckets of 16 and of 32 tokens
    assert all(TileConfig().model_dump() in configs for configs in sieved)
    assert WRONG.model_dump() in sieved[0]
    compiling = [words for words in said if words.startswith("compiling")]
    assert compiling == [
        f"compiling {len(configs)} configurations of a GEMM for sm_80" for configs in sieved
    ]
    assert [words for words in said if words.startswith("timing")] == [
        f"timing {row['routings'][0]}" for row in races["fast"]["found"]
    ]
    assert all(note.count("4 compiled well") == 2 for note in races["fast"]["notes"])


def test_a_device_on_which_the_default_is_wrong_is_refused(races: dict[str, Any]) -> None:
    assert "default tiles cannot compute 4 experts of 32 to 32, 2 per token" in races["refused"]
    assert "on this a100" in races["refused"]


@pytest.mark.gpu
def test_a_small_layer_is_tuned_on_a_device_and_computed_right() -> None:
    shape = MoeShape(experts=8, hidden=256, inner=512, top_k=2, dtype="bfloat16")
    device, routed = torch.device("cuda"), kinds_of_routing(shape, (64,), ("balanced", "worst"))
    bench = bench_of(device)
    few = replace(bench, sound=lambda gemm, configs: bench.sound(gemm, configs[:6]))
    said: list[str] = []
    found = timed(shape, routed, few, said.append)
    assert [each.choice.bucket for each in found] == list(by_bucket(routed))
    assert all(each.us > 0.0 and each.choice.speedup >= 1.0 for each in found)
    assert {each.choice.status for each in found} == {"measured"}
    choices = tuple(each.choice for each in found)
    tuning = MoeTuning(shape=shape, default=LayerTiles(), choices=choices)
    source = torch.Generator(device).manual_seed(0)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=source, device=device, dtype=torch.bfloat16)

    experts = Experts(drawn(8, 1024, 256) / 16, drawn(8, 256, 512) / 22)
    for each in routed:
        indices, weights = (part.to(device) for part in router_output(each.counts, 2))
        given = drawn(64, 256), experts, indices, weights.to(torch.bfloat16)
        wanted = moe_reference(*given).float()
        assert (moe_triton(*given, tuning).float() - wanted).norm() <= 0.02 * wanted.norm()
