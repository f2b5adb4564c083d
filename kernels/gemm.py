"""The two grouped GEMMs of a layer of experts, as shapes: what is compiled, predicted and timed."""

from __future__ import annotations

from dataclasses import dataclass

from ditune.db.moe import Dtype, MoeShape

ITEM_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Gemm:
    """One grouped GEMM: every routed row times the [n, k] weight of its expert.

    Args:
        experts: Number of experts.
        n: Columns of an expert's output.
        k: Depth, the columns of a row.
        top_k: Experts per token.
        dtype: Of rows and weights; sums are float32.
        gather: Whether rows are read from the tokens by index; else they lie expert by expert, and
            each row of the output is multiplied by its routing weight.
    """

    experts: int
    n: int
    k: int
    top_k: int
    dtype: Dtype
    gather: bool


def layer_gemms(shape: MoeShape) -> tuple[Gemm, Gemm]:
    """Return the first GEMM of a layer, gate and up together, and the second, down."""
    experts, top_k, dtype = shape.experts, shape.top_k, shape.dtype
    return (
        Gemm(experts, 2 * shape.inner, shape.hidden, top_k, dtype, gather=True),
        Gemm(experts, shape.hidden, shape.inner, top_k, dtype, gather=False),
    )
