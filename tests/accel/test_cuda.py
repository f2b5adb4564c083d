"""What only a device shows: waiting, graphs, offloading on a stream, memory, reduced precision."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from tests.conftest import STEPS

from ditune.accel.apply import accelerate
from ditune.db.policy import Action, MaskCache, Payload, Policy, RuleCache

pytestmark = pytest.mark.gpu

ACTIONS: tuple[Action, ...] = ("full", "full", "step", "cfg", "block", "full") * 2
MASK = Policy(cache=MaskCache(actions=ACTIONS, payload=Payload(order=1)))
HIDDEN = Policy(cache=MaskCache(actions=ACTIONS, payload=Payload(form="hidden", order=2)))
RULES = {
    kind: Policy(cache=RuleCache(warmup_frac=0.1, indicator=kind, threshold=0.5))
    for kind in ("latent", "spectral", "timestep", "first_block")
}
Generate = Any


@pytest.fixture
def on_device(pipe: WanPipeline) -> WanPipeline:
    return pipe.to("cuda")


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def waits(pipe: WanPipeline, generate: Generate) -> int:
    """Return how often one generation made the host wait for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            generate(pipe)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in caught)


def test_masks_never_wait_for_the_device(on_device: WanPipeline, generate: Generate) -> None:
    plain = waits(on_device, generate)
    for policy in (MASK, HIDDEN):
        with accelerate(on_device, policy):
            generate(on_device)
            assert waits(on_device, generate) <= plain


@pytest.mark.parametrize("kind", ["", *RULES])
def test_rules_wait_at_most_once_a_step(
    on_device: WanPipeline, generate: Generate, kind: str
) -> None:
    policy = RULES.get(kind) or Policy(cache=RuleCache(warmup_frac=0.1))
    plain = waits(on_device, generate)
    with accelerate(on_device, policy):
        generate(on_device)
        assert plain < waits(on_device, generate) <= plain + STEPS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computing_every_step_changes_no_bit(
    on_device: WanPipeline, generate: Generate, dtype: torch.dtype
) -> None:
    on_device.to(dtype)
    plain = generate(on_device)
    everything: list[Action] = ["full"] * STEPS
    with accelerate(on_device, Policy(cache=MaskCache(actions=tuple(everything)))):
        assert torch.equal(plain, generate(on_device))
    with accelerate(on_device, HIDDEN):
        tuned = generate(on_device)
    assert tuned.dtype == plain.dtype
    assert bool(tuned.isfinite().all())
    assert torch.equal(plain, generate(on_device))


def test_caches_leave_the_device_when_a_call_ends(
    on_device: WanPipeline, generate: Generate
) -> None:
    with accelerate(on_device, HIDDEN) as applied:
        generate(on_device)
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            generate(on_device)
        assert torch.cuda.memory_allocated() <= before
        assert applied.summary().cache_bytes > 0


def test_offloading_blocks_on_a_stream(on_device: WanPipeline, generate: Generate) -> None:
    plain = generate(on_device)
    with accelerate(on_device, MASK):
        wanted = generate(on_device)
    on_device.transformer.to("cpu")
    on_device.transformer.enable_group_offload(
        onload_device=torch.device("cuda"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=True,
    )
    for _ in range(2):  # the first call learns the order of the groups
        torch.testing.assert_close(generate(on_device), plain)
    with accelerate(on_device, MASK) as applied:
        for _ in range(2):
            torch.testing.assert_close(generate(on_device), wanted)
        assert applied.summary().steps["block"] == 2


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("policy", [MASK, HIDDEN, RULES["first_block"]])
def test_blocks_in_cuda_graphs(on_device: WanPipeline, generate: Generate, policy: Policy) -> None:
    """Graphs overwrite their outputs at the next replay: what is cached has to be safe from it.

    Blocks hand each other the memory of their graphs. PyTorch lets them only where each forward of
    the model is marked as a step; without the mark the plain pipeline fails too.
    """
    plain = generate(on_device)
    with accelerate(on_device, policy):
        wanted = generate(on_device)
    mark: Callable[[], None] = torch.compiler.cudagraph_mark_step_begin
    on_device.transformer.register_forward_pre_hook(lambda *_: mark())
    on_device.transformer.compile_repeated_blocks(fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        torch.testing.assert_close(generate(on_device), plain, atol=1e-3, rtol=1e-3)
    with accelerate(on_device, policy):
        for _ in range(3):
            torch.testing.assert_close(generate(on_device), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
def test_a_whole_model_in_cuda_graphs(on_device: WanPipeline, generate: Generate) -> None:
    """Here the cached output itself is memory of the graph."""
    steps_only = Policy(
        cache=MaskCache(actions=("full", "full", "step", "full") * 3, payload=Payload(order=1))
    )
    with accelerate(on_device, steps_only):
        wanted = generate(on_device)
    on_device.transformer.compile(mode="reduce-overhead")
    with accelerate(on_device, steps_only):
        for _ in range(3):
            torch.testing.assert_close(generate(on_device), wanted, atol=1e-3, rtol=1e-3)
