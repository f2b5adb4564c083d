"""What is written for another tool does the same there, bit for bit; the rest is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from ditune.accel import export
from ditune.accel.apply import accelerate
from ditune.db.errors import UsageFault
from ditune.db.policy import Action, Handoff, MaskCache, Payload, Policy, RuleCache

Generate = Any
F: Action = "full"
B: Action = "block"
S: Action = "step"
BLOCKS = MaskCache(
    actions=(F, F, F, B, F, B, B, F, B, F, F, B), bn_blocks=1, payload=Payload(order=0)
)
FRONT = RuleCache(
    indicator="first_block",
    threshold=0.1,
    accumulated=False,
    warmup_frac=0.0,
    cooldown_steps=0,
    allowed=("block",),
    payload=Payload(order=0),
    interval_max=4,
)
EVEN = MaskCache(actions=(F, F, F, S, F, S, S, F, S, S, F, S), payload=Payload(order=1))


@pytest.mark.filterwarnings("ignore")  # of cache-dit's imports
@pytest.mark.parametrize("cache", [BLOCKS, FRONT], ids=["mask", "rule"])
def test_cache_dit_does_the_same(
    pipe: WanPipeline, generate: Generate, tmp_path: Path, cache: MaskCache | RuleCache
) -> None:
    cache_dit = pytest.importorskip("cache_dit", reason='pip install "ditune[peers]"')
    plain = generate(pipe)
    with accelerate(pipe, Policy(cache=cache)):
        ours = generate(pipe)
    file = tmp_path / "cache.yaml"
    file.write_text(export.cache_dit(Policy(cache=cache)))
    cache_dit.enable_cache(pipe, **cache_dit.load_configs(str(file)))
    try:
        theirs = generate(pipe)
    finally:
        cache_dit.disable_cache(pipe)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, plain)


@pytest.mark.parametrize("order", [0, 1])
def test_diffusers_does_the_same(pipe: WanPipeline, generate: Generate, order: int) -> None:
    policy = Policy(cache=EVEN.model_copy(update={"payload": Payload(order=order)}))
    plain = generate(pipe)
    with accelerate(pipe, policy):
        ours = generate(pipe)
    exec(export.diffusers(policy), {"pipe": pipe})
    theirs = generate(pipe)
    pipe.transformer.disable_cache()
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, plain, atol=1e-3)


def changed(cache: Any, **changes: Any) -> Policy:
    return Policy(cache=cache.model_copy(update=changes))


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (Policy(), "nothing in it"),
        (Policy(handoff=Handoff(sigma=0.5)), "small model"),
        (Policy(cache=EVEN), "it reuses step"),
        (changed(BLOCKS, fn_blocks=0), "always runs the first block"),
        (changed(BLOCKS, payload=Payload(order=1)), "continue hidden states"),
        (changed(FRONT, indicator="latent"), "only the front blocks decide"),
        (changed(FRONT, indicator=None), "only the front blocks decide"),
        (changed(FRONT, allowed=("cfg", "block")), "chooses among granularities"),
        (changed(FRONT, warmup_frac=0.2), "protected steps"),
        (changed(FRONT, accumulated=True), "added up"),
    ],
)
def test_what_cache_dit_cannot_do_is_refused(policy: Policy, reason: str) -> None:
    with pytest.raises(UsageFault, match=reason):
        export.cache_dit(policy)


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (Policy(), "none of its caches"),
        (Policy(handoff=Handoff(sigma=0.5)), "small model"),
        (Policy(cache=FRONT), "none of its caches"),
        (Policy(cache=BLOCKS), "reuses whole outputs"),
        (changed(EVEN, payload=Payload(form="hidden")), "reuses whole outputs"),
        (changed(EVEN, actions=(F, F, S, S, F, S, F)), "evenly spaced"),
        (changed(EVEN, payload=Payload(arc_length=(*range(11), 13.0))), "over arc length"),
    ],
)
def test_what_diffusers_cannot_do_is_refused(policy: Policy, reason: str) -> None:
    with pytest.raises(UsageFault, match=reason):
        export.diffusers(policy)
