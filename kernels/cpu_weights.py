"""The weights of experts as right operands of GEMMs: as they lie, or packed once for oneDNN.

A BLAS copies each block of a weight into the order in which it computes before it multiplies. Few
rows do not pay that back: with 4 to 16 of them a packed weight takes 0.4 to 0.7 of the time with
hot caches and 0.7 to 0.9 with cold ones, with hundreds 0.8 to 0.9 (float32, an AMD EPYC). Packing
takes as much memory again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ditune.kernels.cpu_pool import Pool
from ditune.kernels.reference import Experts

Product = Callable[[Tensor, Tensor], Tensor]  # (rows, room) -> rows @ weight, maybe in that room
_HEIGHT = 256  # rows that packed weights are meant for; they serve any number


@dataclass(frozen=True)
class Chain:
    """What one expert multiplies with: [rows, hidden] by `gate` and `up`, their result by `down`.

    The two halves of the first weight are products of their own: their results are contiguous, so
    that the gate is computed in place.
    """

    gate: Product
    up: Product
    down: Product


def chains(experts: Experts, pool: Pool, *, prepacked: bool) -> list[Chain]:
    """Return the products of every expert.

    Args:
        experts: The weights, on a CPU.
        pool: Who packs.
        prepacked: Whether copies in the BLAS's own layout are used. They are made at the first
            call and after a change, and are kept for as long as the weight itself is. Weights made
            in inference mode are used as they lie: torch does not say when they change.
    """
    inner = experts.down.shape[2]
    first, second = (
        _packed(weight, parts, pool)
        if prepacked and not weight.is_inference()
        else _plain(weight, parts)
        for weight, parts in (
            (experts.gate_up, (slice(inner), slice(inner, None))),
            (experts.down, (slice(None),)),
        )
    )
    return [Chain(gate, up, down) for (gate, up), (down,) in zip(first, second, strict=True)]


def _plain(weight: Tensor, parts: tuple[slice, ...]) -> list[list[Product]]:
    """Return the products with parts of each expert's weight, [experts, out, in], as it lies."""
    turned = [weight[:, part].transpose(1, 2).unbind(0) for part in parts]
    return [[partial(_times, right) for right in expert] for expert in zip(*turned, strict=True)]


def _times(right: Tensor, rows: Tensor, room: Tensor) -> Tensor:
    return torch.mm(rows, right, out=room)


_PACKED: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weight -> its state, its packed products


def _packed(weight: Tensor, parts: tuple[slice, ...], pool: Pool) -> list[list[Product]]:
    """Return the same with packed copies, those made before where the weight has not changed."""
    state = weight._version, weight.data_ptr(), weight.dtype  # `weight.data = x` is no new version
    kept = _PACKED.get(weight)
    if kept is None or kept[0] != state:
        lies = weight.detach()  # a view of the weight itself would keep it alive for ever
        found: list[list[Product]] = [[]] * len(lies)

        def pack(share: range) -> None:
            for expert in share:
                found[expert] = [_pack(lies[expert, part].contiguous()) for part in parts]

        experts = range(len(lies))
        pool.run(pack, [experts[first :: pool.size] for first in range(pool.size)])
        kept = state, found
        _PACKED[weight] = kept
    products: list[list[Product]] = kept[1]
    return products


def _pack(weight: Tensor) -> Product:
    """Return the product with a packed copy of one weight, [out, in]."""
    if weight.dtype in _onednn_dtypes():
        return partial(_times_onednn, torch.ops.mkldnn._reorder_linear_weight(weight, _HEIGHT))
    return partial(_times, weight.T.contiguous())


def _times_onednn(packed: Tensor, rows: Tensor, _: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
    return found


@cache
def _onednn_dtypes() -> set[torch.dtype]:
    """Return the dtypes in which oneDNN computes on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return set()
    narrow = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return {torch.float32, *(dtype for dtype, here in narrow.items() if here())}
