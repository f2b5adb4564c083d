"""From router output to packed rows: which token each row is, and where each expert's rows lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Routing:
    """Rows of all experts one after the other, in the order of expert ids, without padding.

    Slots of experts that another device holds have the last rows, beyond every expert's.

    Args:
        counts: Rows of each expert, [experts] int64.
        rows: First row of each expert and the end of the last, [experts + 1] int64.
        slots: Which (token, slot) each row is, token * top_k + slot, [tokens * top_k] int64.
        places: Row of each (token, slot), [tokens * top_k] int64; the inverse of `slots`.
        top_k: Experts per token.
    """

    counts: Tensor
    rows: Tensor
    slots: Tensor
    places: Tensor
    top_k: int


def route(indices: Tensor, experts: int) -> Routing:
    """Sort the slots of all tokens by expert, without synchronizing the device.

    Args:
        indices: Expert of each slot of each token, [tokens, top_k], any integer dtype; below 0 or
            from `experts` on it is held by another device.
        experts: Number of experts here, >= 1.
    """
    flat = indices.reshape(-1).to(torch.int64)
    flat = torch.where((flat < 0) | (flat >= experts), experts, flat)
    ordered, slots = torch.sort(flat, stable=True)
    bounds = torch.arange(experts + 1, device=flat.device)
    rows = torch.searchsorted(ordered, bounds)  # bincount would wait for the device
    places = torch.empty_like(slots)
    places[slots] = torch.arange(slots.numel(), device=flat.device)
    return Routing(rows.diff(), rows, slots, places, indices.shape[1])
