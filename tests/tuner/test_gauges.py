"""What a video takes besides time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.tuner.conftest import TINY_STEPS

from ditune.accel.apply import Summary
from ditune.db.errors import UsageFault
from ditune.db.policy import Action, MaskCache, Policy
from ditune.tuner.curve_points import Objectives
from ditune.tuner.evaluate import Case
from ditune.tuner.gauges import Energy, GaugedEvaluator, Memory, gauge_of
from ditune.tuner.source import FolderSource

CPU = torch.device("cpu")
SUMMARY = Summary(
    policy_id=None,
    reason="",
    steps={},
    forwards=0,
    computed=0,
    small_forwards=0,
    work_ratio=1.0,
    cache_bytes=300,
    peak_weight_bytes=7000,
    trips=(),
)


def test_memory_on_a_cpu_is_weights_and_caches() -> None:
    gauge = Memory(CPU)
    gauge.start()
    assert gauge.read(SUMMARY) == 7300.0
    assert gauge.read(replace(SUMMARY, cache_bytes=0)) == 7000.0


def test_energy_without_a_counter_is_refused_in_one_sentence() -> None:
    with pytest.raises(UsageFault, match=r"cannot be measured on cpu: .* --also memory"):
        Energy(CPU)
    assert gauge_of(None, CPU) is None


@pytest.mark.gpu
def test_memory_and_energy_on_a_gpu() -> None:
    device = torch.device("cuda")
    memory, energy = Memory(device), Energy(device)
    memory.start()
    energy.start()
    square = torch.ones(4096, 4096, device=device)
    for _ in range(200):
        square = square @ square * 1e-4
    torch.cuda.synchronize()
    assert memory.read(SUMMARY) >= 4096 * 4096 * 4
    assert energy.read(SUMMARY) > 0.0


def test_an_evaluator_notes_what_each_tuned_video_takes(tiny: FolderSource) -> None:
    reused: list[Action] = ["step"] * (TINY_STEPS - 1)
    mask = Policy(cache=MaskCache(actions=("full", *reused)))
    case = Case("a prompt", 0)
    evaluator = GaugedEvaluator(tiny, [Objectives().scored], "memory")
    assert evaluator.drain() is None
    evaluator.plain(case)
    assert evaluator.drain() is None  # only what is tuned
    evaluator.tuned(Policy(), case)
    weights = evaluator.drain()
    _, _, summary = evaluator.tuned(mask, case)
    assert weights == summary.peak_weight_bytes
    assert evaluator.drain() == weights + summary.cache_bytes
    assert summary.cache_bytes > 0
    quiet = GaugedEvaluator(tiny, [Objectives().scored], None)
    quiet.tuned(mask, case)
    assert quiet.drain() is None
