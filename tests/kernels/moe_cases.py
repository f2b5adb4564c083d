"""Layers and routings on which every implementation must equal the reference.

Run as a program, in a process of its own, it checks the Triton kernels: in the interpreter where
TRITON_INTERPRET=1 is set, else on the CUDA device.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ditune.db.moe import LayerTiles, MoeChoice, MoeShape, MoeTuning, TileConfig
from ditune.kernels.reference import Experts, moe_reference
from ditune.kernels.routing import route
from ditune.kernels.routing_bucket import routing_bucket
from ditune.kernels.triton_grouped_gemm import dtype_name, grouped_gemm
from ditune.kernels.triton_moe import moe, moe_triton
from ditune.kernels.triton_tiles import count_tiles
from ditune.kernels.variants import EVERY_KIND, Variant, kind_bit

BOUNDS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # of the largest value


@dataclass(frozen=True)
class Case:
    """Sizes of one layer and who is routed where."""

    name: str
    tokens: int
    experts: int
    hidden: int
    inner: int
    top_k: int
    routing: str = "random"

    def indices(self) -> Tensor:
        source = torch.Generator().manual_seed(1)
        shape = (self.tokens, self.top_k)
        found = torch.randint(0, self.experts, shape, generator=source)
        if self.routing == "one":
            found = torch.full(shape, self.experts - 1)
        elif self.routing == "holes":  # every third expert gets nothing
            found = found // 3 * 3
        elif self.routing == "foreign":  # some experts are on another device
            found = torch.where(found % 2 == 0, found, found + self.experts)
        elif self.routing == "each":  # the first expert gets all but one row for each other one
            found = torch.zeros(shape, dtype=torch.int64)
            found[: self.experts - 1, 0] = torch.arange(1, self.experts)
        return found


CASES = [
    Case("plain", 40, 4, 64, 48, 2),
    Case("one expert", 20, 1, 32, 32, 1),
    Case("no token", 0, 3, 32, 32, 2),
    Case("one token", 1, 5, 32, 32, 2),
    Case("odd sizes", 37, 3, 40, 24, 3),
    Case("all on one", 33, 7, 32, 32, 1, "one"),
    Case("holes", 50, 9, 32, 32, 2, "holes"),
    Case("foreign", 24, 4, 32, 32, 2, "foreign"),
    Case("rows of one", 40, 8, 32, 32, 1, "each"),
    Case("eight slots", 17, 12, 32, 32, 8),
    Case("five slots", 9, 6, 32, 32, 5),
    Case("odd rows of weights", 19, 3, 37, 19, 2),
]
EDGES = [
    Case(f"{rows} rows", rows, 2, 32, 32, 1, "one")
    for edge in (16, 32, 64, 128)
    for rows in (edge - 1, edge, edge + 1)
]
ON_DEVICE = ("one expert", "odd sizes", "holes", "foreign", "eight slots")
AT_EDGES = ("ptr", "low", "tma", "all at once")  # tiles of 16, 32, 64 and 128 rows


def layer(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Experts, Tensor, Tensor]:
    """Return tokens, weights, indices and routing weights of a case."""
    source = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source).to(device, dtype)

    experts = Experts(
        normal(case.experts, 2 * case.inner, case.hidden) / case.hidden**0.5,
        normal(case.experts, case.hidden, case.inner) / case.inner**0.5,
    )
    weights = torch.rand(case.tokens, case.top_k, generator=source).to(device, dtype)
    hidden = normal(case.tokens, case.hidden)
    return hidden, experts, case.indices().to(device), weights


def error(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference, in shares of the largest value; NaN counts as infinite."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    if wanted.numel() == 0:
        return 0.0
    scale = wanted.float().abs().max().clamp_min(1e-9)
    share = ((found.float() - wanted.float()).abs().max() / scale).item()
    return share if share == share else float("inf")


def changed(config: TileConfig, **fields: object) -> TileConfig:
    """Return a configuration with other values in some fields."""
    return TileConfig(**{**config.model_dump(), **fields})


def configurations(case: Case, dtype: torch.dtype) -> dict[str, tuple[TileConfig, TileConfig]]:
    """Return pairs of tile configurations, for the first GEMM and the second, by name."""
    small = TileConfig(block_m=16, block_n=32, block_k=16, num_warps=4, num_stages=2, group_m=2)
    wide = changed(small, block_m=64, block_n=64, block_k=32, group_m=8, order="desc")
    found = {
        "ptr": small,
        "64 by 64": wide,
        "persistent": changed(small, persistent=1, order="interleave", group_m=1),
        "swapped": changed(small, swap_ab=True, order="asc"),
        "split": changed(small, split_k=2),
        "low": changed(small, block_m=64, low_m=16),
    }
    pairs = {name: (config, config) for name, config in found.items()}
    hopper = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 9
    aligned = case.hidden * dtype.itemsize % 16 == case.inner * dtype.itemsize % 16 == 0
    if hopper and aligned:
        weights = changed(wide, path="tma_weights")
        pairs["tma"] = weights, changed(weights, path="tma")
        everything = changed(weights, block_m=128, low_m=32, block_k=16, split_k=2, persistent=1)
        everything = changed(everything, swap_ab=True)
        pairs["all at once"] = everything, changed(everything, path="tma", persistent=2)
    return pairs


def failures(case: Case, dtype: torch.dtype, device: str) -> Iterator[str]:
    """Yield a sentence for each configuration that is not the reference."""
    given = layer(case, dtype, device)
    wanted = moe_reference(*given)
    for name, (up, down) in configurations(case, dtype).items():
        if case in EDGES and name not in AT_EDGES:
            continue
        found = error(moe(*given, up, down), wanted)
        if found > BOUNDS[dtype]:
            yield f"{case.name}, {dtype}, {name}: off by {found:.2g} of the largest value"


def histograms() -> Iterator[list[int]]:
    """Yield rows of experts at and around every bound between kinds of routing."""
    source = torch.Generator().manual_seed(3)
    for experts in (1, 2, 3, 5, 8, 17, 33):
        yield [0] * experts
        for active in range(1, experts + 1):
            empty = [0] * (experts - active)
            for largest in {1, 4, *around(active, 2), *around(active, 8)}:
                yield [largest, *[4] * (active - 1), *empty]
            drawn = torch.randint(1, 40, (active,), generator=source) ** 2
            yield [*drawn.tolist(), *empty]


def around(active: int, factor: int) -> list[int]:
    """Return rows of one expert that are about `factor` times the mean, where others have 4."""
    if active <= factor:  # no expert has more than all rows: `active` times the mean
        return [1000]
    bound = 4 * factor * (active - 1) // (active - factor)
    return [bound - 1, bound, bound + 1]


def kind_failures(device: str) -> Iterator[str]:
    """Yield histograms whose kind is another one on the device than on the host."""
    for counts in histograms():
        bit = kind_bit(routing_bucket(counts, 1))
        rows = torch.tensor([0, *counts], device=device).cumsum(0)
        found = []
        for kinds in (bit, ~bit, EVERY_KIND):
            prefix = torch.empty(len(counts), dtype=torch.int64, device=device)
            padded = 1 << (len(counts) - 1).bit_length()
            count_tiles[(1,)](
                rows, rows, prefix, 1, kinds, E=len(counts), E_PAD=padded, BLOCK_M=1, SORT=False
            )
            found.append(int(prefix[-1]))
        if found != [sum(counts), 0, sum(counts)]:
            yield f"{counts} is of another kind on the device: {found}"


def tuned(dtype: torch.dtype) -> tuple[list[Case], MoeTuning]:
    """Return cases of four kinds of routing, and a tuning with tiles for all but the first."""
    cases = {}
    for routing in ("random", "one", "holes", "each"):
        case = Case(routing, 40, 9, 32, 32, 1, routing)
        counts = route(case.indices(), case.experts).counts
        cases[routing_bucket(counts, case.tokens)] = case
    configs = configurations(case, dtype)
    default, *others = (
        LayerTiles(up=configs[name][0], down=configs[name][1])
        for name in ("ptr", "split", "low", "swapped")
    )
    choices = tuple(
        MoeChoice(bucket=bucket, tiles=tiles, status="predicted", speedup=1.0)
        for bucket, tiles in zip(list(cases)[1:], others, strict=False)
    )
    name = dtype_name(torch.empty(0, dtype=dtype))
    shape = MoeShape(experts=9, hidden=32, inner=32, top_k=1, dtype=name)
    return list(cases.values()), MoeTuning(shape=shape, default=default, choices=choices)


def choice_failures(dtype: torch.dtype, device: str) -> Iterator[str]:
    """Yield routings that are not computed right by a tuning that has tiles for some of them."""
    cases, tuning = tuned(dtype)
    for case in cases:
        given = layer(case, dtype, device)
        found = error(moe_triton(*given, tuning), moe_reference(*given))
        if found > BOUNDS[dtype]:
            yield f"{case.name}, {dtype}, chosen: off by {found:.2g} of the largest value"


def graph_failures() -> Iterator[str]:
    """Yield routings that a graph, captured under the first of them, computes wrong."""
    cases, tuning = tuned(torch.bfloat16)
    hidden, experts, indices, weights = layer(cases[0], torch.bfloat16, "cuda")
    moe_triton(hidden, experts, indices, weights, tuning)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = moe_triton(hidden, experts, indices, weights, tuning)
    for case in cases:
        indices.copy_(case.indices())
        graph.replay()
        found = error(output, moe_reference(hidden, experts, indices, weights))
        if found > BOUNDS[torch.bfloat16]:
            yield f"{case.name}, replayed: off by {found:.2g} of the largest value"


def far_failures(dtype: torch.dtype, device: str) -> Iterator[str]:
    """Yield what goes wrong where a weight passes 2^31 elements; most of it is never touched."""
    experts, n, k = 1024, 2048, 1040
    weight = torch.empty(experts, n, k, dtype=dtype, device=device)
    weight[-1] = 1
    rows = torch.ones(1, k, dtype=dtype, device=device)
    routing = route(torch.tensor([[experts - 1]], device=device), experts)
    config = TileConfig(block_m=16, block_n=256, block_k=128, num_warps=4, num_stages=2)
    found = grouped_gemm(rows, weight, routing, [Variant(config)])
    if not bool((found == k).all()):
        yield f"far elements, {dtype}: {found.unique().tolist()} where all are {k}"


def found_failures(part: str, dtypes: list[torch.dtype], device: str) -> Iterator[str]:
    """Yield the failures of the part that is asked for."""
    if part == "graph":
        yield from graph_failures()
        return
    if part == "routings":
        yield from kind_failures(device)
        yield from far_failures(torch.float16, device)
        for dtype in dtypes:
            yield from choice_failures(dtype, device)
        return
    cases = CASES if part == "cases" else EDGES
    if device == "cuda" and part == "cases":  # each is compiled anew there
        cases = [case for case in cases if case.name in ON_DEVICE]
    for case in cases:
        for dtype in dtypes:
            yield from failures(case, dtype, device)


def main(arguments: argparse.Namespace) -> int:
    """Check one part under every configuration; return how many failed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = [torch.bfloat16] if device == "cuda" else [torch.float16]
    dtypes += [torch.float32] * (not arguments.quick)
    failed = list(found_failures(arguments.part, dtypes, device))
    print("\n".join([*failed, f"{len(failed)} failures"]))
    return len(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("cases", "edges", "routings", "graph"))
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one dtype: float16 on a CPU, where bfloat16 is misread",
    )
    sys.exit(min(main(parser.parse_args()), 1))
