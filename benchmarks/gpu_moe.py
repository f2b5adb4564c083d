"""The grouped GEMM on a GPU, in bf16: what share of a dense GEMM's speed it reaches.

Every routing is timed with every configuration, cold L2, beside one dense GEMM of equal operations,
`torch._grouped_mm` and a loop over experts on the same rows. Needs CUDA, sm_90 for all paths. The
times of all configurations are written beside the rows, to fit the cost model on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
import triton
from benchmarks.rows import Benchmark, Row, main
from torch import Tensor
from triton.errors import TritonError

from ditune.db.errors import UsageFault
from ditune.db.moe import (
    ExpertOrder,
    LayerTiles,
    MoeChoice,
    MoeShape,
    MoeTuning,
    TileConfig,
    TilePath,
)
from ditune.kernels.histograms import histogram
from ditune.kernels.reference import Experts, moe_reference
from ditune.kernels.routing import Routing, route
from ditune.kernels.routing_bucket import routing_bucket
from ditune.kernels.triton_grouped_gemm import grouped_gemm
from ditune.kernels.triton_moe import moe, moe_triton
from ditune.kernels.variants import Variant

_WORKERS = 12
_SIDE = 8192  # of the matrices whose product is the ceiling


@dataclass(frozen=True)
class Shape:
    """One layer: tokens and experts, and the sizes of its first GEMM."""

    name: str
    tokens: int
    experts: int
    top_k: int
    hidden: int
    inner: int

    @property
    def rows(self) -> int:
        """Routed rows."""
        return self.tokens * self.top_k

    def counts(self, routing: str) -> list[int]:
        """Return the rows of each expert under a routing.

        "zipf" is not that of `histogram`: r ** -1, and an expert may have more rows than there are
        tokens. Times under it are recorded by this name, and the model is held against them.
        """
        for kind in ("balanced", "best", "worst"):
            if routing == kind:
                return list(histogram(kind, self.tokens, self.experts, self.top_k))
        shares = [1.0 / (rank + 1) for rank in range(self.experts)]
        found = [int(self.rows * share / sum(shares)) for share in shares]
        found[0] += self.rows - sum(found)
        return found

    def indices(self, routing: str) -> Tensor:
        """Return experts of slots with exactly these counts, shuffled."""
        counts = torch.tensor(self.counts(routing))
        flat = torch.arange(self.experts).repeat_interleave(counts)
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(0))
        shuffled: Tensor = flat[order].reshape(self.tokens, self.top_k)
        return shuffled.cuda()


LARGE = Shape("4096 tokens", 4096, 64, 8, 3584, 2560)
SMALL = Shape("128 tokens", 128, 64, 8, 3584, 2560)
ROUTINGS = ("balanced", "best", "worst", "zipf")
PATHS: tuple[TilePath, ...] = ("ptr", "tma_weights", "tma")


def config(
    tile: tuple[int, int, int, int, int], *, path: TilePath = "ptr", persistent: int = 0
) -> TileConfig:
    """Return a configuration from (block_m, block_n, block_k, num_warps, num_stages)."""
    m, n, k, warps, stages = tile
    return TileConfig(
        block_m=m,
        block_n=n,
        block_k=k,
        num_warps=warps,
        num_stages=stages,
        path=path,
        persistent=persistent,
    )


def configurations(shape: Shape) -> list[TileConfig]:
    """Return what is tried: large tiles where there are many rows, low ones where there are few."""
    if shape.tokens >= 1024:
        tiles = [(128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 4)]
        tiles += [(128, 128, 64, 4, 4), (64, 256, 64, 4, 4), (128, 128, 128, 8, 3)]
    else:
        tiles = [(16, 128, 128, 4, 4), (16, 64, 128, 4, 5), (16, 128, 64, 4, 5)]
        tiles += [(32, 128, 128, 4, 4), (64, 128, 64, 4, 5), (16, 256, 64, 4, 5)]
    found = []
    for tile, path, stays in itertools.product(tiles, PATHS, (0, 1)):
        found.append(config(tile, path=path, persistent=stays))
    best = config(tiles[0], path="tma_weights", persistent=1)
    found += [best.model_copy(update={"group_m": g}) for g in (1, 16, 32)]
    orders: tuple[ExpertOrder, ...] = ("desc", "interleave")
    found += [best.model_copy(update={"order": order}) for order in orders]
    return found + special(shape, tiles)


def special(shape: Shape, tiles: list[tuple[int, int, int, int, int]]) -> list[TileConfig]:
    """Return tiles of two heights, swapped operands and shared depth, where each may pay."""
    if shape.tokens >= 1024:
        changes: list[dict[str, object]] = [
            {"low_m": 16},
            {"low_m": 16, "swap_ab": True},
            {"low_m": 16, "swap_ab": True, "path": "tma"},
            {"split_k": 2},
        ]
        high = config(tiles[3], path="tma_weights")
        return [high.model_copy(update=change) for change in changes]
    swapped = [
        config(tile, path=path).model_copy(update={"swap_ab": True})
        for tile in tiles[:4]
        for path in PATHS
    ]
    first = config(tiles[0])
    return swapped + [
        first.model_copy(update={"split_k": split, "swap_ab": swap})
        for split in (2, 4)
        for swap in (False, True)
    ]


@dataclass(frozen=True, eq=False)
class Inputs:
    """The first GEMM of a layer under one routing."""

    hidden: Tensor
    packed: Tensor
    weight: Tensor
    routing: Routing
    ones: Tensor

    @classmethod
    def of(cls, shape: Shape, routing: str, weight: Tensor) -> Inputs:
        """Draw tokens; rows are packed in advance for the path that needs it."""
        hidden = torch.randn(shape.tokens, shape.hidden, dtype=torch.bfloat16, device="cuda")
        routed = route(shape.indices(routing), shape.experts)
        ones = hidden.new_ones(shape.rows)
        return cls(hidden, hidden[routed.slots // shape.top_k], weight, routed, ones)

    def run(self, config: TileConfig) -> Tensor:
        """Run our kernel; packed rows are scaled, as in the second GEMM of a layer, by one."""
        tiles = [Variant(config)]
        if config.path == "tma":
            return grouped_gemm(self.packed, self.weight, self.routing, tiles, self.ones)
        return grouped_gemm(self.hidden, self.weight, self.routing, tiles)

    def loop(self) -> None:
        """Run one GEMM after the other; the counts are known to the host, which is generous."""
        for expert, (first, last) in enumerate(itertools.pairwise(self.bounds)):
            if last > first:
                torch.mm(self.packed[first:last], self.weight[expert].T)

    @property
    def bounds(self) -> list[int]:
        """First rows of the experts, and the end."""
        return list(self.routing.rows.tolist())


def weights(shape: Shape) -> Tensor:
    """Return the weights of the first GEMM."""
    size = (shape.experts, 2 * shape.inner, shape.hidden)
    drawn = torch.randn(size, dtype=torch.bfloat16, device="cuda")
    scaled: Tensor = drawn / float(shape.hidden) ** 0.5
    return scaled


def compile_one(work: tuple[Shape, TileConfig]) -> str:
    """Compile one configuration into Triton's cache, by running it; return what went wrong."""
    shape, config = work
    try:
        Inputs.of(shape, "balanced", weights(shape)).run(config)
        torch.cuda.synchronize()
    except (TritonError, RuntimeError) as fault:  # a compiler that gives up is a result
        return f"{config}: {type(fault).__name__}: {str(fault).splitlines()[0]}"
    return ""


