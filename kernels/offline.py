"""What a configuration becomes for an architecture: compiled and looked at, without a GPU.

Triton's compiler and NVIDIA's disassembler come with Triton, so registers, spills, shared memory
and the kind of matrix instructions are known before anything runs. The constants are those of the
launch, see `launch.constants`. The process must not be in Triton's interpreter mode.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.errors import TritonError
from triton.runtime import JITFunction

from ditune.db.errors import UsageFault
from ditune.db.moe import TileConfig
from ditune.kernels.gemm import Gemm
from ditune.kernels.hardware import SHARED_LIMITS
from ditune.kernels.launch import checked, constants, options
from ditune.kernels.matrix_path import matrix_path
from ditune.kernels.triton_tiles import grouped_gemm_kernel

_POINTERS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_MATRIX = ("HMMA", "HGMMA", "UTCHMMA")  # the mma.sync, wgmma and tcgen05 families
_MNEMONIC = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Compiled:
    """What a compiled grouped GEMM needs and consists of.

    Args:
        registers: Of a thread.
        spill_bytes: Stack of a thread; the kernel has no other use for one than spilled registers.
        shared_bytes: Shared memory of a program.
        num_warps: Warps of a program; the compiler may add some.
        mma: Matrix instructions: "HMMA", "HGMMA" (sm_90), "UTCHMMA" (sm_100), several joined by "+"
            where tiles of two heights differ, or "" where there are none, as for float32.
        tma: Whether anything is loaded through tensor descriptors by hardware.
        instructions: Length of the code, without padding.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int
    mma: str
    tma: bool
    instructions: int


def compile_gemm(gemm: Gemm, config: TileConfig, arch: int) -> Compiled:
    """Return what a grouped GEMM compiles to for an architecture; 1 to 4 s, then from the cache.

    Args:
        gemm: Shape; its width and depth count as far as they are multiples of 16 and of `block_k`.
        config: Tiles and launch.
        arch: 80, 86, 89, 90, 100 or 120.

    Raises:
        UsageFault: The configuration cannot compute this GEMM, the compiler gives up on it, the
            architecture is unknown, or this process cannot compile.
    """
    if arch not in SHARED_LIMITS:
        known = ", ".join(str(name) for name in SHARED_LIMITS)
        raise UsageFault(f"architecture {arch} is unknown; use one of {known}")
    if not isinstance(grouped_gemm_kernel, JITFunction):
        raise UsageFault(
            "kernels are interpreted in this process and cannot be compiled: start one without "
            "TRITON_INTERPRET"
        )
    source = kernel_source(gemm, checked(config, gemm))
    try:
        found = triton.compile(source, GPUTarget("cuda", arch, 32), options(config))
    except (TritonError, RuntimeError) as fault:  # what passes of the compiler raise has no name
        first = (str(fault).splitlines() or [type(fault).__name__])[0]
        raise UsageFault(f"sm_{arch} does not compile {config!r}: {first}") from fault
    return _inspected(found)


def faults(compiled: Compiled, config: TileConfig, arch: int) -> tuple[str, ...]:
    """Return what is wrong with a compiled configuration, a sentence each; nothing if it may run.

    Args:
        compiled: What `compile_gemm` found for this configuration and architecture.
        config: The configuration.
        arch: The architecture.
    """
    found = []
    if compiled.spill_bytes:
        found.append(
            f"{compiled.spill_bytes} bytes of each thread's registers are spilled: use smaller "
            "tiles or more warps"
        )
    if compiled.shared_bytes > SHARED_LIMITS[arch]:
        found.append(
            f"{compiled.shared_bytes} bytes of shared memory pass the {SHARED_LIMITS[arch]} of "
            f"sm_{arch}: use fewer stages or smaller tiles"
        )
    wanted = matrix_path(config, "bfloat16", arch)  # float32 has none: `mma` is empty
    if compiled.mma and wanted not in compiled.mma.split("+"):
        found.append(f"matrix instructions are {compiled.mma} where sm_{arch} has {wanted}")
    if config.path != "ptr" and not compiled.tma:
        found.append(
            f'the path "{config.path}" was rewritten to pointers, which are slow: use "ptr" on '
            f"sm_{arch}"
        )
    return tuple(found)


def kernel_source(gemm: Gemm, config: TileConfig) -> ASTSource:
    """Return the kernel with its arguments as a launch has them."""
    dtype = _POINTERS[gemm.dtype]
    fixed = constants(gemm, config)
    x = x_low = w = f"*{dtype}"
    if fixed["TMA_X"]:
        x = f"tensordesc<{dtype}[{config.block_m}, {config.block_k}]>"
        x_low = f"tensordesc<{dtype}[{config.low_m or config.block_m}, {config.block_k}]>"
    if fixed["TMA_W"]:
        w = f"tensordesc<{dtype}[{config.block_n}, {config.block_k}]>"
    kinds = {
        "x_ptr": x,
        "x_low_ptr": x_low,
        "w_ptr": w,
        "out_ptr": "*fp32" if config.split_k > 1 else f"*{dtype}",
        "slots_ptr": "*i64",
        "scale_ptr": "*i64" if gemm.gather else f"*{dtype}",
        "prefix_ptr": "*i64",
        "order_ptr": "*i64",
        "rows_ptr": "*i64",
    }
    sizes = {"N": gemm.n, "K": gemm.k, "stride_x": gemm.k, "stride_w": gemm.k, "stride_out": gemm.n}
    signature = {**kinds, **dict.fromkeys(sizes, "i32"), **dict.fromkeys(fixed, "constexpr")}
    # a launch tells the compiler what is aligned; without these it is another, slower kernel
    aligned = [kind.startswith("*") for kind in kinds.values()]
    aligned += [size % 16 == 0 for size in sizes.values()]
    attributes = {(at,): [["tt.divisibility", 16]] for at, yes in enumerate(aligned) if yes}
    return ASTSource(grouped_gemm_kernel, signature, dict(fixed), attributes)


def _inspected(found: CompiledKernel) -> Compiled:
    """Return what stands in the binary and in the compiler's notes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(found.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
        code = _tool("nvdisasm", "-c", str(path))
    resources = _RESOURCES.search(usage)
    if resources is None:
        raise UsageFault(f"cuobjdump names no registers: {usage!r}; is Triton's own one replaced?")
    registers, stack, local = (int(value) for value in resources.groups())
    mix = Counter(_MNEMONIC.findall(code))
    return Compiled(
        registers=registers,
        spill_bytes=max(stack, local),
        shared_bytes=int(found.metadata.shared),
        num_warps=int(found.metadata.num_warps),
        mma="+".join(name for name in _MATRIX if mix[name]),
        tma=mix["UTMALDG"] > 0,
        instructions=mix.total() - mix["NOP"],
    )


def _tool(name: str, *arguments: str) -> str:
    """Return what one of Triton's bundled tools prints."""
    try:
        program = getattr(triton.knobs.nvidia, name).path
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as fault:
        raise UsageFault(
            f"{name} comes with Triton for Linux, but does not run here ({fault}): install the "
            "wheel of Triton anew, or do without the compile"
        ) from fault
    return done.stdout
