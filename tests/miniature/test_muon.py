from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ditune.miniature.muon import Muon, orthogonal


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_singular_values_come_near_one_and_directions_stay(
    rows: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(2, rows, columns, generator=generator)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonal(matrices, 8)
    inside = left.mT @ found @ right.mT
    off_diagonal = inside - torch.diag_embed(torch.diagonal(inside, dim1=1, dim2=2))
    assert float(off_diagonal.abs().max()) < 1e-3
    well_conditioned = values > 0.02 * values[:, :1]
    stretched = torch.diagonal(inside, dim1=1, dim2=2)[well_conditioned]
    assert bool(((stretched > 0.5) & (stretched < 1.4)).all())


def test_it_is_the_library_optimiser_in_single_precision() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4, 4))]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    optimisers = (
        Muon(ours, lr=0.05, weight_decay=0.1, iterations=4),
        torch.optim.Muon(theirs, lr=0.05, weight_decay=0.1, ns_steps=4),
    )
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimiser in optimisers:
            optimiser.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=0.02, rtol=0.0)  # theirs rounds to bfloat16


def test_parameters_without_a_gradient_stay_and_vectors_are_refused() -> None:
    matrix = nn.Parameter(torch.ones(2, 2))
    Muon([matrix], lr=0.1).step()
    assert bool((matrix == 1.0).all())
    with pytest.raises(ValueError, match="matrices"):
        Muon([nn.Parameter(torch.ones(3))], lr=0.1)
