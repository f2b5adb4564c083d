"""What a launch compiles is what the offline compile looks at: Triton is asked, and stopped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ditune.db.moe import TileConfig
from ditune.kernels.gemm import Gemm
from ditune.kernels.offline import kernel_source
from ditune.kernels.reference import Experts
from ditune.kernels.routing import route
from ditune.kernels.triton_grouped_gemm import grouped_gemm
from ditune.kernels.triton_moe import moe
from ditune.kernels.variants import Variant

UP = Gemm(3, 64, 128, 2, "bfloat16", gather=True)
DOWN = Gemm(3, 64, 128, 2, "bfloat16", gather=False)
NOWHERE = 999  # a device that no kernel was compiled for


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, Any]]]:
    """Arguments of compilations by the kernel's name; none of them happens, and nothing runs."""
    found: dict[str, dict[str, Any]] = {}

    def stopped(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        found[fn.name] = {**compile, "function": fn.jit_function}
        return True

    driver = SimpleNamespace(
        get_current_device=lambda: NOWHERE,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", stopped)
    yield found


LAUNCHES = [
    (UP, {}),
    (DOWN, {"split_k": 2, "swap_ab": True, "order": "desc"}),
    (UP, {"path": "tma_weights", "low_m": 16, "persistent": 1}),
    (DOWN, {"path": "tma", "low_m": 32, "block_k": 128}),
    (replace(UP, n=40, k=72), {"split_k": 2}),
    (replace(DOWN, n=41, k=73), {"persistent": 2}),
]


@pytest.mark.parametrize(("gemm", "fields"), LAUNCHES)
def test_a_launch_compiles_what_was_looked_at(
    asked: dict[str, dict[str, Any]], gemm: Gemm, fields: dict[str, object]
) -> None:
    config = TileConfig.model_validate(fields)
    routing = route(torch.tensor([[0, 1], [2, 1]]), experts=3)
    rows = torch.zeros(2 if gemm.gather else 4, gemm.k, dtype=torch.bfloat16)
    weight = torch.zeros(3, gemm.n, gemm.k, dtype=torch.bfloat16)
    scale = None if gemm.gather else torch.ones(4, dtype=torch.bfloat16)
    grouped_gemm(rows, weight, routing, [Variant(config)], scale)
    launched = asked["grouped_gemm_kernel"]
    source = kernel_source(gemm, config)
    assert source.signature == launched["signature"]
    assert source.constants == launched["constants"]
    assert source.attrs == {at: said for at, said in launched["configs"][0].items() if said}
    assert launched["enable_fp_fusion"] is True
    assert (config.num_warps, config.num_stages) == (launched["num_warps"], launched["num_stages"])


def test_the_small_kernels_compile_as_launched(asked: dict[str, dict[str, Any]]) -> None:
    experts = Experts(torch.zeros(3, 128, 64), torch.zeros(3, 64, 64))
    tiles = TileConfig(split_k=2, block_k=32, order="desc")
    hidden, indices = torch.zeros(4, 64), torch.zeros(4, 2, dtype=torch.int64)
    moe(hidden, experts, indices, torch.ones(4, 2), tiles, tiles)
    small = set(asked) - {"grouped_gemm_kernel"}
    assert small == {"count_tiles", "finish_split", "_gate", "_combine"}
    for name in small:
        launched = asked[name]
        source = ASTSource(
            launched["function"],
            launched["signature"],
            launched["constants"],
            launched["configs"][0],
        )
        for arch in (80, 90):
            assert triton.compile(source, GPUTarget("cuda", arch, 32)).metadata.num_warps == 4


@pytest.mark.parametrize("kinds", [1, 16, -1, ~1, 1 << 42])
def test_one_binary_counts_tiles_for_whatever_kinds(
    asked: dict[str, dict[str, Any]], kinds: int
) -> None:
    routing = route(torch.tensor([[0, 1]]), experts=3)
    rows, weight = torch.zeros(1, 64), torch.zeros(3, 32, 64)
    grouped_gemm(rows, weight, routing, [Variant(TileConfig(), kinds)])
    launched = asked["count_tiles"]
    assert launched["signature"]["kinds"] == "i64"
    at = list(launched["signature"]).index("kinds")
    assert (at,) not in launched["constants"]
    assert not launched["configs"][0].get((at,))
