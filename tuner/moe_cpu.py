"""Find the tiles of an expert layer on this CPU, one kind of routing after the other.

Candidates are gated by the reference, then halved: all are timed in turn, the slower half is left
out, and so on. The best two meet the default anew, in pairs; it stays
unless one of them is faster with confidence. What is timed is CPU time, so that a busy machine does
not choose.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from ditune.db.errors import EvaluationFault, UsageFault
from ditune.db.moe import CpuTiles, ExpertOrder, Mapping, MoeChoice, MoeShape, MoeTuning
from ditune.kernels.cpu_pool import Pool, pool_of
from ditune.kernels.cpu_tiles import run_tiles
from ditune.kernels.reference import Experts, moe_reference
from ditune.kernels.routing_bucket import routing_bucket
from ditune.profiler.statistics import paired_speedup
from ditune.tuner.moe import Routed, Tuned, by_bucket
from ditune.tuner.progress import Progress, Quiet, Stage

Seconds = Callable[[CpuTiles], float]
ROWS = (64, 128, 256, 512, 1024)
ORDERS: tuple[ExpertOrder, ...] = ("desc", "id")
MAPPINGS: tuple[Mapping, ...] = ("dynamic", "static", "round_robin")
PAIRS = 7  # of the last comparison
_LOOKS = 2  # so many times as many pairs, as long as nothing is proved
_ROUNDS = 2  # timings of every candidate before half of them are left out; one may be disturbed
_FINALISTS = 2
_SHOWN = 5  # runs whose median is shown
_BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}  # of the largest value


def tune_cpu(
    shape: MoeShape,
    routings: Sequence[Sequence[int]],
    *,
    threads: int | None = None,
    prepack: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> MoeTuning:
    """Return the tiles of a layer for every bucket that some routings fall into.

    Weights, tokens and the order of slots are drawn at random. Memory: one layer of the shape, as
    much again where weights are packed, and the rows of the largest routing.

    Args:
        shape: Of the layer.
        routings: Rows of each expert, [experts] whole numbers each; those of one bucket are timed
            together.
        threads: As many as the layer will be run with; by default as many as torch may use.
        prepack: Whether packed copies of the weights may be kept.
        seed: Of all that is drawn.
        progress: Told which bucket is tuned.

    Returns:
        The tuning, its choices measured; their speedup is that over the default.

    Raises:
        UsageFault: A routing has another number of experts, or no whole number of tokens.
        EvaluationFault: The default does not compute what the reference does.
    """
    pool, progress = pool_of(threads), progress or Quiet()
    source = torch.Generator().manual_seed(seed)
    experts = _experts(shape, source)
    buckets = defaultdict(list)
    for counts in routings:
        buckets[routing_bucket(counts, _tokens(shape, counts))].append(counts)
    choices = []
    for number, (bucket, alike) in enumerate(buckets.items()):
        note = f"{bucket.tokens} tokens, {bucket.skew}, active 1/{2**bucket.active}"
        progress.update("search", number, len(buckets), note)
        bench = _Bench([_Trial(shape, experts, counts, source) for counts in alike], pool)
        largest = max(max(counts) for counts in alike)
        tiles, speedup = _tuned(bench, candidates(largest, prepack=prepack), pool.size)
        choices.append(MoeChoice(bucket=bucket, tiles=tiles, status="measured", speedup=speedup))
    progress.update("search", len(buckets), len(buckets), "tuned")
    return MoeTuning(shape=shape, default=CpuTiles(), choices=tuple(choices))


class _Said:
    """A progress that says what is tuned."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def update(self, stage: Stage, done: int, total: int, note: str) -> None:
        """Say it."""
        self._say(f"timing {note}, {done} of {total}")


def timed(
    shape: MoeShape, routed: Sequence[Routed], progress: Callable[[str], None]
) -> tuple[Tuned, ...]:
    """Return tiles for each bucket of routings, timed on this CPU.

    Args:
        shape: Of the layer.
        routed: The routings that matter.
        progress: Is told what is being done.

    Raises:
        UsageFault, EvaluationFault: As `tune_cpu` does.
    """
    tuning = tune_cpu(shape, [each.counts for each in routed], progress=_Said(progress))
    source, pool, found = torch.Generator().manual_seed(1), pool_of(), []
    experts = _experts(shape, source)
    for choice, group in zip(tuning.choices, by_bucket(routed).values(), strict=True):
        assert isinstance(choice.tiles, CpuTiles)
        trial = _Trial(shape, experts, group[0].counts, source)
        run = partial(run_tiles, *trial.given, choice.tiles, pool)
        us = 1e6 * statistics.median(pool.makespan(run) for _ in range(_SHOWN))
        busy = "1 thread" if pool.size == 1 else f"{pool.size} threads, the busiest counts"
        found.append(Tuned(choice, tuple(each.name for each in group), us, f"CPU time on {busy}"))
    return tuple(found)


def candidates(largest: int, *, prepack: bool) -> Iterable[CpuTiles]:
    """Yield tiles of several heights to try first, the rest of them as in the default.

    Args:
        largest: Rows of the largest expert; of all tiles that hold it whole, one is tried.
        prepack: Whether weights may be packed.
    """
    lower = [rows for rows in ROWS if rows < largest]
    heights = [*lower, *ROWS[len(lower) : len(lower) + 1]]
    for rows, prepacked in itertools.product(heights, (False, True) if prepack else (False,)):
        yield CpuTiles(rows=rows, prepacked=prepacked)


