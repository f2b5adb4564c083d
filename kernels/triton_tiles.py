"""What one program of a grouped GEMM does: find its expert and tile, multiply, store.

Source: arXiv 2501.16103 for one launch over ragged experts, the compressed task map and tiles of
two heights in one launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

_BIGGEST = tl.constexpr(2**31 - 1)
_EXPONENTS = tl.constexpr(16)  # of the share of active experts; 1024 experts have at most 10


@triton.jit(do_not_specialize=["kinds"])  # one binary for whatever bits
def count_tiles(
    rows_ptr,
    order_ptr,
    prefix_ptr,
    tiles_n,
    kinds: tl.int64,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SORT: tl.constexpr,
):
    """Write the inclusive prefix sum of tiles over the slots; all 0 if this launch is not chosen.

    Bit `skew * 16 + active` of `kinds` says whether it is chosen for that kind of routing; the kind
    is found as `routing_bucket` finds it. Low tiles need no word here: an expert that has them has
    one row of them, as it would have of the others.
    """
    slots = tl.arange(0, E_PAD)
    here = slots < E
    expert = tl.load(order_ptr + slots, mask=here, other=0) if SORT else slots
    first = tl.load(rows_ptr + expert, mask=here, other=0)
    last = tl.load(rows_ptr + expert + 1, mask=here, other=0)
    counts = last - first
    active = tl.maximum(tl.sum((counts > 0).to(tl.int64), 0), 1)
    largest = tl.max(counts, 0) * active
    total = tl.maximum(tl.sum(counts, 0), 1)
    skew = (largest >= 2 * total).to(tl.int64) + (largest >= 8 * total).to(tl.int64)
    halves = active << tl.arange(0, _EXPONENTS).to(tl.int64)
    share = tl.sum((halves <= E).to(tl.int64), 0) - 1
    chosen = (kinds >> (skew * _EXPONENTS + share)) & 1
    tiles = (counts + BLOCK_M - 1) // BLOCK_M * tiles_n * chosen
    tl.store(prefix_ptr + slots, tl.cumsum(tiles, 0), mask=here)


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
    expert,
    local,
    first,
    last,
    part,
    N,
    K,
    stride_x,
    stride_w,
    stride_out,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
    GATHER: tl.constexpr,
    SCALE: tl.constexpr,
    TMA_X: tl.constexpr,
    TMA_W: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one tile of an expert with rows `first` .. `last` - 1, or a part of its depth."""
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
    begin = 0
    end = K
    if SPLIT_K > 1:
        share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
        begin = part * share
        end = tl.minimum(begin + share, K)
        x_at += begin
        w_at += begin
    if SWAP_AB:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(begin, end, BLOCK_K):
        deep = depth[None, :] < K - k
        x = _operand(x_ptr, x_at, row.to(tl.int32), k, deep, TMA_X, EVEN_K)
        w = _operand(w_ptr, w_at, (expert * N + column).to(tl.int32), k, deep, TMA_W, EVEN_K)
        if SWAP_AB:
            acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        x_at += BLOCK_K
        w_at += BLOCK_K
    if SWAP_AB:
        acc = tl.trans(acc)
    if SCALE:
        slot = tl.load(slots_ptr + rows, mask=inside, other=0)
        acc *= tl.load(scale_ptr + slot, mask=inside, other=0.0).to(tl.float32)[:, None]
    out_at = out_ptr + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
    here = inside[:, None] & (columns < N)[None, :]
    if SPLIT_K > 1:
        tl.atomic_add(out_at, acc, mask=here, sem="relaxed")
    else:
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def _program(
    x_ptr,
    x_low_ptr,
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
    LOW_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
    GATHER: tl.constexpr,
    SCALE: tl.constexpr,
    TMA_X: tl.constexpr,
    TMA_W: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    SORT: tl.constexpr,
):
    """Find the tile of program `pid` and compute it at the height that its expert has."""
    part = pid % SPLIT_K
    expert, local, first, last = _find(
        prefix_ptr, order_ptr, rows_ptr, pid // SPLIT_K, E, E_PAD, SORT
    )
    # fmt: off
    if LOW_M > 0 and last - first <= LOW_M:
        _tile(x_low_ptr, w_ptr, out_ptr, slots_ptr, scale_ptr, expert, local, first, last, part,
              N, K, stride_x, stride_w, stride_out, TOP_K, LOW_M, BLOCK_N, BLOCK_K, GROUP_M,
              SPLIT_K, SWAP_AB, GATHER, SCALE, TMA_X, TMA_W, EVEN_K, PRECISION)
    else:
        _tile(x_ptr, w_ptr, out_ptr, slots_ptr, scale_ptr, expert, local, first, last, part,
              N, K, stride_x, stride_w, stride_out, TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
              SPLIT_K, SWAP_AB, GATHER, SCALE, TMA_X, TMA_W, EVEN_K, PRECISION)
    # fmt: on


@triton.jit
def grouped_gemm_kernel(
    x_ptr,
    x_low_ptr,
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
    LOW_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
    GATHER: tl.constexpr,
    SCALE: tl.constexpr,
    TMA_X: tl.constexpr,
    TMA_W: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    SORT: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """Compute all tiles of all experts, one for each program or in strides over them."""
    total = tl.load(prefix_ptr + E - 1).to(tl.int32) * SPLIT_K
    pid = tl.program_id(0)
    # fmt: off
    if PERSISTENT:
        for tile in tl.range(pid, total, tl.num_programs(0)):
            _program(x_ptr, x_low_ptr, w_ptr, out_ptr, slots_ptr, scale_ptr, prefix_ptr, order_ptr,
                     rows_ptr, tile, N, K, stride_x, stride_w, stride_out, E, E_PAD, TOP_K,
                     BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, LOW_M, SPLIT_K, SWAP_AB, GATHER, SCALE,
                     TMA_X, TMA_W, EVEN_K, PRECISION, SORT)
    elif pid < total:
        _program(x_ptr, x_low_ptr, w_ptr, out_ptr, slots_ptr, scale_ptr, prefix_ptr, order_ptr,
                 rows_ptr, pid, N, K, stride_x, stride_w, stride_out, E, E_PAD, TOP_K,
                 BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, LOW_M, SPLIT_K, SWAP_AB, GATHER, SCALE,
                 TMA_X, TMA_W, EVEN_K, PRECISION, SORT)
    # fmt: on


@triton.jit
def finish_split(
    sums_ptr,
    out_ptr,
    slots_ptr,
    scale_ptr,
    prefix_ptr,
    rows_ptr,
    N,
    E: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scale and round the sums of all parts, once; nothing where this launch was not chosen."""
    row = tl.program_id(0).to(tl.int64)
    chosen = tl.load(prefix_ptr + E - 1) > 0
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < N) & chosen & (row < tl.load(rows_ptr + E))
    value = tl.load(sums_ptr + row * N + column, mask=inside, other=0.0)
    if SCALE:
        value *= tl.load(scale_ptr + tl.load(slots_ptr + row)).to(tl.float32)
    tl.store(out_ptr + row * N + column, value.to(out_ptr.dtype.element_ty), mask=inside)
