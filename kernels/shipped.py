"""What is shipped for a GPU nobody timed on: the best prediction among what compiled well.

The sieve works on estimates. Here its few are compiled, and what a compiler alone can say decides:
registers and shared memory go into the model anew, and what the compiler spoke against is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ditune.db.errors import UsageFault
from ditune.db.moe import TileConfig
from ditune.kernels.cost_model import Resources, occupancy, predict
from ditune.kernels.gemm import Gemm
from ditune.kernels.hardware import Gpu
from ditune.kernels.tile_space import DEFAULT, Histogram, Sieved, sieve


@dataclass(frozen=True)
class Shipped:
    """What computes one histogram.

    Args:
        config: The tiles.
        us: Predicted time, with the resources of the compiled kernel.
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
        best: One per histogram, in their order.
        dropped: Configurations that the compiler spoke against, and why.
        sieved: What was compiled, and how many each filter left.
    """

    best: tuple[Shipped, ...]
    dropped: dict[TileConfig, str]
    sieved: Sieved


def choose(
    gemm: Gemm,
    histograms: Sequence[Histogram],
    gpu: Gpu,
    compiled: Callable[[TileConfig], Resources],
    limit: int = 40,
) -> Chosen:
    """Return the best compiled configuration for each histogram.

    Args:
        gemm: Its shape.
        histograms: Rows of each expert, one tuple per kind of routing, each with rows.
        gpu: Where it will run.
        compiled: Compiles the GEMM with a configuration for that GPU and returns what a program
            needs; raises `UsageFault` where the kernel is refused, spills, or has slower
            instructions than were counted on.
        limit: Most that are compiled, see `sieve`.

    Raises:
        UsageFault: A histogram has no rows, nothing of the grid fits, or nothing compiled well.
    """
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
    best = tuple(_best(gemm, counts, gpu, good) for counts in histograms)
    return Chosen(best, dropped, sieved)


def _best(
    gemm: Gemm, counts: Histogram, gpu: Gpu, compiled: dict[TileConfig, Resources]
) -> Shipped:
    """Return the fastest one; of equals, the first as the sieve ranked them."""
    times = {c: predict(gemm, counts, c, gpu, found).us for c, found in compiled.items()}
    config = min(times, key=times.__getitem__)
    return Shipped(config, times[config], times.get(DEFAULT, math.inf), compiled[config])
