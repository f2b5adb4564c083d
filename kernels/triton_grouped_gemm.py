"""One launch for the GEMMs of all experts: programs find their expert and tile at run time.

Three ways to the operands: "ptr" gathers rows and reads weights by pointers (any GPU from sm_80);
"tma_weights" reads weights through a tensor descriptor; "tma" reads packed rows that way too, for
input that already lies expert by expert. Descriptors need sm_90.

Which configuration is right may depend on the routing, which only the device knows. Then each is
launched, and the one small kernel that counts the tiles of a launch counts none unless it is the
one for this routing. The programs of the others return at once; nothing waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ditune.db.errors import UsageFault
from ditune.db.moe import Dtype, TileConfig
from ditune.kernels.gemm import Gemm
from ditune.kernels.launch import constants, options
from ditune.kernels.routing import Routing
from ditune.kernels.task_map import expert_order, grid_bound
from ditune.kernels.triton_tiles import count_tiles, finish_split, grouped_gemm_kernel
from ditune.kernels.variants import Variant

_DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_MOST_PROGRAMS = 2**31 - 1
_ELEMENTS = 1024  # of a program that works element by element


@dataclass(frozen=True, eq=False)
class _Work:
    """What all launches of one grouped GEMM share."""

    gemm: Gemm
    rows: Tensor
    weight: Tensor
    out: Tensor
    routing: Routing
    scale: Tensor | None

    @property
    def factors(self) -> Tensor:
        """The scale, or anything where there is none."""
        return self.routing.slots if self.scale is None else self.scale


def grouped_gemm(
    rows: Tensor,
    weight: Tensor,
    routing: Routing,
    variants: Sequence[Variant],
    scale: Tensor | None = None,
) -> Tensor:
    """Return every routed row times the weight of its expert.

    Args:
        rows: With a scale, packed rows, [tokens * top_k, k] in the order of `routing`; without one,
            tokens, [tokens, k], of which each routed row reads its own. Contiguous.
        weight: [experts, n, k], same dtype and device, contiguous.
        routing: Which rows belong to which expert.
        variants: Tiles and launch for each kind of routing; each kind is in exactly one.
        scale: Factor on each (token, slot), [tokens * top_k].

    Returns:
        [tokens * top_k, n] in the order of `routing`, dtype of `rows`, accumulated in float32. Rows
        of experts that are not here are left as they were allocated. Where `split_k` is above 2,
        parts are added in any order, and the last bits may differ from run to run.

    Raises:
        UsageFault: A variant cannot compute this GEMM, here or at all; the message says why.
    """
    _check_contiguous(rows, weight)
    experts, n, k = weight.shape
    gemm = Gemm(experts, n, k, routing.top_k, dtype_name(rows), gather=scale is None)
    out = rows.new_empty(routing.slots.numel(), n)
    work = _Work(gemm, rows, weight, out, routing, scale)
    grids = [_programs(work, variant.config) for variant in variants]  # refuses before any launch
    if out.numel():
        for variant, grid in zip(variants, grids, strict=True):
            _launch(work, variant, grid)
    return out


def dtype_name(rows: Tensor) -> Dtype:
    """Return the name of the dtype of rows.

    Raises:
        UsageFault: The kernels do not compute in it.
    """
    if rows.dtype not in _DTYPES:
        raise UsageFault(
            f"the kernels compute in {', '.join(_DTYPES.values())}, but this layer is "
            f"{rows.dtype}; cast it, or use moe_reference"
        )
    return _DTYPES[rows.dtype]


def _programs(work: _Work, config: TileConfig) -> int:
    """Return the number of programs of a launch, after a look at what they would read."""
    gemm = work.gemm
    constants(gemm, config)
    if config.path != "ptr":
        _check_descriptors(work.rows, work.weight)
    routed = work.routing.slots.numel()
    most = grid_bound(routed, gemm.experts, gemm.n, config.block_m, config.block_n)
    most *= config.split_k
    if most > _MOST_PROGRAMS:
        raise UsageFault(
            f"{routed} rows in tiles of {config.block_m} by {config.block_n} need up to {most} "
            f"programs, but a launch has {_MOST_PROGRAMS} at most: give the tokens in parts"
        )
    if config.persistent:
        return min(most, config.persistent * _multiprocessors(work.rows.device))
    return most


def _launch(work: _Work, variant: Variant, programs: int) -> None:
    """Launch one variant; its programs find no tile if the routing is not of its kinds."""
    gemm, config, routing = work.gemm, variant.config, work.routing
    fixed = constants(gemm, config)
    prefix, order = _tasks(work, variant)
    out = work.out
    if config.split_k > 1:
        out = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    x, low, w = _operands(work, config)
    grouped_gemm_kernel[(programs,)](
        x,
        low,
        w,
        out,
        routing.slots,
        work.factors,
        prefix,
        order,
        routing.rows,
        gemm.n,
        gemm.k,
        gemm.k,
        gemm.k,
        gemm.n,
        **fixed,
        **options(config),
    )
    if config.split_k > 1:
        finish_split[(out.shape[0], triton.cdiv(gemm.n, _ELEMENTS))](
            out,
            work.out,
            routing.slots,
            work.factors,
            prefix,
            routing.rows,
            gemm.n,
            E=gemm.experts,
            SCALE=work.scale is not None,
            BLOCK=_ELEMENTS,
        )


def _operands(work: _Work, config: TileConfig) -> tuple[object, object, object]:
    """Return rows for tiles of full height, rows for low ones, and weights, as the path has it."""
    x: object = work.rows
    low: object = work.rows
    w: object = work.weight
    if config.path == "tma":
        x = TensorDescriptor.from_tensor(work.rows, [config.block_m, config.block_k])
        height = config.low_m or config.block_m
        low = TensorDescriptor.from_tensor(work.rows, [height, config.block_k])
    if config.path != "ptr":
        flat = work.weight.view(-1, work.gemm.k)
        w = TensorDescriptor.from_tensor(flat, [config.block_n, config.block_k])
    return x, low, w


def _tasks(work: _Work, variant: Variant) -> tuple[Tensor, Tensor]:
    """Return the prefix of tiles and the order of experts, or anything for their own order."""
    config, routing, fixed = variant.config, work.routing, constants(work.gemm, variant.config)
    prefix = torch.empty_like(routing.counts)
    order = expert_order(routing.counts, config.order) if fixed["SORT"] else prefix
    count_tiles[(1,)](
        routing.rows,
        order,
        prefix,
        triton.cdiv(work.gemm.n, config.block_n),
        variant.kinds,
        E=fixed["E"],
        E_PAD=fixed["E_PAD"],
        BLOCK_M=config.block_m,
        SORT=fixed["SORT"],
    )
    return prefix, order


def _check_contiguous(rows: Tensor, weight: Tensor) -> None:
    """Refuse operands with gaps or in another order: kernels count on rows of k elements."""
    for name, tensor in (("rows", rows), ("weight", weight)):
        if not tensor.is_contiguous():
            raise UsageFault(
                f"{name} {tuple(tensor.shape)} is not contiguous, its strides are "
                f"{tensor.stride()}: call .contiguous() once, before the layer is used"
            )


def _check_descriptors(rows: Tensor, weight: Tensor) -> None:
    """Refuse what no descriptor can be made of."""
    if rows.device.type == "cuda" and _capability(rows.device) < 9:
        raise UsageFault(
            f"{torch.cuda.get_device_name(rows.device)} has no tensor descriptors (sm_90 and "
            'later do): use the path "ptr"'
        )
    if rows.data_ptr() % 16 or weight.data_ptr() % 16:
        raise UsageFault(
            "rows or weight do not begin at a multiple of 16 bytes, which descriptors need: "
            'use the path "ptr", or copies of them'
        )


@functools.cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
