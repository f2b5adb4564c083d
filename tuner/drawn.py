"""Layers of experts to tune on: weights and tokens drawn at random, tokens routed as asked."""

from __future__ import annotations

import torch
from torch import Tensor

from ditune.db.moe import MoeShape
from ditune.kernels.histograms import router_output
from ditune.kernels.reference import Experts
from ditune.tuner.moe import Routed


def experts_of(shape: MoeShape, device: torch.device) -> Experts:
    """Return weights that keep the size of values, the same at every call."""
    first = drawn((shape.experts, 2 * shape.inner, shape.hidden), shape, device)
    second = drawn((shape.experts, shape.hidden, shape.inner), shape, device)
    return Experts(first.mul_(shape.hidden**-0.5), second.mul_(shape.inner**-0.5))


def tokens_of(
    routed: Routed, shape: MoeShape, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, [tokens, hidden], and what the router says: indices, weights.

    Raises:
        UsageFault: No tokens have such a routing.
    """
    indices, weights = router_output(routed.counts, shape.top_k)
    hidden = drawn((routed.tokens, shape.hidden), shape, device)
    return hidden, indices.to(device), weights.to(device, hidden.dtype)


def drawn(size: tuple[int, ...], shape: MoeShape, device: torch.device) -> Tensor:
    """Return normal numbers in the dtype of a layer, the same for a size and kind of device."""
    generator = torch.Generator(device).manual_seed(0)
    dtype: torch.dtype = getattr(torch, shape.dtype)
    return torch.randn(size, generator=generator, dtype=dtype, device=device)
