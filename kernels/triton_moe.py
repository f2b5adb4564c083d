"""The whole MoE layer on a GPU: two grouped GEMMs, the gate between them, the sum after them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ditune.db.errors import UsageFault
from ditune.db.moe import MoeShape, MoeTuning, TileConfig
from ditune.kernels.reference import Experts, check_layer
from ditune.kernels.routing import Routing, route
from ditune.kernels.triton_grouped_gemm import dtype_name, grouped_gemm
from ditune.kernels.variants import Variant, variants

_ELEMENTS = 1024  # of a program that works element by element


@triton.jit
def _gate(x_ptr, out_ptr, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    gate = tl.load(x_ptr + row * 2 * inner + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * inner + inner + column, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * inner + column, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _combine(
    x_ptr,
    out_ptr,
    places_ptr,
    rows_ptr,
    hidden,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    end = tl.load(rows_ptr + E)  # later rows belong to experts that are not here
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in range(K):
        place = tl.load(places_ptr + token * K + slot)
        here = inside & (place < end)
        total += tl.load(x_ptr + place * hidden + column, mask=here, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * hidden + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def moe_triton(
    hidden: Tensor, experts: Experts, indices: Tensor, weights: Tensor, tuning: MoeTuning
) -> Tensor:
    """Return the output of a mixture-of-experts layer, each routing with the tiles found for it.

    How many tokens there are is known here; how they are spread over the experts is found on the
    device, which is not waited for: the call can be captured in a graph.

    Args:
        hidden: Tokens, [tokens, hidden].
        experts: Packed weights, contiguous.
        indices: Expert of each slot, [tokens, top_k]; see `moe_reference`.
        weights: Routing weight of each slot, [tokens, top_k].
        tuning: Tiles for this shape of layer.

    Returns:
        [tokens, hidden], see `moe`.

    Raises:
        UsageFault: The inputs do not fit together or to the tuning, or a configuration that the
            tuning holds for these tokens cannot compute this layer.
    """
    check_layer(hidden, experts, indices, weights)
    _check_shape(hidden, experts, indices, tuning.shape)
    tokens = hidden.shape[0]
    ups, downs = (variants(tuning, tokens, gemm) for gemm in ("up", "down"))
    return _layer((hidden, experts, indices, weights), ups, downs)


def moe(
    hidden: Tensor,
    experts: Experts,
    indices: Tensor,
    weights: Tensor,
    up: TileConfig,
    down: TileConfig,
) -> Tensor:
    """Return the output of a mixture-of-experts layer; see `moe_reference` for what it computes.

    Intermediate rows are rounded to the dtype of `hidden`; GEMMs, gate and sum run in float32.
    Nothing waits for the device.

    Args:
        hidden: Tokens, [tokens, hidden].
        experts: Packed weights, contiguous.
        indices: Expert of each slot, [tokens, top_k].
        weights: Routing weight of each slot, [tokens, top_k].
        up: Tiles of the first GEMM, which gathers its rows: its path may not be "tma".
        down: Tiles of the second.

    Raises:
        UsageFault: The inputs do not fit together, or a configuration cannot compute this layer.
    """
    check_layer(hidden, experts, indices, weights)
    return _layer((hidden, experts, indices, weights), (Variant(up),), (Variant(down),))


def _layer(
    given: tuple[Tensor, Experts, Tensor, Tensor],
    ups: Sequence[Variant],
    downs: Sequence[Variant],
) -> Tensor:
    """Run the layer; the variants of each GEMM share all kinds of routing out among them."""
    hidden, experts, indices, weights = given
    hidden = hidden.contiguous()
    routing = route(indices, experts.count)
    first = grouped_gemm(hidden, experts.gate_up, routing, ups)
    second = grouped_gemm(gated(first), experts.down, routing, downs, weights.reshape(-1))
    return combined(second, routing, hidden)


def _check_shape(hidden: Tensor, experts: Experts, indices: Tensor, tuned: MoeShape) -> None:
    """Refuse a tuning of another layer: its tiles would be right, but chosen for nothing."""
    names = ("experts", "hidden", "inner", "top_k", "dtype")
    wide, narrow = experts.down.shape[1:]
    given = (experts.count, wide, narrow, indices.shape[1], dtype_name(hidden))
    wanted = tuple(getattr(tuned, name) for name in names)
    if given != wanted:
        raise UsageFault(
            f"the tuning is for ({', '.join(names)}) = {wanted}, but this layer is {given}: tune "
            "this shape, or give a tuning of it that holds only the default"
        )


def gated(rows: Tensor) -> Tensor:
    """Return silu(first half) * second half of each row, [rows, 2 * inner] to [rows, inner]."""
    inner = rows.shape[1] // 2
    out = rows.new_empty(rows.shape[0], inner)
    if out.numel():
        _gate[(rows.shape[0], triton.cdiv(inner, _ELEMENTS))](rows, out, inner, BLOCK=_ELEMENTS)
    return out


def combined(rows: Tensor, routing: Routing, hidden: Tensor) -> Tensor:
    """Return the sum of each token's rows, shaped like `hidden`."""
    out = torch.empty_like(hidden)
    if out.numel():
        experts = routing.counts.numel()
        _combine[(hidden.shape[0], triton.cdiv(hidden.shape[1], _ELEMENTS))](
            rows,
            out,
            routing.places,
            routing.rows,
            hidden.shape[1],
            E=experts,
            K=routing.top_k,
            BLOCK=_ELEMENTS,
        )
    return out
