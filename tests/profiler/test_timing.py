from __future__ import annotations

import pytest
import torch
from diffusers import WanPipeline
from torch import nn

from ditune.profiler.timing import OUTSIDE, LayerClock, layers_of, timed


def test_timed_gives_the_result_and_a_duration() -> None:
    result, lasted = timed(lambda: 42, torch.device("cpu"))
    assert result == 42
    assert lasted >= 0.0


def test_what_is_outside_of_all_layers_adds_up_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up clock: 1 s passes at every look at it."""
    looks = iter(range(100))
    monkeypatch.setattr("ditune.profiler.timing.time.perf_counter", lambda: float(next(looks)))
    inner = nn.Linear(2, 2)
    outer = nn.Sequential(inner)
    clock = LayerClock(torch.device("cpu"))
    with clock.attached({"outer": outer, "outer.inner": inner}):
        outer(torch.zeros(1, 2))
        outer(torch.zeros(1, 2))
    found = {layer.name: layer for layer in clock.timings()}
    assert (found["outer"].median_ms, found["outer"].n) == (3000.0, 2)
    assert found["outer.inner"].median_ms == 1000.0
    assert found[OUTSIDE].median_ms == 3000.0  # before, between and after


def test_every_block_is_timed_and_the_clock_comes_off(pipe: WanPipeline, generate: object) -> None:
    assert callable(generate)
    layers = layers_of(pipe)
    with LayerClock(torch.device("cpu")).attached(layers) as clock:
        generate(pipe)
    found = {layer.name: layer for layer in clock.timings()}
    outside = found.pop(OUTSIDE)
    beside = ("patch_embedding", "rope", "condition_embedder", "norm_out", "proj_out")
    names = {f"transformer.blocks.{i}" for i in range(4)} | {"transformer"}
    names |= {f"transformer.{part}" for part in beside}
    assert names == set(found)
    assert outside.median_ms > 0.0
    assert all(layer.n == 24 for layer in found.values())
    assert all(layer.p20_ms <= layer.median_ms <= layer.p80_ms for layer in found.values())
    blocks = sum(layer.median_ms for name, layer in found.items() if "blocks" in name)
    assert blocks < found["transformer"].median_ms * 1.5
    generate(pipe)
    assert {layer.name: layer for layer in clock.timings()}["transformer"].n == 24
