"""Every configuration of a grouped GEMM that may be worth a try, and the few that are.

The grid is tiles, stages and warps, times paths and orientations, times launches. What a GPU cannot
run, and what the cost model finds slow under all routings that matter, is sieved out by arithmetic
alone; the few that are left are compiled or timed.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ditune.db.errors import UsageFault
from ditune.db.moe import TileConfig, TilePath, default_tiles
from ditune.kernels.cost_model import estimate, occupancy, predict
from ditune.kernels.gemm import ITEM_BYTES, Gemm
from ditune.kernels.hardware import Gpu
from ditune.kernels.matrix_path import matrix_path

BLOCK_M = (16, 32, 64, 128)
BLOCK_N = (32, 64, 128, 256)
BLOCK_K = (32, 64, 128)
NUM_WARPS = (4, 8)
NUM_STAGES = (2, 3, 4, 5)
GROUP_M = (1, 8, 16)
LOW_M = (16, 32)
SPLIT_K = (2, 4)
DEFAULT = TileConfig()

Histogram = tuple[int, ...]

_MOST_HELD = 128  # float32 sums of a thread that fit beside all else
_SLOWEST = 1.5  # times the best prediction
_ALIKE = 3  # of one output tile and path that are kept: the model hardly tells them apart


@dataclass(frozen=True)
class Kept:
    """One configuration that is worth a try.

    Args:
        config: What to try.
        us: Predicted time under each histogram.
        loss: Mean over the histograms of its time over the best of the grid, >= 1.
    """

    config: TileConfig
    us: tuple[float, ...]
    loss: float


@dataclass(frozen=True)
class Sieved:
    """What is left of a grid.

    Args:
        left: Configurations left after each filter, in the order of the filters, "grid" first.
        kept: The few to try, best first.
    """

    left: dict[str, int]
    kept: tuple[Kept, ...]


def grid(gemm: Gemm, gpu: Gpu) -> Iterator[TileConfig]:
    """Yield the whole grid: 384 tiles per path, and their launches.

    Launches differ from the default's by one field at a time. Which ones make no sense for a
    routing is left to the first filter.

    Args:
        gemm: Its shape; "tma" is for rows that lie packed.
        gpu: Its compute capability says which paths there are.
    """
    for path, swap in itertools.product(_paths(gemm, gpu), (False, True)):
        for m, n, k, warps, stages in itertools.product(
            BLOCK_M, BLOCK_N, BLOCK_K, NUM_WARPS, NUM_STAGES
        ):
            if swap and not (gpu.cc >= 90 and m <= 32 and n >= 64):
                continue  # the wide instruction wants 64 columns to stand on its side
            if path != "ptr" and gemm.n % n:
                continue  # a descriptor would read the next expert's weight
            config = TileConfig(
                block_m=m,
                block_n=n,
                block_k=k,
                num_warps=warps,
                num_stages=stages,
                path=path,
                swap_ab=swap,
            )
            yield config
            yield from _launches(config)


def seeds(gemm: Gemm, rows: int, active: int, gpu: Gpu) -> tuple[TileConfig, ...]:
    """Return what would be used without a search: the default and two published rules of thumb.

    Args:
        gemm: Its shape.
        rows: Of all experts.
        active: Experts that have any.
        gpu: Where it runs.

    Source: the rule that vLLM learnt from its tuned files (#34846); triton_kernels'
        `opt_flags_nvidia.py`, without its split depth.
    """
    tokens, each = rows / gemm.top_k, rows / max(active, 1)
    size = ITEM_BYTES[gemm.dtype]
    learnt = TileConfig(
        block_m=next((m for most, m in ((32, 16), (96, 32), (512, 64)) if tokens <= most), 128),
        block_n=64 if tokens <= 64 else 128,
        block_k=128 if tokens <= 64 else 64,
        num_warps=4 if tokens <= 128 else 8,
        num_stages=4 if tokens <= 32 else 3,
        group_m=16 if each > 128 else 1,
    )
    m = min(128, max(16, _power_of_two(each)))
    n = 256 if gemm.n > 128 else 128
    ruled = TileConfig(
        block_m=m,
        block_n=n,
        block_k=128 // size,
        num_warps=8 if m * n > 4 * 4096 else 4,
        num_stages=2,
    )
    deeper = [_changed(ruled, num_stages=stages) for stages in NUM_STAGES]
    fits = [config for config in deeper if _fit(config, gemm, gpu)]
    return (default_tiles(gemm.dtype).up, learnt, fits[-1] if fits else ruled)


def sieve(gemm: Gemm, histograms: Sequence[Histogram], gpu: Gpu, limit: int = 40) -> Sieved:
    """Return the few configurations of the grid that are worth a try.

    Five filters, cheap ones first: algebra, shared memory, sums per thread, occupancy, and the
    model, which drops what is slower than 1.5 times the best under every histogram. Of what is
    left, those with the least loss are kept. All histograms weigh the same; one that matters more
    may be given more than once. The default, the seeds and the best of each histogram are kept
    always, and count.

    Args:
        gemm: Its shape.
        histograms: Rows of each expert, one tuple per routing that matters, at least one of them
            with rows.
        gpu: Where it runs.
        limit: Most that are kept, unless those that are kept always are more.

    Raises:
        UsageFault: No histogram has any rows, or nothing of the grid fits on the GPU.
    """
    histograms = [tuple(counts) for counts in histograms if any(counts)]
    if not histograms:
        raise UsageFault("no histogram has any rows; give the counts of at least one real routing")
    found = list(grid(gemm, gpu))
    left = {"grid": len(found)}
    filters: dict[str, Callable[[TileConfig], bool]] = {
        "algebra": functools.partial(_sensible, gemm=gemm, histograms=histograms, gpu=gpu),
        "shared memory": functools.partial(_loads, gemm=gemm, gpu=gpu),
        "sums per thread": functools.partial(_holds, gemm=gemm, gpu=gpu),
        "occupancy": functools.partial(_hides, gemm=gemm, gpu=gpu),
    }
    for name, passes in filters.items():
        found = [config for config in found if passes(config)]
        left[name] = len(found)
    if not found:
        raise UsageFault(f"no tile of the grid fits {gemm} on {gpu.name}; use the default tiles")
    ranked = _ranked(gemm, histograms, gpu, found)
    best = [min(kept.us[place] for kept in ranked) for place in range(len(histograms))]
    near = [k for k in ranked if _share(k.us, best) <= _SLOWEST]
    left["model"] = len(near)
    always = {config for counts in histograms for config in _seeds_of(gemm, counts, gpu)}
    always |= {next(k.config for k in near if k.us[i] == best[i]) for i in range(len(best))}
    kept = _few(near, always, limit)
    missing = sorted(always - {k.config for k in kept}, key=repr)
    kept += [_weighed(gemm, histograms, gpu, config, best) for config in missing]
    kept.sort(key=_rank)
    left["kept"] = len(kept)
    return Sieved(left, tuple(kept))


def _paths(gemm: Gemm, gpu: Gpu) -> tuple[TilePath, ...]:
    size = ITEM_BYTES[gemm.dtype]
    if gpu.cc < 90 or gemm.k * size % 16:  # older ones turn descriptors into slow pointers
        return ("ptr",)
    return ("ptr", "tma_weights") if gemm.gather else ("ptr", "tma_weights", "tma")


def _launches(config: TileConfig) -> Iterator[TileConfig]:
    """Yield other launches of a tile."""
    for group in GROUP_M:
        if group != config.group_m:
            yield _changed(config, group_m=group)
    for split in SPLIT_K:
        yield _changed(config, split_k=split)
    if config.path != "ptr":  # pointers lost by staying, where it was measured
        yield _changed(config, persistent=1)
    if config.block_m >= 64:
        for low in LOW_M:
            yield _changed(config, low_m=low)


def _changed(config: TileConfig, **fields: int) -> TileConfig:
    return config.model_copy(update=fields)


def _power_of_two(value: float) -> int:
    """Return the least power of two that is not below a value."""
    return 1 << max(0, math.ceil(value) - 1).bit_length()


def _fit(config: TileConfig, gemm: Gemm, gpu: Gpu) -> int:
    return occupancy(estimate(config, gemm.dtype, gpu.cc), config.num_warps, gpu)


def _sensible(config: TileConfig, gemm: Gemm, histograms: Sequence[Histogram], gpu: Gpu) -> bool:
    """Whether the sizes go together, and the launch is not another one's equal."""
    highest = max(map(max, histograms))
    if config.block_m > max(16, 2 * _power_of_two(highest)) or config.block_k > gemm.k:
        return False
    if config.block_m * config.block_n < 128 * config.num_warps:  # a warp's least share, 16 by 8
        return False
    if config.group_m != DEFAULT.group_m:
        # groups differ only where some expert has more rows of tiles than the smaller one
        return math.ceil(highest / config.block_m) > min(config.group_m, DEFAULT.group_m)
    if config.low_m:
        return any(min(filter(None, counts)) <= config.low_m < max(counts) for counts in histograms)
    if config.split_k > 1 or config.persistent:
        return _worthwhile(config, gemm, histograms, gpu)
    return True


def _worthwhile(config: TileConfig, gemm: Gemm, histograms: Sequence[Histogram], gpu: Gpu) -> bool:
    """Whether there are few enough tiles to split their depth, or enough for programs to stay."""
    columns = math.ceil(gemm.n / config.block_n)
    tiles = [columns * _row_tiles(counts, config.block_m) for counts in histograms]
    if config.persistent:
        return max(tiles) >= 2 * gpu.sms
    return min(tiles) < gpu.sms and gemm.k >= 4 * config.block_k * config.split_k


@functools.lru_cache(maxsize=1024)
def _row_tiles(counts: Histogram, block_m: int) -> int:
    return sum(-(-count // block_m) for count in counts)


def _loads(config: TileConfig, gemm: Gemm, gpu: Gpu) -> bool:
    return estimate(config, gemm.dtype, gpu.cc).shared_bytes <= gpu.cta_shared_bytes


def _holds(config: TileConfig, gemm: Gemm, gpu: Gpu) -> bool:
    if matrix_path(config, gemm.dtype, gpu.cc) == "UTCHMMA":
        return True  # sums have a memory of their own there
    return config.block_m * config.block_n <= _MOST_HELD * 32 * config.num_warps


def _hides(config: TileConfig, gemm: Gemm, gpu: Gpu) -> bool:
    """Whether a program fits, and something runs while it waits for its loads."""
    fit = _fit(config, gemm, gpu)
    return fit >= 2 or (fit == 1 and config.num_stages >= 3)


def _seeds_of(gemm: Gemm, counts: Histogram, gpu: Gpu) -> tuple[TileConfig, ...]:
    return seeds(gemm, sum(counts), sum(count > 0 for count in counts), gpu)


def _times(
    gemm: Gemm, histograms: Sequence[Histogram], gpu: Gpu, config: TileConfig
) -> tuple[float, ...]:
    return tuple(predict(gemm, counts, config, gpu).us for counts in histograms)


def _weighed(
    gemm: Gemm,
    histograms: Sequence[Histogram],
    gpu: Gpu,
    config: TileConfig,
    best: Sequence[float],
) -> Kept:
    us = _times(gemm, histograms, gpu, config)
    return Kept(config, us, _loss(us, best))


def _ranked(
    gemm: Gemm, histograms: Sequence[Histogram], gpu: Gpu, configs: Sequence[TileConfig]
) -> list[Kept]:
    """Return all configurations with their predictions, best first."""
    twins: dict[tuple[TileConfig, int], tuple[float, ...]] = {}
    times = {}
    for config in configs:  # the model sees of a path how many programs fit, and no more
        twin = (config.model_copy(update={"path": "ptr"}), _fit(config, gemm, gpu))
        if twin not in twins:
            twins[twin] = _times(gemm, histograms, gpu, config)
        times[config] = twins[twin]
    best = [min(column) for column in zip(*times.values(), strict=True)]
    return sorted((Kept(c, us, _loss(us, best)) for c, us in times.items()), key=_rank)


def _loss(us: Sequence[float], best: Sequence[float]) -> float:
    return sum(mine / least for mine, least in zip(us, best, strict=True)) / len(best)


def _share(us: Sequence[float], best: Sequence[float]) -> float:
    return min(mine / least for mine, least in zip(us, best, strict=True))


def _rank(kept: Kept) -> tuple[float, int, int, int]:
    """Return what sorts: loss first, then, where the model is blind, what was faster when timed.

    On an H200, from few to many tokens, both operands by TMA were 2 to 9 % faster than pointers,
    weights alone 1 to 5 %, programs that stay up to 6 % slower or 2 % faster; and the largest tile
    was 3 % faster with 3 stages than with 4.
    """
    config = kept.config
    path = ("tma", "tma_weights", "ptr").index(config.path)
    plain = abs(config.group_m - DEFAULT.group_m) + config.persistent + config.split_k
    line = abs(config.block_k - DEFAULT.block_k)  # 64 are a whole line of the cache
    return round(kept.loss, 4), path, plain + line, abs(config.num_stages - DEFAULT.num_stages)


def _few(ranked: Sequence[Kept], always: set[TileConfig], limit: int) -> list[Kept]:
    """Return the first of each output tile and path up to a limit, and all that are kept always."""
    found: list[Kept] = []
    alike = Counter[tuple[object, ...]]()
    for each in (k for k in ranked if k.config not in always):
        c = each.config
        tile = (c.block_m, c.block_n, c.path, c.swap_ab, c.low_m, c.split_k)
        alike[tile] += 1
        if alike[tile] <= _ALIKE:
            found.append(each)
    kept = [each for each in ranked if each.config in always]
    return kept + found[: max(0, limit - len(always))]
