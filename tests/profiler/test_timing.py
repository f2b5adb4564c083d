from __future__ import annotations

import torch
from diffusers import WanPipeline

from ditune.profiler.timing import LayerClock, layers_of, timed


def test_timed_gives_the_result_and_a_duration() -> None:
    result, lasted = timed(lambda: 42, torch.device("cpu"))
    assert result == 42
    assert lasted >= 0.0


def test_every_block_is_timed_and_the_clock_comes_off(pipe: WanPipeline, generate: object) -> None:
    assert callable(generate)
    layers = layers_of(pipe)
    with LayerClock(torch.device("cpu")).attached(layers) as clock:
        generate(pipe)
    found = {layer.name: layer for layer in clock.timings()}
    names = {f"transformer.blocks.{i}" for i in range(4)} | {"transformer"}
    assert names == set(found)
    assert all(layer.n == 24 for layer in found.values())
    assert all(layer.p20_ms <= layer.median_ms <= layer.p80_ms for layer in found.values())
    blocks = sum(layer.median_ms for name, layer in found.items() if "blocks" in name)
    assert blocks < found["transformer"].median_ms * 1.5
    generate(pipe)
    assert {layer.name: layer for layer in clock.timings()}["transformer"].n == 24
