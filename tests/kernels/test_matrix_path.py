"""Matrix instructions that are foretold are those that the compiler chooses."""

from __future__ import annotations

import pytest

from ditune.db.moe import Dtype, TileConfig
from ditune.kernels.gemm import Gemm
from ditune.kernels.matrix_path import matrix_path
from ditune.kernels.offline import compile_gemm


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize(
    ("rows", "warps", "swapped"),
    [(32, 4, False), (64, 4, False), (64, 2, False), (32, 4, True), (64, 8, False)],
)
def test_the_compiler_chooses_what_is_foretold(
    rows: int, warps: int, swapped: bool, arch: int
) -> None:
    gemm = Gemm(8, 256, 256, 2, "float16", gather=False)
    config = TileConfig(
        block_m=rows, block_n=64, block_k=32, num_warps=warps, num_stages=2, swap_ab=swapped
    )
    assert compile_gemm(gemm, config, arch).mma == matrix_path(config, "float16", arch)


@pytest.mark.parametrize(
    ("dtype", "path"), [("float32", "FFMA"), ("bfloat16", "HGMMA"), ("float16", "HGMMA")]
)
def test_float32_has_no_matrix_instructions(dtype: Dtype, path: str) -> None:
    assert matrix_path(TileConfig(), dtype, 90) == path
