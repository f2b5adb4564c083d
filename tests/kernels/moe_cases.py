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

from ditune.db.moe import TileConfig
from ditune.kernels.reference import Experts, moe_reference
from ditune.kernels.triton_moe import moe

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
]
EDGES = [
    Case(f"{rows} rows", rows, 2, 32, 32, 1, "one")
    for edge in (16, 32, 64, 128)
    for rows in (edge - 1, edge, edge + 1)
]


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


def configurations() -> Iterator[tuple[str, TileConfig, TileConfig]]:
    """Yield pairs of tile configurations, for the first GEMM and the second."""
    small = TileConfig(block_m=16, block_n=32, block_k=16, num_warps=4, num_stages=2, group_m=2)
    yield "ptr", small, small
    wide = changed(small, block_m=64, block_n=64, block_k=32, group_m=8, order="desc")
    yield "ptr, 64 by 64", wide, wide
    stays = changed(small, persistent=1, order="interleave", group_m=1)
    yield "persistent", stays, stays
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 9:
        weights = changed(wide, path="tma_weights")
        yield "tma", weights, changed(weights, path="tma")
        yield (
            "tma, persistent",
            changed(weights, persistent=1),
            changed(wide, path="tma", persistent=2),
        )


def failures(case: Case, dtype: torch.dtype, device: str) -> Iterator[str]:
    """Yield a sentence for each configuration that is not the reference."""
    given = layer(case, dtype, device)
    wanted = moe_reference(*given)
    for name, up, down in configurations():
        found = error(moe(*given, up, down), wanted)
        if found > BOUNDS[dtype]:
            yield f"{case.name}, {dtype}, {name}: off by {found:.2g} of the largest value"


def main(arguments: argparse.Namespace) -> int:
    """Check every case under every configuration; return how many failed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = [torch.float16] if arguments.quick else [torch.float32, torch.float16]
    dtypes += [torch.bfloat16] * (device == "cuda")  # the interpreter takes it for something else
    cases = CASES if arguments.quick else CASES + EDGES
    cases = [case for case in cases if arguments.case in ("", case.name)]
    failed = [f for case in cases for dtype in dtypes for f in failures(case, dtype, device)]
    print("\n".join([*failed, f"{len(cases)} cases, {len(failed)} failures"]))
    return len(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases, one dtype on a CPU")
    parser.add_argument("--case", default="", help="this case alone")
    sys.exit(min(main(parser.parse_args()), 1))