def in_passes(tiles: CpuTiles) -> Iterable[CpuTiles]:
    """Yield the same tiles with both GEMMs in one task, and in two passes."""
    for fused in (True, False):
        yield CpuTiles(**{**tiles.model_dump(), "fused": fused})


def dealt_otherwise(tiles: CpuTiles) -> Iterable[CpuTiles]:
    """Yield the same tiles in every order and with every mapping, which matters to threads."""
    for order, mapping in itertools.product(ORDERS, MAPPINGS):
        yield CpuTiles(**{**tiles.model_dump(), "order": order, "mapping": mapping})


def halved(tiles: Iterable[CpuTiles], seconds: Seconds) -> list[CpuTiles]:
    """Return the fastest two, the faster first, or fewer where there are not as many.

    Args:
        tiles: What is tried, in turn: what drifts hits all alike.
        seconds: Time of one run. Foreign load only adds, so the least time counts.
    """
    left = list(dict.fromkeys(tiles))
    least = dict.fromkeys(left, float("inf"))
    keep = len(left)
    while keep > _FINALISTS:
        for one in left * _ROUNDS:
            least[one] = min(least[one], seconds(one))
        keep = max(_FINALISTS, len(left) // 2)
        left = sorted(left, key=lambda one: least[one])[:keep]
    return left


def run_off(finalists: Iterable[CpuTiles], seconds: Seconds) -> tuple[CpuTiles, float]:
    """Return what is faster than the default with confidence, and by how much; else the default.

    Args:
        finalists: What is compared with it in interleaved pairs.
        seconds: Time of one run.
    """
    default = CpuTiles()
    times: dict[CpuTiles, list[float]] = {one: [] for one in (default, *finalists)}
    proved: list[tuple[CpuTiles, float]] = []
    for _ in range(_LOOKS):
        for turn in range(PAIRS):
            runners = list(times)
            for one in reversed(runners) if turn % 2 else runners:
                times[one].append(seconds(one))
        found = [(one, paired_speedup(times[default], times[one])) for one in times]
        proved = [(one, gain.median) for one, gain in found if gain.ci95[0] > 1.0]
        if proved:
            break
    return max(proved, key=lambda pair: pair[1], default=(default, 1.0))


class _Trial:
    """One routing of the layer, and what has to come out."""

    def __init__(
        self, shape: MoeShape, experts: Experts, counts: Sequence[int], source: torch.Generator
    ) -> None:
        flat = torch.arange(shape.experts).repeat_interleave(torch.tensor(counts))
        order = torch.randperm(len(flat), generator=source)
        indices = flat[order].reshape(-1, shape.top_k)
        hidden = torch.randn(len(indices), shape.hidden, generator=source)
        weights = torch.rand(indices.shape, generator=source)
        self.given = hidden.to(experts.down.dtype), experts, indices, weights
        self._wanted = moe_reference(*self.given).float()
        self._bound = _BOUNDS[shape.dtype] * float(self._wanted.abs().max()) if len(flat) else 0.0

    def right(self, found: Tensor) -> bool:
        """Whether that is what the reference gives."""
        return bool(((found.float() - self._wanted).abs() <= self._bound).all())  # NaN is wrong


class _Bench:
    """Times tiles; the first run of each, which also packs weights, is compared and not timed."""

    def __init__(self, trials: list[_Trial], pool: Pool) -> None:
        self._trials, self._pool = trials, pool
        self._right: dict[CpuTiles, bool] = {}

    def right(self, tiles: CpuTiles) -> bool:
        """Whether tiles give what the reference gives, for every routing."""
        if tiles not in self._right:
            self._right[tiles] = all(
                trial.right(run_tiles(*trial.given, tiles, self._pool)) for trial in self._trials
            )
        return self._right[tiles]

    def seconds(self, tiles: CpuTiles) -> float:
        """Return the CPU seconds of one run of every routing; wrong results take for ever."""
        if not self.right(tiles):
            return float("inf")
        return sum(
            self._pool.makespan(partial(run_tiles, *trial.given, tiles, self._pool))
            for trial in self._trials
        )


def _tuned(bench: _Bench, tried: Iterable[CpuTiles], threads: int) -> tuple[CpuTiles, float]:
    """Return the tiles for routings that are alike, and their speedup over the default."""
    if not bench.right(CpuTiles()):
        raise EvaluationFault(
            "the default tiles do not give what the reference gives on this CPU; report it with "
            "the shape of the layer, and do not use the CPU's tiles here"
        )
    best = halved(tried, bench.seconds)
    variations = (in_passes, dealt_otherwise) if threads > 1 else (in_passes,)
    for vary in variations:
        best = halved(itertools.chain.from_iterable(map(vary, best)), bench.seconds)
    return run_off(filter(bench.right, best), bench.seconds)


def _experts(shape: MoeShape, source: torch.Generator) -> Experts:
    def normal(rows: int, columns: int) -> Tensor:
        drawn = torch.randn(shape.experts, rows, columns, generator=source)
        return drawn.mul_(columns**-0.5).to(getattr(torch, shape.dtype))

    return Experts(normal(2 * shape.inner, shape.hidden), normal(shape.hidden, shape.inner))


def _tokens(shape: MoeShape, counts: Sequence[int]) -> int:
    """Return the tokens that make these rows."""
    if len(counts) != shape.experts or sum(counts) % shape.top_k or min(counts) < 0:
        raise UsageFault(
            f"a routing of this layer has rows for {shape.experts} experts, {shape.top_k} for each "
            f"token, but one has {sum(counts)} rows on {len(counts)} experts"
        )
    return sum(counts) // shape.top_k
