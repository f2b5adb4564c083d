"""Tiles of expert layers for a GPU that is not here: predicted, and compiled as it would be."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from ditune.db.errors import UsageFault
from ditune.db.moe import LayerTiles, MoeChoice, MoeShape, TileConfig
from ditune.kernels.cost_model import Resources, between_us
from ditune.kernels.gemm import Gemm, layer_gemms
from ditune.kernels.hardware import Gpu
from ditune.kernels.offline import compile_gemm, faults
from ditune.kernels.shipped import Shipped, choose
from ditune.tuner.moe import Progress, Routed, Tuned, by_tokens

COMPILED = 12  # of each GEMM and number of tokens; the model's best hardly comes later


def predicted(
    shape: MoeShape,
    routed: Sequence[Routed],
    gpu: Gpu,
    progress: Progress,
    compiled: int = COMPILED,
) -> tuple[Tuned, ...]:
    """Return tiles for each bucket of routings, predicted for a GPU.

    The sieve's best are compiled for the GPU's architecture, and what spills or has slower
    instructions than it could have is dropped.

    Args:
        shape: Of the layer.
        routed: The routings that matter.
        gpu: Where the layer will run.
        progress: Is told what is being done.
        compiled: Most configurations that are compiled for a GEMM and a number of tokens.

    Raises:
        UsageFault: Nothing compiled well, or this process cannot compile.
    """
    found: list[Tuned] = []
    for buckets in by_tokens(routed):
        groups = [[each.counts for each in group] for group in buckets.values()]
        most = next(iter(buckets)).tokens
        halves = []
        for name, gemm in zip(("up", "down"), layer_gemms(shape), strict=True):
            progress(f"up to {most} tokens: compiling the {name} GEMM for sm_{gpu.cc}")
            halves.append(choose(gemm, groups, gpu, compiler(gemm, gpu), compiled))
        up, down = halves
        left = ", ".join(f"{count} after {name}" for name, count in up.sieved.left.items())
        for bucket, up_best, down_best in zip(buckets, up.best, down.best, strict=True):
            group = buckets[bucket]
            between = between_us(shape, sum(group[0].counts), gpu)
            us = up_best.us + down_best.us + between
            default_us = _default_us(up_best, down_best) + between
            choice = MoeChoice(
                bucket=bucket,
                tiles=LayerTiles(up=up_best.config, down=down_best.config),
                status="compiled",
                speedup=default_us / us,
            )
            found.append(Tuned(choice, tuple(each.name for each in group), us, left))
    return tuple(found)


def compiler(gemm: Gemm, gpu: Gpu) -> Callable[[TileConfig], Resources]:
    """Return what compiles a GEMM for a GPU and refuses what it should not run."""

    @functools.cache
    def compiled(config: TileConfig) -> Resources:
        found = compile_gemm(gemm, config, gpu.cc)
        if wrong := faults(found, config, gpu.cc):
            raise UsageFault("; ".join(wrong))
        return Resources(found.registers, found.shared_bytes)

    return compiled


def _default_us(up: Shipped, down: Shipped) -> float:
    """Return what the default takes; where it did not compile well, as long as what is shipped."""
    pairs = ((each.default_us, each.us) for each in (up, down))
    return sum(us if math.isinf(default) else default for default, us in pairs)
