from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from tests.conftest import Generate
from torch import Tensor, nn

from ditune.accel.apply import accelerate
from ditune.db.policy import MaskCache, Policy
from ditune.profiler.work import WorkCounter

A, B = torch.randn(3, 4, 5), torch.randn(3, 5, 6)
ADDED, WEIGHT, LAYER = torch.zeros(3, 4, 6), torch.randn(6, 5), nn.Linear(5, 6)
QUERY, KEY = torch.randn(1, 2, 7, 8), torch.randn(1, 2, 9, 8)
IMAGE, KERNEL = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)


@pytest.mark.parametrize(
    ("work", "flops"),
    [
        (lambda: F.linear(A, WEIGHT), 2 * 12 * 5 * 6),
        (lambda: LAYER(A), 2 * 12 * 5 * 6),
        (lambda: A @ B, 2 * 3 * 4 * 5 * 6),
        (lambda: torch.bmm(A, B), 2 * 3 * 4 * 5 * 6),
        (lambda: torch.einsum("bij,bjk->bik", A, B), 2 * 3 * 4 * 5 * 6),
        (lambda: torch.baddbmm(ADDED, A, B), 2 * 3 * 4 * 5 * 6),
        (lambda: F.conv2d(IMAGE, KERNEL), 2 * 4 * 6 * 6 * 3 * 9),
        (lambda: F.scaled_dot_product_attention(QUERY, KEY, KEY), 2 * 2 * 7 * 9 * (8 + 8)),
        (lambda: torch.fft.fft2(IMAGE), 5 * 192 * 8),
        (lambda: A + 1.0, 60),
        (lambda: A.clone().mul_(2.0), 120),
        (lambda: A.chunk(2, dim=1), 0),
        (lambda: A.transpose(1, 2).unsqueeze(0)[0], 0),
        (lambda: A.mean(), 1),
    ],
)
def test_operations_are_counted(work: Callable[[], Tensor], flops: int) -> None:
    with torch.no_grad(), WorkCounter() as counter:
        work()
    assert counter.flops == flops


def test_what_is_left_out_is_not_counted(pipe: WanPipeline, generate: Generate) -> None:
    with WorkCounter() as plain:
        wanted = generate(pipe)
    actions = ("full", "full", "step", "full", "step", "step") * 2
    policy = Policy(cache=MaskCache(actions=actions))  # type: ignore[arg-type]
    with accelerate(pipe, policy), WorkCounter() as tuned:
        generate(pipe)
    assert torch.equal(wanted, generate(pipe))
    ratio = plain.flops / tuned.flops
    assert 1.95 < ratio < 2.0  # half of the steps, and their forecasts
