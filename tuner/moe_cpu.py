"""Find the tiles of a layer of experts on this CPU, one bucket of routings after the other.

Heights of tiles are tried first, then what varies the best two of them; candidates that do not give
what the reference gives take no part. What is timed is CPU time, so that a busy machine does not
choose, and caches are cold: between two calls in a model lie other layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from ditune.db.errors import EvaluationFault
from ditune.db.moe import CpuTiles, ExpertOrder, Mapping, MoeChoice, MoeShape
from ditune.kernels.adapters.trial import difference
from ditune.kernels.cpu_pool import Pool, clear_caches, pool_of
from ditune.kernels.cpu_tiles import run_tiles
from ditune.kernels.reference import Experts, moe_reference
from ditune.tuner.drawn import experts_of, tokens_of
from ditune.tuner.moe import Progress, Routed, Tuned, by_bucket
from ditune.tuner.race import Heats, heat, race

ROWS = (64, 128, 256, 512, 1024, 2048)
ORDERS: tuple[ExpertOrder, ...] = ("desc", "id")
MAPPINGS: tuple[Mapping, ...] = ("dynamic", "static", "round_robin")
_HEATS: Heats = ((2, 4), (3, 2))
_FEWEST, _MOST, _RUN_OFF_S = 11, 31, 45.0  # rounds of the run-off, and about how long it takes


def timed(
    shape: MoeShape,
    routed: Sequence[Routed],
    progress: Progress,
    *,
    threads: int | None = None,
    prepack: bool = True,
) -> tuple[Tuned, ...]:
    """Return tiles for each bucket of routings, timed on this CPU.

    Memory: one layer of the shape, as much again where weights are packed, and the rows of the
    routings of a bucket.

    Args:
        shape: Of the layer.
        routed: The routings that matter.
        progress: Is told what is being done.
        threads: As many as the layer will be run with; by default as many as torch may use.
        prepack: Whether packed copies of the weights may be kept.

    Raises:
        UsageFault: No tokens have such a routing.
        EvaluationFault: The default does not compute what the reference does.
    """
    here, pool = torch.device("cpu"), pool_of(threads)
    experts = experts_of(shape, here)
    found = []
    for bucket, group in by_bucket(routed).items():
        progress(f"timing {group[0].name}")
        layers = []
        for each in group:
            hidden, indices, weights = tokens_of(each, shape, here)
            layers.append((hidden, experts, indices, weights))
        bench = _Bench(shape, layers, pool)
        largest = max(max(each.counts) for each in group)
        tiles, speedup = _raced(bench, candidates(largest, prepack=prepack))
        choice = MoeChoice(bucket=bucket, tiles=tiles, status="measured", speedup=speedup)
        busy = "1 thread" if pool.size == 1 else f"{pool.size} threads, the busiest counts"
        note = f"{bench.tried} tilings tried; CPU time of {busy}"
        us = 1e6 * bench.seconds(tiles) / len(group)
        found.append(Tuned(choice, tuple(each.name for each in group), us, note))
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
        yield tiles.model_copy(update={"fused": fused})


def dealt_otherwise(tiles: CpuTiles) -> Iterable[CpuTiles]:
    """Yield the same tiles in every order and with every mapping, which matters to threads."""
    for order, mapping in itertools.product(ORDERS, MAPPINGS):
        yield tiles.model_copy(update={"order": order, "mapping": mapping})


class _Bench:
    """Times tiles; the first run of each, which also packs weights, is compared and not timed."""

    def __init__(
        self, shape: MoeShape, layers: list[tuple[Tensor, Experts, Tensor, Tensor]], pool: Pool
    ) -> None:
        self._shape, self._layers, self.pool = shape, layers, pool
        self._wanted = [moe_reference(*layer) for layer in layers]
        self._fault: dict[CpuTiles, str] = {}

    @property
    def tried(self) -> int:
        """How many tilings were run."""
        return len(self._fault)

    def fault(self, tiles: CpuTiles) -> str:
        """Return how tiles differ from the reference under some routing; empty if they do not."""
        if tiles not in self._fault:
            found = (
                difference(wanted, run_tiles(*layer, tiles, self.pool), self._shape)
                for layer, wanted in zip(self._layers, self._wanted, strict=True)
            )
            self._fault[tiles] = next(filter(None, found), "")
        return self._fault[tiles]

    def seconds(self, tiles: CpuTiles) -> float:
        """Return the CPU seconds of one run of every routing; wrong results take for ever."""
        if self.fault(tiles):
            return math.inf
        found = 0.0
        for layer in self._layers:
            clear_caches()
            found += self.pool.makespan(partial(run_tiles, *layer, tiles, self.pool))
        return found


def _raced(bench: _Bench, tried: Iterable[CpuTiles]) -> tuple[CpuTiles, float]:
    """Return the tiles for routings that are alike, and their speedup over the default."""
    if fault := bench.fault(CpuTiles()):
        raise EvaluationFault(
            f"the default tiles do not give what the reference gives on this CPU: {fault}; report "
            "it with the shape of the layer, and do not use the CPU's tiles here"
        )
    best = heat(tried, bench.seconds, _HEATS)
    variations = (in_passes, dealt_otherwise) if bench.pool.size > 1 else (in_passes,)
    for vary in variations:
        best = heat(itertools.chain.from_iterable(map(vary, best)), bench.seconds, _HEATS)
    right = [tiles for tiles in best if not bench.fault(tiles)]
    once = bench.seconds(CpuTiles()) * bench.pool.size * (len(right) + 1)
    rounds = max(_FEWEST, min(_MOST, int(_RUN_OFF_S / once)))
    ended = race(right, CpuTiles(), bench.seconds, (), rounds)
    return ended.winner, ended.speedup.median
