"""The Triton layer equals the reference; numerics run in the interpreter, in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ditune.db.errors import UsageFault
from ditune.db.moe import (
    CpuTiles,
    LayerTiles,
    MoeChoice,
    MoeShape,
    MoeTuning,
    RoutingBucket,
    TileConfig,
)
from ditune.kernels.gemm import Gemm
from ditune.kernels.launch import checked
from ditune.kernels.reference import Experts
from ditune.kernels.triton_moe import moe, moe_triton
from ditune.kernels.variants import EVERY_KIND, variants

PROGRAM = Path(__file__).with_name("moe_cases.py")
PARTS = ("cases", "edges", "routings")
GEMM = Gemm(64, 4096, 2048, 8, "bfloat16", gather=True)
SHAPE = MoeShape(experts=3, hidden=32, inner=16, top_k=2, dtype="float32")
TUNING = MoeTuning(shape=SHAPE, default=LayerTiles())


def run(*arguments: str, **changes: str) -> None:
    root = PROGRAM.parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}", **changes}
    command = [sys.executable, "-W", "ignore", str(PROGRAM), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_every_path_equals_the_reference_in_the_interpreter(part: str) -> None:
    run(part, "--quick", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.parametrize("part", PARTS)
def test_every_path_equals_the_reference_on_a_device(part: str) -> None:
    run(part, "--quick")


@pytest.mark.gpu
def test_one_graph_serves_every_routing() -> None:
    run("graph")


def given() -> tuple[Tensor, Experts, Tensor, Tensor]:
    experts = Experts(torch.ones(3, 32, 32), torch.ones(3, 32, 16))
    return torch.ones(4, 32), experts, torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2)


def choice(tokens: int, skew: str, active: int, tiles: LayerTiles) -> MoeChoice:
    bucket = RoutingBucket.model_validate({"tokens": tokens, "skew": skew, "active": active})
    return MoeChoice(bucket=bucket, tiles=tiles, status="predicted", speedup=1.1)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"block_m": 48}, "block_m is 48"),
        ({"block_n": 512}, "block_n is 512"),
        ({"block_k": 8}, "block_k is 8"),
        ({"low_m": 128}, "low_m is 128"),
        ({"low_m": 24}, "low_m is 24"),
        ({"num_warps": 6}, "num_warps is 6"),
        ({"split_k": 33}, "only 32 steps"),
        ({"path": "tma"}, "packed rows"),
    ],
)
def test_what_cannot_be_computed_is_refused(fields: dict[str, object], match: str) -> None:
    with pytest.raises(UsageFault, match=match):
        checked(TileConfig.model_validate(fields), GEMM)


def test_layers_that_no_launch_or_descriptor_holds_are_refused() -> None:
    with pytest.raises(UsageFault, match="1025 experts"):
        checked(TileConfig(), replace(GEMM, experts=1025))
    descriptors = TileConfig(path="tma_weights")
    with pytest.raises(UsageFault, match="multiple of 16 bytes"):
        checked(descriptors, replace(GEMM, k=2049))
    with pytest.raises(UsageFault, match="32-bit"):
        checked(descriptors, replace(GEMM, experts=1024, n=2**21))


def test_everything_combines() -> None:
    config = TileConfig(
        path="tma", low_m=16, split_k=2, swap_ab=True, persistent=1, order="desc", group_m=3
    )
    assert config == checked(config, replace(GEMM, gather=False))


def test_inputs_are_checked_before_a_launch() -> None:
    hidden, experts, indices, weights = given()
    tiles = TileConfig()
    turned = Experts(experts.gate_up.mT, experts.down)
    with pytest.raises(UsageFault, match="not contiguous"):
        moe(hidden, turned, indices, weights, tiles, tiles)
    with pytest.raises(UsageFault, match="one row per token"):
        moe_triton(hidden, experts, indices[:3], weights, TUNING)
    double = Experts(experts.gate_up.double(), experts.down.double())
    with pytest.raises(UsageFault, match="float64"):
        moe(hidden.double(), double, indices, weights, tiles, tiles)


def test_a_tuning_of_another_layer_is_refused() -> None:
    hidden, experts, indices, weights = given()
    with pytest.raises(UsageFault, match="tune this shape"):
        moe_triton(hidden, experts, indices[:, :1], weights[:, :1], TUNING)
    with pytest.raises(UsageFault, match="for a cpu"):
        moe_triton(*given(), MoeTuning(shape=SHAPE, default=CpuTiles()))


def test_each_kind_of_routing_has_one_variant() -> None:
    low, high = (LayerTiles(up=TileConfig(block_m=size)) for size in (16, 64))
    tuning = MoeTuning(
        shape=SHAPE,
        default=LayerTiles(),
        choices=(
            choice(8, "even", 0, low),
            choice(8, "steep", 3, high),
            choice(8, "uneven", 0, low),
            choice(8, "uneven", 1, LayerTiles()),
            choice(16, "even", 0, high),
        ),
    )
    found = variants(tuning, 7, "up")
    assert [variant.config.block_m for variant in found] == [128, 16, 64]
    assert [v.kinds for v in found] == [~(1 | 1 << 16 | 1 << 35), 1 | 1 << 16, 1 << 35]
    assert [variant.kinds for variant in variants(tuning, 7, "down")] == [EVERY_KIND]
    assert [variant.kinds for variant in variants(tuning, 4, "up")] == [EVERY_KIND]