def microseconds(work: Callable[[], object]) -> float:
    """Return the median time with a cold L2."""
    found = triton.testing.do_bench(work, warmup=15, rep=60, return_mode="median")
    return float(found) * 1000


def measure(benchmark: Benchmark, arguments: argparse.Namespace) -> None:
    """Check, then time."""
    if not torch.cuda.is_available():
        raise UsageFault("there is no CUDA device: this benchmark measures one")
    torch.manual_seed(0)
    ceiling = _ceiling(benchmark)
    shapes = [SMALL] if arguments.quick else [LARGE, SMALL]
    work = [(shape, config) for shape in shapes for config in configurations(shape)]
    with multiprocessing.get_context("spawn").Pool(_WORKERS) as pool:
        faults = [fault for fault in pool.map(compile_one, work, chunksize=1) if fault]
    for fault in faults:
        print(fault)
    sweep = []
    for shape in shapes:
        weight = weights(shape)
        for routing in ROUTINGS:
            inputs = Inputs.of(shape, routing, weight)
            times = dict(_timed(inputs, shape))
            sweep += [
                {"shape": asdict(shape), "routing": routing, "config": c.model_dump(), "us": t}
                for c, t in times.items()
            ]
            name = f"{shape.name}, {routing}"
            bad = len(configurations(shape)) - len(times)
            benchmark.add(Row(f"{name}: configurations that fail", bad, "", "0", bad == 0))
            _add(benchmark, name, inputs, times, ceiling)
        del weight, inputs
    _add_layer(benchmark)
    if arguments.json is not None:
        path = arguments.json.with_suffix(".sweep.json")
        path.write_text(json.dumps(sweep) + "\n", encoding="utf-8")


