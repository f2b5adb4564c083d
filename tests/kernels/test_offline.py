"""What grouped GEMMs compile to: the shared-memory law, matrix instructions, and what is refused.

Figures stand for Triton 3.6 to 3.9. Source of the law: byte-exact in 117 compiles of such kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ditune.db.errors import UsageFault
from ditune.db.moe import TileConfig, default_tiles
from ditune.kernels.gemm import Gemm
from ditune.kernels.hardware import SHARED_LIMITS
from ditune.kernels.offline import Compiled, compile_gemm, faults

UP = Gemm(64, 5120, 3584, 8, "bfloat16", gather=True)
DOWN = Gemm(64, 3584, 2560, 8, "bfloat16", gather=False)
FAST = {90: "HGMMA", 100: "UTCHMMA"}
GOOD = Compiled(100, 0, 1000, 8, "HGMMA", tma=True, instructions=900)


def tiles(block_m: int, num_stages: int = 3, **fields: object) -> TileConfig:
    found = {"block_m": block_m, "num_warps": 4, "num_stages": num_stages}
    return TileConfig.model_validate(found | fields)


def shared(config: TileConfig, arch: int) -> int:
    """The law, for 2-byte elements: matrix instructions of sm_90 on keep one step more."""
    wide = arch in FAST and (config.block_m >= 64 or config.swap_ab)
    steps = config.num_stages if wide else config.num_stages - 1
    return (config.block_m + config.block_n) * config.block_k * 2 * steps


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    ("gemm", "config"), [(UP, tiles(64)), (DOWN, tiles(128, num_warps=8)), (UP, tiles(16, 4))]
)
def test_pointer_kernels_follow_the_law(gemm: Gemm, config: TileConfig, arch: int) -> None:
    found = compile_gemm(gemm, config, arch)
    if arch == 100:  # barriers of its matrix unit
        assert 0 <= found.shared_bytes - shared(config, arch) <= 16
    else:
        assert shared(config, arch) == found.shared_bytes
    expected = FAST.get(arch, "HMMA") if config.block_m >= 64 else "HMMA"
    assert (expected, False, 0) == (found.mma, found.tma, found.spill_bytes)
    assert faults(found, config, arch) == ()


@pytest.mark.parametrize("arch", SHARED_LIMITS)
def test_the_default_of_float32_runs_everywhere(arch: int) -> None:
    config = default_tiles("float32").up
    found = compile_gemm(replace(UP, dtype="float32"), config, arch)
    assert found.shared_bytes <= SHARED_LIMITS[arch]
    assert faults(found, config, arch) == ()


@pytest.mark.parametrize("arch", [90, 100])
def test_swapped_low_tiles_have_the_fast_instructions(arch: int) -> None:
    config = tiles(16, 4, swap_ab=True)
    found = compile_gemm(UP, config, arch)
    assert found.mma == FAST[arch]
    assert 0 <= found.shared_bytes - shared(config, arch) <= 16
    assert found.registers < compile_gemm(UP, tiles(16, 4), arch).registers
    assert faults(found, config, arch) == ()


@pytest.mark.parametrize(
    ("gemm", "config"), [(UP, tiles(64, path="tma_weights")), (DOWN, tiles(64, path="tma"))]
)
def test_descriptors_load_by_hardware(gemm: Gemm, config: TileConfig) -> None:
    found = compile_gemm(gemm, config, 90)
    assert (found.tma, found.mma, found.spill_bytes) == (True, "HGMMA", 0)
    assert 0 < found.shared_bytes - shared(config, 90) <= 40  # barriers
    before = compile_gemm(gemm, config, 80)
    assert any("rewritten to pointers" in fault for fault in faults(before, config, 80))


def test_two_heights_hold_both_kinds_of_instructions() -> None:
    config = tiles(128, low_m=16, num_warps=8)
    found = compile_gemm(UP, config, 90)
    assert (found.mma, found.shared_bytes) == ("HMMA+HGMMA", shared(config, 90))
    assert faults(found, config, 90) == ()
    swapped = tiles(128, low_m=16, num_warps=8, swap_ab=True)
    assert compile_gemm(UP, swapped, 90).mma == "HGMMA"


def test_everything_at_once_compiles_without_a_fault() -> None:
    config = tiles(128, low_m=16, num_warps=8, swap_ab=True, split_k=2, path="tma", persistent=1)
    assert faults(compile_gemm(DOWN, config, 90), config, 90) == ()


def test_one_expert_and_sizes_that_are_no_multiples_compile() -> None:
    odd = Gemm(1, 5120 + 16, 3584 + 16, 1, "float16", gather=True)
    assert faults(compile_gemm(odd, tiles(64), 90), tiles(64), 90) == ()
    ragged = Gemm(1, 5119, 3583, 1, "float16", gather=True)  # element by element: legal, but slow
    assert compile_gemm(ragged, tiles(64), 90).spill_bytes > 0


def test_float32_has_no_matrix_instructions() -> None:
    found = compile_gemm(replace(UP, dtype="float32"), tiles(64, block_n=64, block_k=32), 90)
    assert found.mma == ""
    assert faults(found, tiles(64, block_n=64, block_k=32), 90) == ()


def test_spills_are_found() -> None:
    config = tiles(256, block_n=256, num_warps=8)
    found = compile_gemm(UP, config, 90)
    assert found.spill_bytes > 0
    assert any("spilled" in fault for fault in faults(found, config, 90))


def test_faults_say_what_is_wrong() -> None:
    pointers = tiles(64)
    assert faults(GOOD, pointers, 90) == ()
    large = replace(GOOD, shared_bytes=SHARED_LIMITS[90] + 1)
    assert "pass the 232448 of sm_90" in faults(large, pointers, 90)[0]
    slow = replace(GOOD, mma="HMMA", tma=False)
    both = faults(slow, tiles(64, path="tma"), 90)
    assert ["HMMA where sm_90 has HGMMA" in both[0], '"tma" was rewritten' in both[1]] == [True] * 2


def test_unknown_architectures_are_refused() -> None:
    with pytest.raises(UsageFault, match="use one of 80, 86"):
        compile_gemm(UP, tiles(64), 70)


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> None:
        raise FileNotFoundError("no such file")

    compile_gemm(UP, tiles(64), 80)  # the compiler starts programs of its own
    monkeypatch.setattr(subprocess, "run", gone)
    with pytest.raises(UsageFault, match="cuobjdump comes with Triton"):
        compile_gemm(UP, tiles(64), 80)


def test_interpreted_kernels_are_refused() -> None:
    root = Path(__file__).parents[2]
    code = (
        "from ditune.kernels.offline import *\n"
        "compile_gemm(Gemm(2, 32, 32, 1, 'float16', gather=True), TileConfig(), 80)"
    )
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "start one without TRITON_INTERPRET" in done.stderr
