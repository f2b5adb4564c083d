"""Expert layers on a CPU: tuned tiles beside the default, other libraries, and one dense GEMM.

Float32, hidden size 512, inner size 1024, two experts per token; 4 to 128 experts under four
routings, 192 rows for each expert and more. Tiles are tuned first, for every routing. What is
timed, in turn, is CPU time: of one thread, and for two threads that of the busiest and of the
caller; caches are cold, and all is copied to other memory a few times. No figure here says anything
about a GPU.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from benchmarks._moe_layers import (
    SIZES,
    Case,
    Contestant,
    Layer,
    cases,
    dense,
    dense_on,
    peers,
)
from benchmarks.rows import Benchmark, Row, main

from ditune.cli.sources import quieten_libraries
from ditune.db.moe import CpuTiles
from ditune.db.records import Interval
from ditune.kernels.cpu_pool import Pool, clear_caches, pool_of
from ditune.kernels.cpu_tiles import run_tiles
from ditune.kernels.reference import Experts, moe_reference
from ditune.profiler.statistics import paired_speedup
from ditune.tuner.drawn import experts_of
from ditune.tuner.moe import Tuned
from ditune.tuner.moe_cpu import timed

_THREADS = 2
_RAGGED = ("balanced", "zipf")  # routings that have to keep up with a dense GEMM
_SHARE_ONE, _SHARE_TWO = 0.95, 0.90  # of a dense GEMM's speed, on one thread and on two
_WORSE = 1.05  # how much slower than the best peer the upper bound may be
_PLACES = 4
_PAIRS = {4: 9, 16: 6, 64: 4, 128: 3}  # in each place, by experts: the small ones take less
_CLOSE = 1e-3  # of the largest value
_TUNED, _DEFAULT, _DENSE, _KEPT = "tuned", "default", "dense", "dense, memory kept"
_TOGETHER = "dense on two threads"
_DENSES = (_DENSE, _KEPT, _TOGETHER)  # they compute something else


def measure(benchmark: Benchmark, arguments: argparse.Namespace) -> None:
    """Tune and time every case."""
    quieten_libraries()
    torch.set_num_threads(1)
    benchmark.conditions |= {
        "threads": f"1, and {_THREADS} where it is said",
        "one thread": "CPU time, interleaved; ratios of pairs",
        "two threads": "CPU time of the busiest thread and of the caller; dense: half of one "
        "thread's time; dense on two threads: each with half of the rows",
        "pairs": f"in {_PLACES} places of memory; intervals take them as independent",
        "dense": "two torch.mm of equal operations on all rows, without gate, gather and sum",
        "peers": "transformers' eager and grouped_mm, diffusers' HiDream loop; best: the one with "
        "the least median",
        "batched_mm": "left out: it copies an expert's weights for each row, 26 GB and more here; "
        "with 1024 rows it took 270 times as long as tiles",
    }
    numbers = arguments.experts or list(SIZES)[: 2 if arguments.quick else None]
    with torch.no_grad():
        for group in cases(numbers, quick=arguments.quick):
            _group(benchmark, group, 1 if arguments.quick else _PAIRS[group[0].experts])


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--experts", type=int, nargs="*", choices=SIZES, help="only layers with so many experts"
    )


def _group(benchmark: Benchmark, group: list[Case], pairs: int) -> None:
    """Tune and time the cases that have the same weights."""
    experts = experts_of(group[0].shape, torch.device("cpu"))
    shape, ragged = group[0].shape, [case for case in group if case.routing in _RAGGED]
    one = timed(shape, [case.routed for case in group], print, threads=1)
    two = timed(shape, [case.routed for case in ragged], print, threads=_THREADS)
    for case in group:
        layer = case.layer(experts)
        _time_one(benchmark, case, layer, _tiles(one, case), pairs)
        if case.routing in _RAGGED:
            _time_two(benchmark, case, layer, _tiles(two, case), pairs)


def _time_one(benchmark: Benchmark, case: Case, layer: Layer, tiles: CpuTiles, pairs: int) -> None:
    """Compare one thread of ours with everything else."""
    pool = pool_of(1)

    def placed() -> dict[str, Contestant]:
        mine = _elsewhere(layer)
        kept = {_KEPT: dense(case, mine[1], fresh=False)}
        return {**_ours_and_dense(case, mine, tiles, pool), **kept, **peers(mine)}

    _check(placed(), moe_reference(*layer))
    times = _interleaved(placed, pool, pairs)
    others = [name for name in times if name not in (_TUNED, _DEFAULT, *_DENSES)]
    share = paired_speedup(times[_DENSE], times[_TUNED])
    held = share.median >= _SHARE_ONE if case.routing in _RAGGED else None
    target = f">= {_SHARE_ONE}" if held is not None else ""
    _add(benchmark, f"{case}: dense / tuned", share, target, held)
    kept = paired_speedup(times[_KEPT], times[_TUNED])
    _add(benchmark, f"{case}: dense / tuned, memory kept", kept)
    best = min(others, key=lambda name: statistics.median(times[name]))
    worse = paired_speedup(times[_TUNED], times[best])
    held = worse.ci95[1] <= _WORSE
    _add(benchmark, f"{case}: tuned / {best}, the best", worse, f"bound <= {_WORSE}", held)
    for name in (_DEFAULT, *others):
        gain = paired_speedup(times[name], times[_TUNED])
        _add(benchmark, f"{case}: {name} / tuned", gain)
    benchmark.conditions[f"tiles of {case}"] = _words(tiles)


def _time_two(benchmark: Benchmark, case: Case, layer: Layer, tiles: CpuTiles, pairs: int) -> None:
    """Compare the makespan of two threads with half a dense GEMM.

    What a dense GEMM takes on two threads stands beside it: they share caches and memory, and do
    not get to the half either.
    """
    pool = pool_of(_THREADS)

    def placed() -> dict[str, Contestant]:
        mine = _elsewhere(layer)
        together = {_TOGETHER: dense_on(case, mine[1], pool)}
        return {**_ours_and_dense(case, mine, tiles, pool), **together}

    _check(placed(), moe_reference(*layer))
    times = _interleaved(placed, pool, pairs)
    halves = [seconds / _THREADS for seconds in times[_DENSE]]
    share = paired_speedup(halves, times[_TUNED])
    held = share.median >= _SHARE_TWO
    _add(benchmark, f"{case}: dense / tuned, two threads", share, f">= {_SHARE_TWO}", held)
    for name in (_TOGETHER, _DEFAULT):
        gain = paired_speedup(times[name], times[_TUNED])
        _add(benchmark, f"{case}: {name} / tuned, two threads", gain)
    benchmark.conditions[f"tiles of {case}, two threads"] = _words(tiles)


def _ours_and_dense(case: Case, layer: Layer, tiles: CpuTiles, pool: Pool) -> dict[str, Contestant]:
    """Return what is compared on any number of threads."""
    return {
        _TUNED: partial(run_tiles, *layer, tiles, pool),
        _DEFAULT: partial(run_tiles, *layer, CpuTiles(), pool),
        _DENSE: dense(case, layer[1], fresh=True),
    }


def _interleaved(
    placed: Callable[[], dict[str, Contestant]], pool: Pool, pairs: int
) -> dict[str, list[float]]:
    """Return the CPU seconds of each in turn, caches cold; turns run forwards and backwards.

    Args:
        placed: Returns all of them on memory of their own, which none had before.
        pool: Whose time counts.
        pairs: Turns for each place in memory.
    """
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(_PLACES):
        contestants = placed()
        for compute in contestants.values():
            compute()  # packs weights, touches memory
        for turn in range(pairs):
            names = list(contestants)
            for name in reversed(names) if turn % 2 else names:
                clear_caches()
                times[name].append(pool.makespan(contestants[name]))
    return times


def _elsewhere(layer: Layer) -> Layer:
    """Return a layer in other memory: processes differ by some percent, likely by their pages."""
    hidden, experts, indices, weights = layer
    copied = Experts(experts.gate_up.clone(), experts.down.clone())
    return hidden.clone(), copied, indices.clone(), weights.clone()


def _check(contestants: dict[str, Contestant], wanted: torch.Tensor) -> None:
    """Stop where something else is computed: its time would mean nothing."""
    for name, compute in contestants.items():
        if name in _DENSES:
            continue
        off = float((compute() - wanted).abs().max() / wanted.abs().max())
        assert off <= _CLOSE, f"{name} differs from the reference by {off:.2g} of the largest value"


def _tiles(tuned: Sequence[Tuned], case: Case) -> CpuTiles:
    bucket = case.routed.bucket
    tiles = next(each.choice.tiles for each in tuned if each.choice.bucket == bucket)
    assert isinstance(tiles, CpuTiles)
    return tiles


def _words(tiles: CpuTiles) -> str:
    """Return tiles as a reader compares them."""
    passes = "one pass" if tiles.fused else "two passes"
    packed = "packed" if tiles.prepacked else "as they lie"
    return f"{tiles.rows} rows, {tiles.order}, {tiles.mapping}, {passes}, weights {packed}"


def _add(
    benchmark: Benchmark,
    figure: str,
    ratio: Interval,
    target: str = "",
    held: bool | None = None,
) -> None:
    benchmark.add(Row(figure, ratio.median, "x", target, held, ratio.ci95, ratio.n))


if __name__ == "__main__":
    main("moe", measure, __doc__ or "", _options)
