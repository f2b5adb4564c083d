"""What is shipped for a GPU nobody timed on: the best prediction among what compiled well.

The sieve works on estimates. Here its few are compiled, and what a compiler alone can say decides:
registers and shared memory go into the model anew, and what the compiler spoke against is dropped.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ditune.db.errors import UsageFault
from ditune.db.moe import TileConfig, default_tiles
from ditune.kernels.cost_model import Resources, occupancy, predict
from ditune.kernels.gemm import Gemm
from ditune.kernels.hardware import Gpu
from ditune.kernels.tile_space import Histogram, Sieved, sieve


@dataclass(frozen=True)
class Shipped:
    """What computes one group of histograms.

    Args:
        config: The tiles.
        us: Predicted time, the mean over the group, with the resources of the compiled kernel.
        default_us: The same of the default tiles; infinite where they did not compile well.
        resources: Of the compiled kernel.
    """

    config: TileConfig
    us: float
    default_us: float
    resources: Resources


@dataclass(frozen=True)
class Chosen:
    """What came out of sieve and compiler.

    Args:
        best: One per group, in their order.
        dropped: Configurations that the compiler spoke against, and why.
        sieved: What was compiled, and how many each filter left.
    """

    best: tuple[Shipped, ...]
    dropped: dict[TileConfig, str]
    sieved: Sieved


def choose(
    gemm: Gemm,
    groups: Sequence[Sequence[Histogram]],
    gpu: Gpu,
    compiled: Callable[[TileConfig], Resources],
    limit: int = 40,
) -> Chosen:
    """Return the best compiled configuration for each group of histograms.

    Args:
        gemm: Its shape.
        groups: Rows of each expert, one tuple per routing, each with rows. Those of a group are
            computed alike: their configuration loses the least, in the mean of predicted time over
            the best time of each.
        gpu: Where it will run.
        compiled: Compiles the GEMM with a configuration for that GPU and returns what a program
            needs; raises `UsageFault` where the kernel is refused, spills, or has slower
            instructions than were counted on.
        limit: Most that are compiled, see `sieve`.

    Raises:
        UsageFault: A histogram has no rows, nothing of the grid fits, or nothing compiled well.
    """
    histograms = [counts for group in groups for counts in group]
    if not all(any(counts) for counts in histograms):
        raise UsageFault("a histogram has no rows; leave it out, nothing is computed for it")
    sieved = sieve(gemm, histograms, gpu, limit)
    good: dict[TileConfig, Resources] = {}
    dropped: dict[TileConfig, str] = {}
    for config in (kept.config for kept in sieved.kept):
        try:
            found = compiled(config)
        except UsageFault as fault:
            dropped[config] = str(fault)
            continue
        if occupancy(found, config.num_warps, gpu) == 0:
            dropped[config] = f"{found} for {config.num_warps} warps: an SM has less"
        else:
            good[config] = found
    if not good:
        raise UsageFault(
            f"none of {len(dropped)} configurations compiled well for {gpu.name}; the first: "
            f"{next(iter(dropped.values()))}"
        )
    best = tuple(_best(gemm, group, gpu, good) for group in groups)
    return Chosen(best, dropped, sieved)


def _best(
    gemm: Gemm, group: Sequence[Histogram], gpu: Gpu, compiled: dict[TileConfig, Resources]
) -> Shipped:
    """Return the one that loses least; of equals, the first as the sieve ranked them."""
    times = {
        config: [predict(gemm, counts, config, gpu, found).us for counts in group]
        for config, found in compiled.items()
    }
    least = [min(column) for column in zip(*times.values(), strict=True)]

    def loss(config: TileConfig) -> float:
        return statistics.fmean(us / best for us, best in zip(times[config], least, strict=True))

    config = min(times, key=loss)
    default = default_tiles(gemm.dtype).up
    default_us = statistics.fmean(times[default]) if default in times else math.inf
    return Shipped(config, statistics.fmean(times[config]), default_us, compiled[config])
