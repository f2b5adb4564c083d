"""What a grouped GEMM is compiled with: one place, for the launch and for the offline compile."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from ditune.db.errors import UsageFault
from ditune.db.moe import TileConfig
from ditune.kernels.gemm import ITEM_BYTES, Gemm
from ditune.kernels.task_map import ceil_div

MOST_EXPERTS = 1024  # a program loads the whole prefix at once
_TMA_BOX = 256  # elements of a side of what one descriptor reads
_INT32 = 2**31

Constant = int | bool | str


def checked(config: TileConfig, gemm: Gemm) -> TileConfig:
    """Return the configuration if this GEMM can be computed with it.

    Every other combination of fields is allowed: low tiles, shared depth, swapped operands, paths,
    orders and persistent programs combine.

    Raises:
        UsageFault: It cannot; the message names the first reason.
    """
    for fault in _faults(config, gemm):
        raise UsageFault(fault)
    return config


@functools.lru_cache(maxsize=1024)
def constants(gemm: Gemm, config: TileConfig) -> dict[str, Constant]:
    """Return the compile-time constants of `grouped_gemm_kernel`, by parameter; do not change them.

    Raises:
        UsageFault: The GEMM cannot be computed with this configuration, see `checked`.
    """
    checked(config, gemm)
    return {
        "E": gemm.experts,
        "E_PAD": 1 << (gemm.experts - 1).bit_length(),
        "TOP_K": gemm.top_k,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "LOW_M": config.low_m,
        "SPLIT_K": config.split_k,
        "SWAP_AB": config.swap_ab,
        "GATHER": gemm.gather,
        "SCALE": not gemm.gather and config.split_k == 1,  # parts are scaled when they are summed
        "TMA_X": config.path == "tma",
        "TMA_W": config.path != "ptr",
        "EVEN_K": gemm.k % config.block_k == 0,
        "PRECISION": "ieee" if gemm.dtype == "float32" else "tf32",
        "SORT": config.order != "id",
        "PERSISTENT": config.persistent > 0,
    }


def options(config: TileConfig) -> dict[str, int | bool]:
    """Return the compiler options of a configuration.

    Fusing multiplications with additions is asked for by name: newer versions of Triton change what
    they do when nothing is said, and with it registers and results.
    """
    return {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }


def _faults(config: TileConfig, gemm: Gemm) -> Iterator[str]:
    """Yield what is wrong with a configuration for a GEMM, a sentence each."""
    for name in ("block_m", "block_n", "block_k"):
        size = getattr(config, name)
        if not _is_side(size):
            yield f"{name} is {size}, but must be a power of two from 16 to 256"
    if config.low_m and not (_is_side(config.low_m) and config.low_m < config.block_m):
        yield (
            f"low_m is {config.low_m}, but must be 0 or a power of two from 16 on below block_m, "
            f"{config.block_m}"
        )
    if config.num_warps & (config.num_warps - 1) or config.num_warps > 32:
        yield f"num_warps is {config.num_warps}, but must be a power of two up to 32"
    steps = ceil_div(gemm.k, config.block_k)
    if config.split_k > steps:
        yield (
            f"split_k is {config.split_k}, but a depth of {gemm.k} has only {steps} steps of "
            f"block_k = {config.block_k}; use {steps} at most"
        )
    if gemm.experts > MOST_EXPERTS:
        yield f"the layer has {gemm.experts} experts, but one launch holds {MOST_EXPERTS} at most"
    if config.path != "ptr":
        yield from _descriptor_faults(config, gemm)


def _descriptor_faults(config: TileConfig, gemm: Gemm) -> Iterator[str]:
    """Yield what keeps operands from being read through tensor descriptors."""
    if config.path == "tma" and gemm.gather:
        yield 'the path "tma" reads packed rows and these are tokens: use "tma_weights" or "ptr"'
    if gemm.k * ITEM_BYTES[gemm.dtype] % 16:
        yield (
            f"a row of {gemm.k} {gemm.dtype} is no multiple of 16 bytes, which descriptors need: "
            'use the path "ptr"'
        )
    if gemm.experts * gemm.n >= _INT32:
        yield (
            f"{gemm.experts} experts of {gemm.n} columns pass the 32-bit coordinates of "
            'descriptors: use the path "ptr"'
        )


def _is_side(size: int) -> bool:
    """Whether a tile may have a side of so many elements."""
    return 16 <= size <= _TMA_BOX and size & (size - 1) == 0
