"""The MoE reference against a dense formulation that shares nothing with it but the weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ditune.db.errors import UsageFault
from ditune.kernels.reference import Experts, moe_reference

HIDDEN, INNER = 12, 20


def layer(experts: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Experts:
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(experts, 2 * INNER, HIDDEN, generator=generator, dtype=torch.float64)
    down = torch.randn(experts, HIDDEN, INNER, generator=generator, dtype=torch.float64)
    return Experts((gate_up / HIDDEN**0.5).to(dtype), (down / INNER**0.5).to(dtype))


def inputs(tokens: int, top_k: int, experts: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    indices = torch.randint(0, experts, (tokens, top_k), generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
    return hidden, indices, weights


def dense(hidden: Tensor, experts: Experts, indices: Tensor, weights: Tensor) -> Tensor:
    """Apply every expert to every token and keep what one-hot weights say."""
    up = torch.einsum("th,eih->eti", hidden, experts.gate_up)
    gate, value = up[..., :INNER], up[..., INNER:]
    outputs = torch.einsum("eti,ehi->eth", gate / (1 + torch.exp(-gate)) * value, experts.down)
    one_hot = (indices[..., None] == torch.arange(experts.count)).to(weights.dtype)
    return torch.einsum("eth,tke,tk->th", outputs, one_hot, weights)


@given(st.integers(0, 40), st.integers(1, 4), st.integers(1, 7), st.integers(0, 1000))
def test_equals_dense_formulation(tokens: int, top_k: int, experts: int, seed: int) -> None:
    case = inputs(tokens, top_k, experts, seed)
    weights = layer(experts, seed=seed)
    torch.testing.assert_close(
        moe_reference(case[0], weights, *case[1:]),
        dense(case[0], weights, *case[1:]),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)],
)
def test_narrow_dtypes_lose_only_their_own_rounding(dtype: torch.dtype, tolerance: float) -> None:
    hidden, indices, weights = inputs(33, 2, 5)
    narrow = layer(5, dtype)
    actual = moe_reference(hidden.to(dtype), narrow, indices, weights)
    exact = dense(
        hidden.to(dtype).double(),
        Experts(narrow.gate_up.double(), narrow.down.double()),
        indices,
        weights,
    )
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)


def test_no_tokens() -> None:
    hidden, indices, weights = inputs(0, 2, 4)
    assert moe_reference(hidden, layer(4), indices, weights).shape == (0, HIDDEN)


def test_all_tokens_on_one_expert_is_that_expert() -> None:
    hidden, _, _ = inputs(17, 1, 4)
    experts = layer(4)
    indices = torch.full((17, 1), 2, dtype=torch.int32)
    alone = Experts(experts.gate_up[2:3], experts.down[2:3])
    ones = torch.ones(17, 1, dtype=torch.float64)
    expected = moe_reference(hidden, alone, torch.zeros_like(indices), ones)
    assert torch.equal(expected, moe_reference(hidden, experts, indices, ones))


@pytest.mark.parametrize("elsewhere", [-1, 4, 2**31 - 1])
def test_experts_on_other_devices_add_nothing(elsewhere: int) -> None:
    hidden, indices, weights = inputs(9, 3, 4)
    weights[:, 1] = float("nan")  # not even looked at
    indices[:, 1] = elsewhere
    expected = moe_reference(hidden, layer(4), indices[:, [0, 2]], weights[:, [0, 2]])
    assert torch.equal(expected, moe_reference(hidden, layer(4), indices, weights))


def test_parallel_shards_add_up_to_the_whole() -> None:
    hidden, indices, weights = inputs(25, 2, 6)
    whole = layer(6)
    shards = [
        moe_reference(
            hidden,
            Experts(whole.gate_up[first : first + 3], whole.down[first : first + 3]),
            indices - first,
            weights,
        )
        for first in (0, 3)
    ]
    expected = moe_reference(hidden, whole, indices, weights)
    torch.testing.assert_close(sum(shards), expected, rtol=1e-12, atol=1e-12)


def test_one_expert_in_two_slots_counts_twice() -> None:
    hidden, _, _ = inputs(5, 1, 2)
    indices = torch.ones(5, 2, dtype=torch.int64)
    halves = torch.full((5, 2), 0.5, dtype=torch.float64)
    once = moe_reference(hidden, layer(2), indices[:, :1], 2 * halves[:, :1])
    torch.testing.assert_close(moe_reference(hidden, layer(2), indices, halves), once)


def test_neither_token_nor_expert_order_matters() -> None:
    hidden, indices, weights = inputs(31, 2, 5)
    experts = layer(5)
    tokens, names = torch.randperm(31), torch.randperm(5)
    renamed = Experts(experts.gate_up[names], experts.down[names])
    expected = moe_reference(hidden, experts, indices, weights)[tokens]
    actual = moe_reference(
        hidden[tokens], renamed, torch.argsort(names)[indices[tokens]], weights[tokens]
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def refuse(
    match: str,
    hidden: Tensor | None = None,
    experts: Experts | None = None,
    indices: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    case = inputs(6, 2, 3)
    with pytest.raises(UsageFault, match=match):
        moe_reference(
            case[0] if hidden is None else hidden,
            experts or layer(3),
            case[1] if indices is None else indices,
            case[2] if weights is None else weights,
        )


def test_bad_tokens_and_weights_are_refused() -> None:
    good = layer(3)
    refuse("flatten batch", hidden=torch.zeros(1, 6, HIDDEN, dtype=torch.float64))
    refuse("float dtype", hidden=torch.zeros(6, HIDDEN, dtype=torch.int64))
    refuse("hidden size", hidden=torch.zeros(6, HIDDEN + 1, dtype=torch.float64))
    refuse("hidden size", experts=Experts(good.gate_up[0], good.down))
    refuse("at least one expert", experts=Experts(good.gate_up[:0], good.down[:0]))
    refuse("at least one expert", experts=Experts(good.gate_up[:, 1:], good.down))
    refuse("down must be", experts=Experts(good.gate_up, good.down[:2]))
    refuse("one dtype", experts=layer(3, torch.float32))
    refuse("one dtype", hidden=torch.zeros(6, HIDDEN, dtype=torch.float64, device="meta"))


def test_bad_routing_is_refused() -> None:
    _, indices, weights = inputs(6, 2, 3)
    refuse("one row per token", indices=indices[:5])
    refuse("one row per token", indices=indices[:, :0])
    refuse("one row per token", indices=indices.flatten())
    refuse("whole numbers", indices=indices.double())
    refuse("whole numbers", indices=indices == 0)
    refuse("shaped like indices", weights=weights[:, :1])
    refuse("must be float", weights=indices)
    refuse("one device", weights=weights.to("meta"))
