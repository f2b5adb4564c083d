"""Routings that layers of experts are tuned and measured on: counts of rows, and router output.

Balanced, best and worst are the three scenarios of arXiv 2501.16103 as far as they are known; the
others stand between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ditune.db.errors import UsageFault

Kind = Literal["balanced", "zipf", "best", "worst", "hole"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_ZIPF = 1.2  # exponent


def histogram(kind: Kind, tokens: int, experts: int, top_k: int) -> tuple[int, ...]:
    """Return the rows of each expert; together they are `tokens * top_k`, and none has over tokens.

    Args:
        kind: "balanced": all alike. "zipf": the r-th has a share of r ** -1.2. "best": all tokens
            have the same experts, the fewest and largest tasks. "worst": most experts have one row,
            `top_k` share what is left. "hole": half of the experts have none.
        tokens: >= 0.
        experts: >= top_k.
        top_k: Experts of each token, all different, >= 1.

    Raises:
        UsageFault: Tokens cannot have so many different experts.
    """
    if not 1 <= top_k <= experts or tokens < 0:
        raise UsageFault(
            f"{tokens} tokens with {top_k} of {experts} experts each: a token needs between 1 and "
            f"{experts} experts"
        )
    rank = np.arange(experts)
    if kind == "worst":
        few = (rank >= top_k) & (rank < tokens * top_k)  # the rest is given to the first
        shares = np.where(rank < top_k, max(tokens - (experts - top_k) / top_k, 0.0), few)
    else:
        shares = {
            "balanced": np.ones(experts),
            "zipf": 1.0 / (rank + 1.0) ** _ZIPF,
            "best": (rank < top_k).astype(float),
            "hole": (rank < max(top_k, experts // 2)).astype(float),
        }[kind]
    return _apportioned(shares, tokens, tokens * top_k)


def _apportioned(shares: np.ndarray, most: int, total: int) -> tuple[int, ...]:
    """Return whole numbers in these proportions, each at most `most`; what is over moves on."""
    counts = np.zeros(len(shares), dtype=np.int64)
    while (left := total - int(counts.sum())) > 0:
        open_ = np.where(counts < most, shares, 0.0)
        if not open_.any():
            open_ = (counts < most).astype(float)
        more = np.floor(left * open_ / open_.sum()).astype(np.int64)
        if not more.any():
            more[np.argsort(-open_, kind="stable")[:left]] = 1
        counts = np.minimum(counts + more, most)
    return tuple(int(count) for count in counts)


def router_output(counts: Sequence[int], top_k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return indices and weights of tokens that give a histogram.

    Args:
        counts: Rows of each expert, each at most tokens = sum / top_k.
        top_k: Experts of each token.
        seed: Of the order of tokens and of the weights.

    Returns:
        Indices, [tokens, top_k] int64, no expert twice in a token, and weights, [tokens, top_k]
        float32, positive, a token's adding up to one.

    Raises:
        UsageFault: No tokens have such a histogram.
    """
    tokens, rest = divmod(sum(counts), top_k)
    if rest or max(counts, default=0) > tokens:
        raise UsageFault(
            f"no tokens with {top_k} experts each have these rows: together they must be a "
            f"multiple of {top_k}, and no expert may have more than there are tokens; found "
            f"{sum(counts)} rows, the most {max(counts, default=0)} of {tokens} tokens"
        )
    generator = torch.Generator().manual_seed(seed)
    flat = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    # consecutive rows of one expert go to different tokens, as it has no more rows than those
    indices = flat.reshape(top_k, tokens).T[torch.randperm(tokens, generator=generator)]
    weights = torch.rand(tokens, top_k, generator=generator) + 0.1
    return indices.contiguous(), weights / weights.sum(1, keepdim=True)
