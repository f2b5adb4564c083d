"""Which matrix instructions a tile is compiled to: what the compiler is held to and times rest on.

Found by compiling, see `kernels.offline`.
"""

from __future__ import annotations

from ditune.db.moe import Dtype, TileConfig

_WIDE = {90: "HGMMA", 100: "UTCHMMA"}  # wgmma and tcgen05; all else is mma.sync
_ROWS = 64  # of the least wide instruction
_GROUP = 4  # warps that issue one together


def matrix_path(config: TileConfig, dtype: Dtype, cc: int) -> str:
    """Return the fastest matrix instruction that tiles of full height can have, by its name.

    Args:
        config: The tile; transposed, its columns count as rows.
        dtype: Of the operands; float32 is computed without matrix instructions.
        cc: Compute capability, 90 for 9.0.

    Returns:
        "HGMMA" (sm_90) and "UTCHMMA" (sm_100) from 64 rows and 4 warps on, else "HMMA"; "FFMA" for
        float32.
    """
    wide = config.block_n if config.swap_ab else config.block_m
    return path_of(wide, config.num_warps, dtype, cc)


def path_of(wide: int, num_warps: int, dtype: Dtype, cc: int) -> str:
    """Return the same for a side of so many rows, of a low tile for one."""
    if dtype == "float32":
        return "FFMA"
    if wide < _ROWS or num_warps % _GROUP:
        return "HMMA"
    return _WIDE.get(cc, "HMMA")
