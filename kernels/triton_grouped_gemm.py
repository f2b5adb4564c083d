"""One launch for the GEMMs of all experts: programs find their expert and tile at run time.

Three ways to the operands: "ptr" gathers rows and reads weights by pointers (any GPU from sm_80);
"tma_weights" reads weights through a tensor descriptor; "tma" reads packed rows that way too, for
input that already lies expert by expert. Descriptors need sm_90.

Source: arXiv 2501.16103 for one launch over ragged experts and the compressed task map.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ditune.db.errors import UsageFault
from ditune.db.moe import TileConfig
from ditune.kernels.routing import Routing
from ditune.kernels.task_map import build_task_map, grid_bound

_BIGGEST = tl.constexpr(2**31 - 1)


@triton.jit
def _count_tiles(
    rows_ptr, prefix_ptr, tiles_n, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Write the inclusive prefix sum of tiles, experts by id."""
    expert = tl.arange(0, E_PAD)
    here = expert < E
    first = tl.load(rows_ptr + expert, mask=here, other=0)
    last = tl.load(rows_ptr + expert + 1, mask=here, other=0)
    tiles = (last - first + BLOCK_M - 1) // BLOCK_M * tiles_n
    tl.store(prefix_ptr + expert, tl.cumsum(tiles, 0), mask=here)


@triton.jit
def _find(
    prefix_ptr, order_ptr, rows_ptr, pid, E: tl.constexpr, E_PAD: tl.constexpr, SORT: tl.constexpr
):
    """Return a program's expert, the number of its tile there, and the expert's first and last row.

    One load of the whole prefix, one comparison, two reductions: empty experts are equal neighbours
    and are passed by together.
    """
    slots = tl.arange(0, E_PAD)
    prefix = tl.load(prefix_ptr + slots, mask=slots < E, other=_BIGGEST)
    done = prefix <= pid
    slot = tl.sum(done.to(tl.int32), 0)
    base = tl.max(tl.where(done, prefix, 0), 0)
    expert = tl.load(order_ptr + slot) if SORT else slot.to(tl.int64)
    first = tl.load(rows_ptr + expert)
    last = tl.load(rows_ptr + expert + 1)
    return expert, (pid - base).to(tl.int32), first, last


@triton.jit
def _operand(source, at, row, k, deep, TMA: tl.constexpr, EVEN_K: tl.constexpr):
    """Return one step's part of an operand; what is not needed for the path is dead code."""
    if TMA:
        value = source.load([row, k])
    elif EVEN_K:
        value = tl.load(source + at)
    else:
        value = tl.load(source + at, mask=deep, other=0.0)
    return value


