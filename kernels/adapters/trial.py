"""The trial of a layer at attachment: the kernels must give what the module's own code gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ditune.db.moe import MoeShape

_SEED = 0
_TOKENS_AT_LEAST = 16


@dataclass(frozen=True, eq=False)
class Probe:
    """A small random input of a layer.

    Args:
        hidden: Tokens, [tokens, hidden].
        indices: Expert of each slot, [tokens, top_k] int64; every expert has a row, and no token
            has one expert twice as long as there are enough.
        weights: Routing weight of each slot, [tokens, top_k], positive, dtype of `hidden`.
    """

    hidden: Tensor
    indices: Tensor
    weights: Tensor


def probe(shape: MoeShape, device: torch.device) -> Probe:
    """Return the same input for a shape every time, on whatever device."""
    source = torch.Generator().manual_seed(_SEED)  # the devices' own generators differ
    tokens = max(_TOKENS_AT_LEAST, math.ceil(shape.experts / shape.top_k))
    dtype: torch.dtype = getattr(torch, shape.dtype)
    slots = torch.arange(tokens * shape.top_k).view(tokens, shape.top_k)
    weights = torch.rand(slots.shape, generator=source) + 0.5
    return Probe(
        torch.randn(tokens, shape.hidden, generator=source).to(device, dtype),
        (slots % shape.experts).to(device),
        (weights / weights.sum(1, keepdim=True)).to(device, dtype),
    )


def bound(shape: MoeShape) -> float:
    """Return how far two right implementations of a layer may differ, as a share of a row's norm.

    Each rounds its intermediate results to the layer's dtype some times, and adds up sums of
    `hidden` and `inner` terms in float32 in an order of its own.
    """
    rounded = torch.finfo(getattr(torch, shape.dtype)).eps
    summed = torch.finfo(torch.float32).eps
    return 3 * rounded + math.sqrt(shape.hidden + shape.inner) * summed


def difference(own: Tensor, ours: Tensor, shape: MoeShape) -> str:
    """Return in words how the kernels' output differs from the module's own; empty if it does not.

    Args:
        own: Of the module's own code, [rows, hidden].
        ours: Of the kernels.
        shape: Of the layer; it bounds what counts as equal.
    """
    if own.shape != ours.shape or own.dtype != ours.dtype:
        return (
            f"its own output is {tuple(own.shape)} {own.dtype}, that of the kernels "
            f"{tuple(ours.shape)} {ours.dtype}"
        )
    wanted, found = own.double(), ours.double()
    if not bool(wanted.isfinite().all()):
        return "its own output on a random input is not finite: nothing to compare with"
    norms = torch.linalg.vector_norm(wanted, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    off = (torch.linalg.vector_norm(found - wanted, dim=1) / norms).max().item()
    most = bound(shape)
    if off <= most:  # false for NaN too
        return ""
    return f"the kernels' output is off by {off:.1e} of a row's norm, and at most {most:.1e} may be"
