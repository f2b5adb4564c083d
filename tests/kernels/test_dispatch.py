"""Which implementation computes a layer, and in which tiles."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from tests.kernels.adapters.models import noise
from torch import Tensor

from ditune.db.moe import CpuTiles, LayerTiles, MoeShape, MoeTuning, default_tiles
from ditune.kernels import dispatch
from ditune.kernels.reference import Experts, moe_reference

SHAPE = MoeShape(experts=3, hidden=16, inner=8, top_k=2, dtype="float32")
TUNED = MoeTuning(shape=SHAPE, default=CpuTiles(rows=32))
CPU = torch.device("cpu")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[MoeTuning]:
    """Return the tunings that reach the CPU's kernels."""
    tunings: list[MoeTuning] = []

    def cpu(*given: Any) -> Tensor:
        tunings.append(given[-1])
        return moe_reference(*given[:-1])

    monkeypatch.setattr(import_module("ditune.kernels.cpu_tiles"), "moe_cpu", cpu)
    return tunings


def layer(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Experts, Tensor, Tensor]:
    experts = Experts(noise(3, 16, 16).to(dtype), noise(3, 16, 8).to(dtype))
    indices = torch.tensor([[0, 2], [2, 1], [0, 1], [1, 7]])
    return noise(4, 16).to(dtype), experts, indices, noise(4, 2).to(dtype)


def test_a_tuning_of_the_shape_is_used(seen: list[MoeTuning]) -> None:
    given = layer()
    assert torch.equal(dispatch.moe(*given, TUNED), moe_reference(*given))
    assert seen == [TUNED]


@pytest.mark.parametrize(
    "other",
    [
        None,
        MoeTuning(shape=SHAPE.model_copy(update={"top_k": 1}), default=CpuTiles(rows=32)),
        MoeTuning(shape=SHAPE, default=LayerTiles()),
    ],
)
def test_any_other_tuning_counts_as_none(other: MoeTuning | None, seen: list[MoeTuning]) -> None:
    dispatch.moe(*layer(), other)
    assert seen == [dispatch.default_tuning(SHAPE, CPU)]
    assert seen[0].default == CpuTiles()


def test_dtypes_that_nobody_tunes_run_by_the_reference(seen: list[MoeTuning]) -> None:
    given = layer(torch.float64)
    assert torch.equal(dispatch.moe(*given, TUNED), moe_reference(*given))
    assert seen == []


def test_devices_have_the_tiles_of_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    cuda = torch.device("cuda", 7)
    assert dispatch.default_tuning(SHAPE, cuda).default == default_tiles("float32")
    dispatch.device_kind.cache_clear()
    capability = (7, 5)
    assert dispatch.device_kind(cuda) is None
    dispatch.device_kind.cache_clear()
    assert dispatch.device_kind(torch.device("meta")) is None


def test_the_node_of_a_graph_is_declared_as_it_behaves(seen: list[MoeTuning]) -> None:
    hidden, experts, indices, weights = layer()
    given = (hidden, experts.gate_up, experts.down, indices, weights, TUNED.model_dump_json())
    torch.library.opcheck(dispatch.moe_in_graph, given)
    assert set(map(repr, seen)) == {repr(TUNED)}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_device_runs_the_triton_kernels(dtype: torch.dtype) -> None:
    hidden, experts, indices, weights = layer(dtype)
    moved = Experts(experts.gate_up.cuda(), experts.down.cuda())
    found = dispatch.moe(hidden.cuda(), moved, indices.cuda(), weights.cuda()).cpu().float()
    wanted = moe_reference(hidden, experts, indices, weights).float()
    bound = 8 * torch.finfo(dtype).eps * wanted.abs().max()
    assert (found - wanted).abs().max() <= bound
