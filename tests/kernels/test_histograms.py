"""Routings have the rows that they should, and tokens that have them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditune.db.errors import UsageFault
from ditune.kernels.histograms import KINDS, Kind, histogram, router_output

SIZES = st.integers(1, 12).flatmap(
    lambda experts: st.tuples(st.integers(0, 90), st.just(experts), st.integers(1, experts))
)


@given(st.sampled_from(KINDS), SIZES)
def test_all_rows_are_given_out_and_tokens_have_them(
    kind: Kind, size: tuple[int, int, int]
) -> None:
    tokens, experts, top_k = size
    counts = histogram(kind, tokens, experts, top_k)
    assert len(counts) == experts
    assert sum(counts) == tokens * top_k
    assert all(0 <= count <= tokens for count in counts)
    indices, weights = router_output(counts, top_k)
    assert indices.shape == weights.shape == (tokens, top_k)
    assert torch.equal(torch.bincount(indices.flatten(), minlength=experts), torch.tensor(counts))
    assert all(len(set(row)) == top_k for row in indices.tolist())
    assert torch.allclose(weights.sum(1), torch.ones(tokens))


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        ("balanced", (25, 25, 25, 25)),
        ("best", (50, 50, 0, 0)),
        ("worst", (49, 49, 1, 1)),
        ("hole", (50, 50, 0, 0)),
        ("zipf", (50, 25, 15, 10)),
    ],
)
def test_fifty_tokens_with_two_of_four_experts(kind: Kind, counts: tuple[int, ...]) -> None:
    assert histogram(kind, 50, 4, 2) == counts


def test_what_no_tokens_can_have_is_refused() -> None:
    with pytest.raises(UsageFault, match="between 1 and 2"):
        histogram("balanced", 8, 2, 3)
    with pytest.raises(UsageFault, match="the most 5 of 3 tokens"):
        router_output((5, 1), 2)
    with pytest.raises(UsageFault, match="multiple of 2"):
        router_output((2, 1), 2)
