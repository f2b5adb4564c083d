"""What the default tiles, and those picked for an H100, are compiled to: the same as was recorded.

Nothing runs and no GPU is needed. Triton is pinned, so figures are equal or something was changed:
a kernel, its constants, or the compiler. `--check` fails where they differ; `--renew` picks anew
and writes the record, some minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from benchmarks.moe_offline import GPU, SIZES, TOKENS
from benchmarks.rows import Benchmark, Row, main

from ditune.db.errors import UsageFault
from ditune.db.moe import MoeShape, TileConfig
from ditune.kernels.gemm import Gemm, layer_gemms
from ditune.kernels.hardware import SHARED_LIMITS
from ditune.kernels.offline import Compiled, compile_gemm, faults
from ditune.kernels.shipped import choose
from ditune.kernels.tile_space import DEFAULT
from ditune.tuner.moe_offline import COMPILED, compiler

RECORD = Path(__file__).parent / "figures" / "cpu" / "moe_compiled.json"
RENEWAL = "python -m benchmarks.moe_compiled --renew"
FIGURES = ("registers", "spill_bytes", "shared_bytes", "mma", "tma")


@dataclass(frozen=True)
class Kernel:
    """One configuration of one GEMM for one architecture.

    Args:
        layer: Its name in `SIZES`.
        half: "up" or "down".
        arch: The architecture.
        picked: Whether the tuner picked the tiles for an H100; else they are the default.
        config: The tiles.
    """

    layer: str
    half: str
    arch: int
    picked: bool
    config: TileConfig

    @property
    def name(self) -> str:
        """What it is, as words."""
        tiles = f"tiles picked for {GPU.name}" if self.picked else "default tiles"
        return f"{self.layer}, {self.half}, {tiles}, sm_{self.arch}"

    @property
    def gemm(self) -> Gemm:
        """What is computed."""
        return gemms(self.layer)[self.half]

    def compiled(self) -> Compiled:
        """Compile it."""
        return compile_gemm(self.gemm, self.config, self.arch)


def gemms(layer: str) -> dict[str, Gemm]:
    """Return both GEMMs of a layer in bfloat16, by half."""
    experts, hidden, inner, top_k = SIZES[layer]
    shape = MoeShape(experts=experts, hidden=hidden, inner=inner, top_k=top_k, dtype="bfloat16")
    return dict(zip(("up", "down"), layer_gemms(shape), strict=True))


def balanced(gemm: Gemm) -> tuple[int, ...]:
    """Return the rows of each expert that tiles are picked for."""
    return (TOKENS * gemm.top_k // gemm.experts,) * gemm.experts


def recorded() -> dict[Kernel, dict[str, object]]:
    """Return the kernels of the record and what they were compiled to.

    Raises:
        UsageFault: The record is of another compiler.
    """
    found = json.loads(RECORD.read_text(encoding="utf-8"))
    if found["triton"] != triton.__version__:
        raise UsageFault(
            f"{RECORD.name} holds what triton {found['triton']} compiled and this is triton "
            f"{triton.__version__}: look at what changes, and renew it with {RENEWAL}"
        )
    return {_kernel(**entry["kernel"]): entry["compiled"] for entry in found["kernels"]}


def differences(kernel: Kernel, wanted: dict[str, object]) -> Iterator[str]:
    """Yield a sentence for each figure that is not the recorded one, and each fault."""
    found = kernel.compiled()
    for figure in FIGURES:
        now, then = getattr(found, figure), wanted[figure]
        if now != then:
            yield (
                f"{kernel.name}: {figure} is {now!r} and was {then!r}; if that is meant, renew the "
                f"record with {RENEWAL}"
            )
    for fault in faults(found, kernel.config, kernel.arch):
        yield f"{kernel.name}: {fault}"


def measure(benchmark: Benchmark, arguments: argparse.Namespace) -> None:
    """Compile what is recorded and compare."""
    if arguments.renew:
        _renew()
    found: list[str] = []
    kernels = recorded()
    for kernel in list(kernels)[:: 9 if arguments.quick else 1]:
        differ = list(differences(kernel, kernels[kernel]))
        registers = float(str(kernels[kernel]["registers"]))
        row = Row(kernel.name, registers, "registers", "as recorded", not differ, status="compiled")
        benchmark.add(row)
        found += differ
    if arguments.check and found:
        sys.exit("\n".join(found))


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="fail where something differs")
    parser.add_argument("--renew", action="store_true", help="pick tiles anew and record all")


def _renew() -> None:
    lines = ",\n".join(json.dumps(_entry(kernel)) for kernel in _shipped())
    text = f'{{"triton": "{triton.__version__}", "kernels": [\n{lines}\n]}}\n'
    RECORD.write_text(text, encoding="utf-8")


def _entry(kernel: Kernel) -> dict[str, object]:
    """Return one kernel as it stands in the record."""
    found = kernel.compiled()
    return {
        "kernel": {**asdict(kernel), "config": kernel.config.model_dump()},
        "compiled": {name: getattr(found, name) for name in FIGURES},
    }


def _kernel(config: dict[str, Any], **fields: Any) -> Kernel:
    return Kernel(**fields, config=TileConfig.model_validate(config))


def _shipped() -> Iterator[Kernel]:
    """Yield the default tiles of every layer for every architecture, and the tuner's picks."""
    for layer in SIZES:
        for half, gemm in gemms(layer).items():
            for arch in SHARED_LIMITS:
                yield Kernel(layer, half, arch, False, DEFAULT)
            picked = choose(gemm, [[balanced(gemm)]], GPU, compiler(gemm, GPU), COMPILED).best[0]
            yield Kernel(layer, half, GPU.cc, True, picked.config)


if __name__ == "__main__":
    main("moe_compiled", measure, __doc__ or "", _options)
