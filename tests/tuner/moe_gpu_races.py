"""Races of tiles on a scripted clock, run as a program under TRITON_INTERPRET=1; prints JSON.

Every configuration is really computed once, so what is refused or wrong is found as on a device.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from ditune.db.errors import UsageFault
from ditune.db.moe import MoeShape, TileConfig
from ditune.kernels.gemm import Gemm
from ditune.kernels.hardware import GPUS
from ditune.kernels.triton_grouped_gemm import grouped_gemm
from ditune.tuner import moe_gpu
from ditune.tuner.moe import Routed, kinds_of_routing
from ditune.tuner.moe_gpu import Bench, timed

SHAPE = MoeShape(experts=4, hidden=32, inner=32, top_k=2, dtype="float16")
FAST = TileConfig(block_m=16, block_n=32, block_k=32, num_warps=4, num_stages=5)
WRONG = TileConfig(block_m=16, block_n=64, block_k=32, num_warps=4, num_stages=5)
REFUSED = TileConfig(block_m=48)
COSTS = {FAST: 50.0, WRONG: 20.0, REFUSED: 10.0}  # us; all else 100


class Clock:
    """Computes what it is given once, and says what the script says."""

    def __init__(self, costs: dict[TileConfig, float]) -> None:
        self._costs = costs
        self._computed: set[tuple[TileConfig, ...]] = set()

    def __call__(self, call: Callable[[], object]) -> float:
        assert isinstance(call, partial)
        tiles = tuple(part for part in call.args if isinstance(part, TileConfig))
        if tiles not in self._computed:
            self._computed.add(tiles)
            call()
        return sum(self._costs.get(each, 100.0) for each in tiles)


def miscompiled(config: TileConfig) -> Callable[..., Tensor]:
    """Return the grouped GEMM, off by a percent with one configuration."""

    original: Callable[..., Tensor] = grouped_gemm

    def computed(*given: object) -> Tensor:
        out, variants = original(*given), given[3]
        assert isinstance(variants, tuple)
        return out * 1.01 if variants[0].config == config else out

    return computed


def raced(routed: Sequence[Routed], costs: dict[TileConfig, float]) -> dict[str, object]:
    """Return what was found, what was asked to be compiled, and what was said."""
    sieved: list[list[TileConfig]] = []
    said: list[str] = []

    def sound(_: Gemm, configs: Sequence[TileConfig]) -> list[TileConfig]:
        sieved.append(list(configs))
        return [TileConfig(), FAST, WRONG, REFUSED]

    bench = Bench(torch.device("cpu"), GPUS["a100"], Clock(costs), sound)
    found = timed(SHAPE, routed, bench, said.append)
    return {
        "found": [
            {**each.choice.model_dump(mode="json"), "us": each.us, "routings": each.routings}
            for each in found
        ],
        "notes": [each.note for each in found],
        "sieved": [[config.model_dump() for config in configs] for configs in sieved],
        "said": said,
    }


def refused(routed: Sequence[Routed]) -> str:
    """Return why nothing is raced."""
    try:
        raced(routed, COSTS)
    except UsageFault as fault:
        return str(fault)
    return ""


if __name__ == "__main__":
    many = kinds_of_routing(SHAPE, (16, 24, 32), ("balanced", "best"))
    with patch.object(moe_gpu, "grouped_gemm", miscompiled(WRONG)):
        found = {"fast": raced(many, COSTS), "flat": raced(many[:1], {})}
    with patch.object(moe_gpu, "grouped_gemm", miscompiled(TileConfig())):
        print(json.dumps({**found, "refused": refused(many[:1])}))