def _ceiling(benchmark: Benchmark) -> float:
    """Return the TFLOP/s of a large dense GEMM, and note the device's copy speed."""
    a, b = (torch.randn(_SIDE, _SIDE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    teraflops = 2 * _SIDE**3 / microseconds(lambda: a @ b) / 1e6
    benchmark.add(Row(f"dense {_SIDE}^3, the ceiling", teraflops, "TFLOP/s"))
    large = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(large)
    rate = 2 * large.numel() / microseconds(lambda: other.copy_(large)) / 1e3
    benchmark.add(Row("copy, read and write", rate, "GB/s"))
    return teraflops


def _timed(inputs: Inputs, shape: Shape) -> Iterator[tuple[TileConfig, float]]:
    """Yield configurations that are right, with their times."""
    wanted = torch.cat(
        [
            inputs.packed[first:last].float() @ inputs.weight[expert].float().T
            for expert, (first, last) in enumerate(itertools.pairwise(inputs.bounds))
        ]
    )
    for config in configurations(shape):
        try:
            found = inputs.run(config).float()
        except (TritonError, RuntimeError) as fault:  # too much shared memory shows only here
            print(config, type(fault).__name__, str(fault).splitlines()[0])
            continue
        wrong = (found - wanted).norm() / wanted.norm()
        if not wrong < 1e-2:
            print(f"WRONG by {wrong:.2g}: {config}")
            continue
        yield config, microseconds(partial(inputs.run, config))


def _add(
    benchmark: Benchmark, name: str, inputs: Inputs, times: dict[TileConfig, float], ceiling: float
) -> None:
    rows, n, k = inputs.packed.shape[0], *inputs.weight.shape[1:]
    flops = 2 * rows * n * k
    dense = inputs.weight[0]
    beside = {
        "one dense GEMM": lambda: inputs.packed @ dense.T,
        "loop": inputs.loop,
        "torch._grouped_mm": lambda: torch._grouped_mm(
            inputs.packed, inputs.weight.transpose(1, 2), inputs.routing.rows[1:].to(torch.int32)
        ),
    }
    lasted = {what: microseconds(work) for what, work in beside.items()}
    for what, us in lasted.items():
        benchmark.add(Row(f"{name}: {what}", us, "us"))
    for path in PATHS:
        mine = {c: t for c, t in times.items() if c.path == path}
        if not mine:
            continue
        best = min(mine, key=lambda c: mine[c])
        tiles = f"{best.block_m}x{best.block_n}x{best.block_k} w{best.num_warps}"
        tiles += f" s{best.num_stages} g{best.group_m} p{best.persistent} {best.order}"
        tiles += f" low{best.low_m} split{best.split_k} swap{int(best.swap_ab)}"
        benchmark.add(Row(f"{name}: {path}, {tiles}", mine[best], "us"))
        share = flops / mine[best] / 1e6 / ceiling
        benchmark.add(Row(f"{name}: {path} / ceiling", share, ""))
        benchmark.add(Row(f"{name}: dense / {path}", lasted["one dense GEMM"] / mine[best], "x"))
        rival = lasted["torch._grouped_mm"] / mine[best]
        benchmark.add(Row(f"{name}: torch._grouped_mm / {path}", rival, "x"))
    active = sum(last > first for first, last in itertools.pairwise(inputs.bounds))
    moved = 2 * (active * n * k + rows * (k + n))
    benchmark.add(Row(f"{name}: best", moved / min(times.values()) / 1e3, "GB/s at least"))


def _layer_tiles(**fields: object) -> LayerTiles:
    """Return the tiles of both GEMMs, with other values in some fields."""
    up = config((128, 128, 64, 8, 4), path="tma_weights").model_copy(update=fields)
    return LayerTiles(up=up, down=up.model_copy(update={"path": "tma"}))


def _tuning(shape: Shape) -> tuple[MoeTuning, dict[str, LayerTiles]]:
    """Return a tuning with tiles for each routing, and these by routing; all four kinds differ."""
    chosen = {
        "balanced": _layer_tiles(),
        "best": _layer_tiles(block_n=256, num_stages=3),
        "worst": _layer_tiles(low_m=16, swap_ab=True),
        "zipf": _layer_tiles(persistent=1, order="desc"),
    }
    choices = tuple(
        MoeChoice(
            bucket=routing_bucket(shape.counts(routing), shape.tokens),
            tiles=tiles,
            status="predicted",
            speedup=1.0,
        )
        for routing, tiles in chosen.items()
    )
    layer = MoeShape(
        experts=shape.experts,
        hidden=shape.hidden,
        inner=shape.inner,
        top_k=shape.top_k,
        dtype="bfloat16",
    )
    return MoeTuning(shape=layer, default=LayerTiles(), choices=choices), chosen


def _add_layer(benchmark: Benchmark) -> None:
    """Check and time the whole layer, and what it costs that the device chooses the tiles."""
    shape = LARGE
    down = torch.randn(
        shape.experts, shape.hidden, shape.inner, dtype=torch.bfloat16, device="cuda"
    )
    experts = Experts(weights(shape), down / shape.inner**0.5)
    hidden = torch.randn(shape.tokens, shape.hidden, dtype=torch.bfloat16, device="cuda")
    scale = torch.rand(shape.tokens, shape.top_k, dtype=torch.bfloat16, device="cuda")
    tuning, chosen = _tuning(shape)
    for routing, tiles in chosen.items():
        indices = shape.indices(routing)
        given = (hidden, experts, indices, scale)
        wanted = moe_reference(*given).float()
        found = moe_triton(*given, tuning).float()
        off = float((found - wanted).norm() / wanted.norm())
        benchmark.add(Row(f"layer, {routing}, chosen: error", off, "", "<= 0.01", off <= 1e-2))
        alone = microseconds(partial(moe, *given, tiles.up, tiles.down))
        benchmark.add(Row(f"layer, {routing}, these tiles alone", alone, "us"))
        us = microseconds(partial(moe_triton, *given, tuning))
        benchmark.add(Row(f"layer, {routing}, chosen among four", us, "us"))
        us = microseconds(partial(moe, *given, TileConfig(), TileConfig()))
        benchmark.add(Row(f"layer, {routing}, default", us, "us"))
    us = microseconds(partial(route, indices, shape.experts))
    benchmark.add(Row(f"layer, {routing}: routing alone", us, "us"))


if __name__ == "__main__":
    main("gpu_moe", measure, __doc__ or "")
