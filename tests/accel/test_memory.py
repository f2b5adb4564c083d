"""The memory of caches is known before they run, for every form and granularity."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import WanPipeline

from ditune.accel.apply import accelerate
from ditune.accel.memory import planned_bytes
from ditune.accel.tap import tapped
from ditune.db.policy import Action, CachePolicy, MaskCache, Payload, Policy, RuleCache
from ditune.profiler.redundancy import Redundancy

STEPS = 12
Generate = Any
MASKS: list[tuple[Action, ...]] = [
    ("full", "full", "full", "step") * 3,
    ("full", "full", "full", "cfg") * 3,
    ("full", "full", "full", "block") * 3,
    ("full", "full", "full", "step", "cfg", "block") * 2,
]


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("form", ["output", "latent", "hidden"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_caches_hold_what_was_planned(
    pipe: WanPipeline, generate: Generate, form: Any, order: int, guidance: float
) -> None:
    watched = Redundancy(guidance)
    with tapped(pipe, watched.watch):
        generate(pipe, guidance_scale=guidance)
    sizes = watched.forward_bytes()
    assert sizes is not None
    assert sizes.branches == (2 if guidance > 1.0 else 1)
    payload = Payload(form=form, order=order)
    caches: list[CachePolicy] = [MaskCache(actions=each, payload=payload) for each in MASKS]
    caches.append(RuleCache(warmup_frac=0.5, payload=payload))
    for cache in caches:
        with accelerate(pipe, Policy(cache=cache)) as applied:
            generate(pipe, guidance_scale=guidance)
            assert applied.summary().cache_bytes == planned_bytes(cache, sizes)
