"""The layers that `benchmarks.moe` times, and what others compute them with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from ditune.db.moe import MoeShape
from ditune.kernels.cpu_pool import Pool
from ditune.kernels.histograms import Kind, histogram
from ditune.kernels.reference import Experts
from ditune.tuner.drawn import tokens_of
from ditune.tuner.moe import Routed

ROUTINGS: dict[str, Kind] = {  # names of the table
    "balanced": "balanced",
    "zipf": "zipf",
    "one-hot": "best",
    "hole": "hole",
}
_HIDDEN, _INNER, _TOP_K = 512, 1024, 2
SIZES = {
    4: 2048,
    16: 4096,
    64: 6144,
    128: 12288,
}  # experts: tokens, 192 rows and more for each expert
Layer = tuple[Tensor, Experts, Tensor, Tensor]
Contestant = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One layer and one routing."""

    experts: int
    tokens: int
    routing: str

    def __str__(self) -> str:
        """Name the case as the table does."""
        return f"{self.experts} experts, {self.routing}"

    @property
    def shape(self) -> MoeShape:
        """The layer as a tuner sees it."""
        return MoeShape(
            experts=self.experts, hidden=_HIDDEN, inner=_INNER, top_k=_TOP_K, dtype="float32"
        )

    @property
    def rows(self) -> int:
        """Routed rows."""
        return self.tokens * _TOP_K

    @property
    def routed(self) -> Routed:
        """How its tokens are routed."""
        return Routed(
            str(self), self.tokens, histogram(self._kind, self.tokens, self.experts, _TOP_K)
        )

    @property
    def _kind(self) -> Kind:
        return ROUTINGS[self.routing]

    def layer(self, experts: Experts) -> Layer:
        """Return tokens, weights, indices and routing weights."""
        hidden, indices, weights = tokens_of(self.routed, self.shape, torch.device("cpu"))
        return hidden, experts, indices, weights


def cases(numbers: Sequence[int], *, quick: bool) -> Iterator[list[Case]]:
    """Yield the cases that have the same weights, for some of `SIZES`; quick ones have fewer rows.

    Args:
        numbers: Of experts.
        quick: Whether to take a quarter of the tokens.
    """
    for experts in numbers:
        tokens = SIZES[experts] // (4 if quick else 1)
        yield [Case(experts, tokens, routing) for routing in ROUTINGS]


def dense(case: Case, experts: Experts, *, fresh: bool) -> Contestant:
    """Return the two GEMMs with one expert's weight for all rows: equal operations, nothing else.

    They have run once, so that memory is touched.

    Args:
        case: How many rows.
        experts: The first one's weights are taken.
        fresh: Whether results are new tensors, as one writes it, or lie in memory that is kept.
    """
    rows, up, down = _operands(case, experts)
    both, out = rows.new_empty(case.rows, 2 * _INNER), torch.empty_like(rows)

    def anew() -> Tensor:
        return torch.mm(torch.mm(rows, up)[:, :_INNER], down)

    def kept() -> Tensor:
        torch.mm(rows, up, out=both)
        return torch.mm(both[:, :_INNER], down, out=out)

    compute = anew if fresh else kept
    compute()
    return compute


def dense_on(case: Case, experts: Experts, pool: Pool) -> Contestant:
    """Return the same two GEMMs, each thread of a pool with its share of the rows.

    Args:
        case: How many rows.
        experts: The first one's weights are taken.
        pool: The threads.
    """
    rows, up, down = _operands(case, experts)
    found = torch.empty_like(rows)
    shares = list(zip(rows.chunk(pool.size), found.chunk(pool.size), strict=True))

    def compute(share: tuple[Tensor, Tensor]) -> None:
        given, out = share
        torch.mm(torch.mm(given, up)[:, :_INNER], down, out=out)

    def together() -> Tensor:
        pool.run(compute, shares)
        return found

    return together


def _operands(case: Case, experts: Experts) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, and both weights of one expert as right operands."""
    rows = torch.randn(case.rows, _HIDDEN, generator=torch.Generator().manual_seed(2))
    return rows, experts.gate_up[0].T, experts.down[0].T


def peers(layer: Layer) -> dict[str, Contestant]:
    """Return the same layer as transformers and diffusers compute it.

    Without transformers' `batched_mm`: it copies an expert's weights for each row, 6 MiB here.
    """
    hidden, experts, indices, weights = layer
    config = Qwen3MoeConfig(
        num_experts=experts.count,
        hidden_size=_HIDDEN,
        moe_intermediate_size=_INNER,
        hidden_act="silu",
    )
    with torch.device("meta"):
        module: Any = Qwen3MoeExperts(config)
    module.gate_up_proj, module.down_proj = map(_frozen, (experts.gate_up, experts.down))

    def implementation(name: str) -> Contestant:
        def compute() -> Tensor:
            config._experts_implementation = name
            result: Tensor = module(hidden, indices, weights)
            return result

        return compute

    return {
        "eager": implementation("eager"),
        "grouped_mm": implementation("grouped_mm"),
        "HiDream": _hidream(layer),
    }


def _hidream(layer: Layer) -> Contestant:
    """Return the loop of HiDream's layer, without its router and its shared expert."""
    hidden, experts, indices, weights = layer
    with torch.device("meta"):  # its feed-forward takes two thirds of the width that it is given
        module: Any = MOEFeedForwardSwiGLU(_HIDDEN, _INNER * 3 // 2, experts.count, _TOP_K)
    for number, expert in enumerate(module.experts):
        gate, up = experts.gate_up[number].chunk(2)
        expert.w1.weight, expert.w3.weight = _frozen(gate), _frozen(up)
        expert.w2.weight = _frozen(experts.down[number])
    flat, scale = indices.reshape(-1), weights.reshape(-1, 1)

    def compute() -> Tensor:
        result: Tensor = module.moe_infer(hidden, flat, scale)
        return result

    return compute


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