@triton.jit
def _tile(
    x_ptr,
    w_ptr,
    out_ptr,
    slots_ptr,
    scale_ptr,
    prefix_ptr,
    order_ptr,
    rows_ptr,
    pid,
    N,
    K,
    stride_x,
    stride_w,
    stride_out,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    GATHER: tl.constexpr,
    SCALE: tl.constexpr,
    TMA_X: tl.constexpr,
    TMA_W: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    SORT: tl.constexpr,
):
    expert, local, first, last = _find(prefix_ptr, order_ptr, rows_ptr, pid, E, E_PAD, SORT)
    tiles_m = ((last - first + BLOCK_M - 1) // BLOCK_M).to(tl.int32)
    tiles_n = tl.cdiv(N, BLOCK_N)
    top = local // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - top, GROUP_M)
    rest = local % (GROUP_M * tiles_n)
    row = first + (top + rest % height) * BLOCK_M
    column = rest // height * BLOCK_N

    rows = row + tl.arange(0, BLOCK_M)
    inside = rows < last
    columns = column + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    source = tl.where(inside, rows, first)  # rows beyond the end read one that is there
    if GATHER:
        source = tl.load(slots_ptr + source) // TOP_K
    x_at = source.to(tl.int64)[:, None] * stride_x + depth[None, :]
    within = tl.where(columns < N, columns, 0)
    w_at = (expert.to(tl.int64) * N + within)[:, None] * stride_w + depth[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        deep = depth[None, :] < K - k
        x = _operand(x_ptr, x_at, row.to(tl.int32), k, deep, TMA_X, EVEN_K)
        w = _operand(w_ptr, w_at, (expert * N + column).to(tl.int32), k, deep, TMA_W, EVEN_K)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        x_at += BLOCK_K
        w_at += BLOCK_K
    if SCALE:
        slot = tl.load(slots_ptr + rows, mask=inside, other=0)
        acc *= tl.load(scale_ptr + slot, mask=inside, other=0.0).to(tl.float32)[:, None]
    out_at = out_ptr + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
    result = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_at, result, mask=inside[:, None] & (columns < N)[None, :])


@triton.jit
def _grouped_gemm(
    x_ptr,
    w_ptr,
    out_ptr,
    slots_ptr,
    scale_ptr,
    prefix_ptr,
    order_ptr,
    rows_ptr,
    N,
    K,
    stride_x,
    stride_w,
    stride_out,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    GATHER: tl.constexpr,
    SCALE: tl.constexpr,
    TMA_X: tl.constexpr,
    TMA_W: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    SORT: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    total = tl.load(prefix_ptr + E - 1).to(tl.int32)
    pid = tl.program_id(0)
    # fmt: off
    if PERSISTENT:
        for tile in tl.range(pid, total, tl.num_programs(0)):
            _tile(x_ptr, w_ptr, out_ptr, slots_ptr, scale_ptr, prefix_ptr, order_ptr, rows_ptr,
                  tile, N, K, stride_x, stride_w, stride_out, E, E_PAD, TOP_K, BLOCK_M, BLOCK_N,
                  BLOCK_K, GROUP_M, GATHER, SCALE, TMA_X, TMA_W, EVEN_K, PRECISION, SORT)
    elif pid < total:
        _tile(x_ptr, w_ptr, out_ptr, slots_ptr, scale_ptr, prefix_ptr, order_ptr, rows_ptr,
              pid, N, K, stride_x, stride_w, stride_out, E, E_PAD, TOP_K, BLOCK_M, BLOCK_N,
              BLOCK_K, GROUP_M, GATHER, SCALE, TMA_X, TMA_W, EVEN_K, PRECISION, SORT)
    # fmt: on


def grouped_gemm(
    rows: Tensor,
    weight: Tensor,
    routing: Routing,
    config: TileConfig,
    *,
    packed: bool,
    scale: Tensor | None = None,
) -> Tensor:
    """Return every routed row times the weight of its expert.

    Args:
        rows: [tokens, k], of which each routed row reads its own, or packed already,
            [tokens * top_k, k] in the order of `routing`; contiguous.
        weight: [experts, n, k], same dtype and device, contiguous.
        routing: Which rows belong to which expert.
        config: Tiles and launch; the path "tma" needs packed rows.
        packed: Whether the rows are.
        scale: Factor on each (token, slot), [tokens * top_k]; None for none.

    Returns:
        [tokens * top_k, n] in the order of `routing`, dtype of `rows`, accumulated in float32. Rows
        of experts that are not here are left as they were allocated.

    Raises:
        UsageFault: The path needs packed rows and these are not.
    """
    if config.path == "tma" and not packed:
        raise UsageFault(
            'the path "tma" reads packed rows and these are tokens: use "tma_weights" or "ptr"'
        )
    experts, n, k = weight.shape
    routed = routing.slots.numel()
    out = rows.new_empty(routed, n)
    if routed == 0:
        return out
    prefix, order = _tasks(routing, n, config)
    grid = grid_bound(routed, experts, n, config.block_m, config.block_n)
    if config.persistent:
        grid = min(grid, config.persistent * _multiprocessors(rows.device))
    tma_x, tma_w = config.path == "tma", config.path != "ptr"
    x_shape, w_shape = [config.block_m, config.block_k], [config.block_n, config.block_k]
    x = TensorDescriptor.from_tensor(rows, x_shape) if tma_x else rows
    w = TensorDescriptor.from_tensor(weight.view(-1, k), w_shape) if tma_w else weight
    _grouped_gemm[(grid,)](
        x,
        w,
        out,
        routing.slots,
        scale if scale is not None else routing.slots,
        prefix,
        order,
        routing.rows,
        n,
        k,
        k,
        k,
        n,
        E=experts,
        E_PAD=triton.next_power_of_2(experts),
        TOP_K=routing.top_k,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        GATHER=not packed,
        SCALE=scale is not None,
        TMA_X=tma_x,
        TMA_W=tma_w,
        EVEN_K=k % config.block_k == 0,
        PRECISION="ieee" if rows.dtype == torch.float32 else "tf32",
        SORT=config.order != "id",
        PERSISTENT=config.persistent > 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def _tasks(routing: Routing, n: int, config: TileConfig) -> tuple[Tensor, Tensor]:
    """Return the prefix of tiles and the order of experts; in their own order by one launch."""
    if config.order != "id":
        tiles = build_task_map(
            routing.counts, n, config.block_m, config.block_n, config.order, trusted=True
        )
        return tiles.prefix, tiles.order
    experts = routing.counts.numel()
    prefix = torch.empty_like(routing.counts)
    _count_tiles[(1,)](
        routing.rows,
        prefix,
        triton.cdiv(n, config.block_n),
        E=experts,
        E_PAD=triton.next_power_of_2(experts),
        BLOCK_M=config.block_m,
    )
    return prefix, prefix


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
