"""Count the arithmetic that really ran, whoever ran it: blocks, indicators, forecasts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

_TRANSFORMS = (
    *("fft", "fft2", "fftn", "ifft", "ifft2", "ifftn"),
    *("rfft", "rfft2", "rfftn", "irfft", "irfft2", "irfftn"),
)


class WorkCounter(TorchFunctionMode):
    """Counts floating-point operations while it is entered.

    Matrix products, attention and convolutions count as usual (two operations for a multiplication
    with its addition), a Fourier transform of n values 5 n log2(n), everything else one operation
    per value that it gives; views are free. It sees what torch functions are called, on any device,
    and costs some microseconds for each: do not time what it counts. It is blind inside compiled
    code.
    """

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        self.flops = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function and add what it took."""
        kwargs = kwargs or {}
        if func in _BY_TORCH:
            with FlopCounterMode(display=False) as counter:
                out = func(*args, **kwargs)
            self.flops += counter.get_total_flops()
            return out
        out = func(*args, **kwargs)
        formula = _FORMULAS.get(func)
        if formula is not None:
            self.flops += formula(out, *args, **kwargs)
        elif isinstance(out, Tensor):
            self.flops += _written(func, out, args)
        elif isinstance(out, tuple | list):
            self.flops += sum(_written(func, o, args) for o in out if isinstance(o, Tensor))
        return out


def _product(out: Tensor, left: Tensor, *_: Any, **__: Any) -> int:
    return 2 * out.numel() * left.shape[-1]


def _added_product(out: Tensor, _added: Tensor, left: Tensor, *_: Any, **__: Any) -> int:
    return 2 * out.numel() * left.shape[-1]


def _attention(out: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    scores = query.numel() // query.shape[-1] * key.shape[-2]
    return 2 * scores * (query.shape[-1] + out.shape[-1])


def _transform(out: Tensor, *_: Any, **__: Any) -> int:
    return 5 * out.numel() * max(out.numel() - 1, 1).bit_length()


def _written(func: Any, out: Tensor, args: tuple[Any, ...]) -> int:
    """Return how many values a function wrote: none if it shows its first argument otherwise."""
    first = args[0] if args else None
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    if in_place or not isinstance(first, Tensor):
        return out.numel()
    seen = out.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    return 0 if seen else out.numel()


_FORMULAS: dict[Any, Callable[..., int]] = {
    F.linear: _product,
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys(
        (
            torch.matmul,
            Tensor.matmul,
            Tensor.__matmul__,
            torch.mm,
            Tensor.mm,
            torch.bmm,
            Tensor.bmm,
        ),
        _product,
    ),
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm), _added_product),
    **dict.fromkeys((getattr(torch.fft, name) for name in _TRANSFORMS), _transform),
}
_BY_TORCH = {
    getattr(F, f"{kind}{size}d") for kind in ("conv", "conv_transpose") for size in (1, 2, 3)
} | {torch.einsum, F.multi_head_attention_forward}
