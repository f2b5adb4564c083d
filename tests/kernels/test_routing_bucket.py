"""Buckets of routings as the records define them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditune.db.moe import RoutingBucket
from ditune.kernels.routing_bucket import SKEWS, most_tokens, routing_bucket


@pytest.mark.parametrize(
    ("tokens", "most"), [(0, 1), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (4096, 4096), (4097, 8192)]
)
def test_most_tokens(tokens: int, most: int) -> None:
    assert most == most_tokens(tokens)


@pytest.mark.parametrize(
    ("counts", "skew", "active"),
    [
        ([4, 4, 4, 4], "even", 0),
        ([15, 4, 4, 4], "uneven", 0),  # 2.2 times the mean
        ([16, 4, 4, 0], "uneven", 0),  # exactly twice
        ([0, 3, 0, 3], "even", 1),  # exactly half of them
        ([0, 7, 0, 0], "even", 2),
        ([160] + [1] * 19, "steep", 0),  # 17.9 times
        ([0, 0, 0], "even", 1),
        ([5], "even", 0),
    ],
)
def test_kinds(counts: list[int], skew: str, active: int) -> None:
    found = routing_bucket(counts, 8)
    assert (skew, active) == (found.skew, found.active)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40).filter(any), st.integers(0, 9999))
def test_kinds_follow_their_definition(counts: list[int], tokens: int) -> None:
    rows = [count for count in counts if count]
    share, ratio = len(rows) / len(counts), max(rows) / (sum(rows) / len(rows))
    found = routing_bucket(torch.tensor(counts), tokens)
    assert 0.5 ** (found.active + 1) < share <= 0.5**found.active
    if min(abs(ratio - bound) for bound in (2, 8)) > 1e-9:  # the bound itself is tested above
        assert SKEWS[(ratio > 2) + (ratio > 8)] == found.skew
    assert RoutingBucket(tokens=found.tokens, skew=found.skew, active=found.active) == found
    assert found.tokens / 2 < max(tokens, 1) <= found.tokens
