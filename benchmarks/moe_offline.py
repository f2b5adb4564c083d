"""What the cost model and the compiler say of shipped MoE tiles for an H100, without a GPU.

Nothing here is a measured speed: times are predictions. What was compiled for sm_90 is true of the
binary: registers, spills, matrix instructions. The model itself is held against times that others
published, and against times of every configuration that were measured on an H200.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_moe import Shape
from benchmarks.published_moe import POINTS, SOURCES, Point, error_factor, grid_best_us
from benchmarks.rows import Benchmark, Row, main

from ditune.db.moe import MoeShape, TileConfig
from ditune.kernels.cost_model import predict
from ditune.kernels.gemm import Gemm, layer_gemms
from ditune.kernels.hardware import GPUS
from ditune.kernels.offline import compile_gemm
from ditune.kernels.shipped import choose
from ditune.kernels.tile_space import sieve
from ditune.tuner.moe_offline import compiler

TOKENS = 8192
GPU = GPUS["h100"]
SIZES = {  # experts, hidden, inner, top_k
    "Mixtral 8x7B": (8, 4096, 14336, 2),
    "Qwen3-30B-A3B": (128, 2048, 768, 8),
    "NucleusMoE-Image": (128, 2048, 1344, 8),  # each expert takes 8 tokens in 128
}
_SWEEP = Path(__file__).parent / "figures" / "h200" / "gpu_moe.sweep.json"


def layers() -> Iterator[tuple[str, MoeShape]]:
    """Yield the layers as they are, and each with 64 experts."""
    for name, (experts, hidden, inner, top_k) in SIZES.items():
        for count in (experts, 64):
            yield (
                f"{name}, {count} experts",
                MoeShape(experts=count, hidden=hidden, inner=inner, top_k=top_k, dtype="bfloat16"),
            )


def measure(benchmark: Benchmark, arguments: argparse.Namespace) -> None:
    """Choose and compile tiles for both GEMMs of every layer; check the model and the sieve."""
    benchmark.conditions["predicted for"] = f"{GPU.name}, {TOKENS} tokens, the same rows per expert"
    limit = 4 if arguments.quick else 12
    for name, shape in list(layers())[: 1 if arguments.quick else None]:
        for which, gemm in zip(("up", "down"), layer_gemms(shape), strict=True):
            _add_gemm(benchmark, f"{name}, {which}", gemm, limit)
    for source in SOURCES:
        points = [point for point in POINTS if point.source == source]
        factor = error_factor(points)
        row = Row(f"vLLM {source}: error of the model", factor, "x", n=len(points))
        benchmark.add(_predicted(row, "<= 1.15", factor <= 1.15))
    _add_sieve(benchmark, POINTS[::9] if arguments.quick else POINTS)
    _add_sweep(benchmark)


def _predicted(row: Row, target: str = "", held: bool | None = None) -> Row:
    return Row(row.figure, row.value, row.unit, target, held, n=row.n, status="predicted")


def _add_gemm(benchmark: Benchmark, name: str, gemm: Gemm, limit: int) -> None:
    """Add what is shipped for one GEMM beside a dense one, the memory's time and the grid's best.

    The dense one has one expert with all rows; the memory's time is that of reading everything
    once.
    """
    rows = TOKENS * gemm.top_k
    counts = (rows // gemm.experts,) * gemm.experts
    shipped = choose(gemm, [[counts]], GPU, compiler(gemm, GPU), limit).best[0]
    dense = grid_best_us(Gemm(1, gemm.n, gemm.k, 1, gemm.dtype, gemm.gather), (rows,), GPU)
    moved = 2 * (gemm.experts * gemm.n * gemm.k + rows * (gemm.k + gemm.n))
    floor = max(dense, moved / (GPU.copy_share * GPU.gigabytes_per_s * 1e3))
    ratio = shipped.us / floor
    row = Row(f"{name}: shipped / dense or memory", ratio, "x")
    benchmark.add(_predicted(row, "<= 1.10", ratio <= 1.10))
    ratio = shipped.us / grid_best_us(gemm, counts, GPU)
    row = Row(f"{name}: shipped / best of the grid", ratio, "x")
    benchmark.add(_predicted(row, "<= 1.03", ratio <= 1.03))
    peak = 2 * rows * gemm.n * gemm.k / shipped.us / 1e6 / GPU.teraflops
    benchmark.add(_predicted(Row(f"{name}: share of the data sheet's peak", peak, "")))
    kernel = compile_gemm(gemm, shipped.config, GPU.cc)
    label = f"{name}: spilled, {kernel.registers} registers"
    held = kernel.spill_bytes == 0
    benchmark.add(Row(label, kernel.spill_bytes, "bytes", "0", held, status="compiled"))
    c = shipped.config
    label = f"{name}: {c.block_m}x{c.block_n}x{c.block_k} w{c.num_warps} s{c.num_stages} {c.path}"
    wide = kernel.mma == "HGMMA"
    label += f" has {kernel.mma}"
    benchmark.add(Row(label, float(wide), "HGMMA alone", "1", wide, status="compiled"))


def _add_sieve(benchmark: Benchmark, points: tuple[Point, ...]) -> None:
    """Add how much of the grid the sieve keeps, and what it costs."""
    worst, most, least = 1.0, 0, math.inf
    for point in points:
        counts = point.counts()
        for gemm in point.gemms:
            found = sieve(gemm, [counts], point.gpu)
            best = grid_best_us(gemm, counts, point.gpu)
            worst = max(worst, min(kept.us[0] for kept in found.kept) / best)
            most, least = max(most, len(found.kept)), min(least, found.left["grid"])
    row = Row("published points: best kept / best of the grid", worst, "x, worst", n=len(points))
    benchmark.add(_predicted(row, "<= 1.03", worst <= 1.03))
    row = Row(f"published points: kept of at least {least}", most, "at most", n=len(points))
    benchmark.add(_predicted(row, "<= 40", most <= 40))


def _add_sweep(benchmark: Benchmark) -> None:
    """Add how the model's pick did where every configuration was timed, on an H200.

    Where it has several equal picks, the slowest counts.
    """
    timed: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for entry in json.loads(_SWEEP.read_text(encoding="utf-8")):
        shape, config = Shape(**entry["shape"]), TileConfig.model_validate(entry["config"])
        sizes = (shape.experts, 2 * shape.inner, shape.hidden, shape.top_k)
        gemm = Gemm(*sizes, "bfloat16", gather=True)
        guess = predict(gemm, shape.counts(entry["routing"]), config, GPUS["h200"]).us
        timed[f"{shape.name}, {entry['routing']}"].append((guess, entry["us"]))
    for name, pairs in timed.items():
        least = min(guess for guess, _ in pairs)
        pick = max(us for guess, us in pairs if guess <= 1.0001 * least)
        regret = pick / min(us for _, us in pairs)
        row = Row(f"H200, {name}: the model's pick / fastest", regret, "x", n=len(pairs))
        benchmark.add(row)
        logs = [abs(math.log(guess / us)) for guess, us in pairs]
        factor = math.exp(sum(logs) / len(logs))
        benchmark.add(Row(f"H200, {name}: error of the model", factor, "x", n=len(pairs)))


if __name__ == "__main__":
    main("moe_offline", measure, __doc__ or "")
