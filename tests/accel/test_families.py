"""Every transformer of diffusers that can carry a cache, in a tiny form with random weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tests.accel.families_first import FIRST, FIRST_LEFT_OUT, noise
from tests.accel.families_second import SECOND, SECOND_LEFT_OUT
from torch import Tensor, nn

from ditune.accel.apply import Summary, accelerate
from ditune.accel.internals import tensors_of
from ditune.accel.spans import BlockStack
from ditune.db.policy import Action, MaskCache, Payload, Policy, RuleCache

STEPS = 6
FAMILIES = FIRST | SECOND
INTERLEAVED = {"LatteTransformer3DModel"}  # its blocks cannot be left out, and the summary says so

pytestmark = [  # of diffusers' own code: Mochi on a CPU, and Chroma
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated"),
]

Inputs = dict[str, Any]


class Loop:
    """The denoising loop of a pipeline around one bare transformer, with two guidance branches."""

    def __init__(self, model: nn.Module, inputs: Callable[[int], Inputs]) -> None:
        self.transformer = model
        self.inputs = inputs
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.scheduler.set_timesteps(STEPS)
        self.do_classifier_free_guidance = True

    @torch.no_grad()
    def run(self, stop_at: int | None = None) -> list[list[Tensor]]:
        """Return the output tensors of every forward, in order."""
        outputs = []
        for step, branch in itertools.product(range(STEPS), ("cond", "uncond")):
            if stop_at == step:
                raise RuntimeError("stopped by the test")
            outputs.append(self._forward(step, branch))
        self.transformer._reset_stateful_cache()  # type: ignore[operator]
        return outputs

    def _forward(self, step: int, branch: str) -> list[Tensor]:
        model: Any = self.transformer
        sigma = float(self.scheduler.sigmas[step])
        with model.cache_context(branch, step_index=step, num_inference_steps=STEPS, sigma=sigma):
            output = model(**self.inputs(step), return_dict=False)
        return [tensor.clone() for tensor in tensors_of(output)]


def build(name: str) -> Loop:
    config, inputs = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**config).eval()
    with torch.no_grad():  # Kandinsky 5 begins with gates of zero, at which its blocks do nothing
        for key, parameter in model.named_parameters():
            if name.startswith("Kandinsky5") and "modulation" in key:
                parameter.copy_(0.2 * noise(*parameter.shape))
    return Loop(model, inputs)


@pytest.fixture(params=sorted(FAMILIES))
def loop(request: pytest.FixtureRequest) -> Loop:
    return build(request.param)


def masked(*actions: Action, **changes: Any) -> Policy:
    return Policy(cache=MaskCache(actions=actions, **changes))


def blocks_run(loop: Loop, policy: Policy) -> tuple[list[int], Summary, list[list[Tensor]]]:
    """Return how often each block of the chain ran under a policy."""
    blocks = BlockStack(loop.transformer).named_blocks()
    counts = dict.fromkeys(blocks, 0)

    def count(name: str) -> Callable[..., None]:
        def counted(*_: Any) -> None:
            counts[name] += 1

        return counted

    handles = [block.register_forward_hook(count(name)) for name, block in blocks.items()]
    with accelerate(loop, policy) as applied:
        outputs = loop.run()
        summary = applied.summary()
    for handle in handles:
        handle.remove()
    return list(counts.values()), summary, outputs


def same(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    return all(
        torch.equal(a, b)
        for left, right in zip(one, other, strict=True)
        for a, b in zip(left, right, strict=True)
    )


def test_every_cacheable_transformer_of_diffusers_is_in_the_table() -> None:
    cacheable = {
        name
        for name in dir(diffusers)
        if "Transformer" in name
        and isinstance(found := getattr(diffusers, name), type)
        and issubclass(found, diffusers.CacheMixin)
    }
    assert cacheable == FAMILIES.keys() | FIRST_LEFT_OUT.keys() | SECOND_LEFT_OUT.keys()


def test_all_full_and_removed_are_bit_identical(loop: Loop) -> None:
    plain = loop.run()
    full: list[Action] = ["full"] * STEPS
    counts, summary, outputs = blocks_run(loop, masked(*full))
    assert same(plain, outputs)
    assert set(counts) == {2 * STEPS}
    assert summary.steps == {"full": STEPS}
    assert same(plain, loop.run())


@pytest.mark.parametrize("form", ["output", "latent", "hidden"])
def test_step_masks_run_no_block_at_reused_steps(loop: Loop, form: str) -> None:
    plain = loop.run()
    payload = Payload(form=form)  # type: ignore[arg-type]
    actions: list[Action] = ["full", "full", "step", "full", "full", "step"]
    counts, summary, outputs = blocks_run(loop, masked(*actions, payload=payload))
    assert same(plain[:4], outputs[:4])  # recording changes nothing
    if form == "hidden" and type(loop.transformer).__name__ in INTERLEAVED:
        assert set(counts) == {2 * STEPS}
        assert "alternate" in summary.trips[0]
        return
    assert set(counts) == {8}
    assert summary.steps == {"full": 4, "step": 2}
    assert not same(plain, outputs)
    assert all(bool(t.isfinite().all()) for tensors in outputs for t in tensors)


def test_cfg_masks_run_one_branch(loop: Loop) -> None:
    counts, summary, _ = blocks_run(loop, masked("full", "full", "cfg", "full", "cfg", "cfg"))
    assert set(counts) == {2 * 3 + 3}
    assert summary.steps == {"full": 3, "cfg": 3}


def test_block_masks_run_the_outer_blocks(loop: Loop) -> None:
    plain = loop.run()
    policy = masked("full", "full", "block", "full", "full", "block", fn_blocks=1, bn_blocks=1)
    counts, summary, outputs = blocks_run(loop, policy)
    if type(loop.transformer).__name__ in INTERLEAVED:
        assert set(counts) == {2 * STEPS}
        assert "alternate" in summary.trips[0]
        return
    assert [12, *[8] * (len(counts) - 2), 12] == counts
    assert same(plain[:4], outputs[:4])
    assert not same(plain, outputs)


def test_the_front_blocks_decide_inside_the_forward(loop: Loop) -> None:
    plain = loop.run()
    rule = {"warmup_frac": 0.0, "cooldown_steps": 0, "indicator": "first_block"}
    never = Policy(cache=RuleCache(threshold=1e-9, **rule))  # type: ignore[arg-type]
    always = Policy(cache=RuleCache(threshold=99.0, allowed=("block",), **rule))  # type: ignore[arg-type]
    counts, summary, outputs = blocks_run(loop, always)
    if type(loop.transformer).__name__ in INTERLEAVED:
        assert set(counts) == {2 * STEPS}
        return
    assert [12, *[4] * (len(counts) - 1)] == counts
    assert summary.steps == {"full": 2, "block": 4}
    assert same(plain[:4], outputs[:4])
    assert not same(plain, outputs)
    assert same(plain, blocks_run(loop, never)[2])


def test_two_pipelines_at_once_and_a_stopped_call_leave_nothing(loop: Loop) -> None:
    other = Loop(copy.deepcopy(loop.transformer), loop.inputs)
    plain = other.run()
    with accelerate(loop, masked("full", "full", "step", "cfg", "block", "step")):
        clean = loop.run()
        assert same(plain, other.run())
        with pytest.raises(RuntimeError, match="stopped by the test"):
            loop.run(stop_at=3)
        assert same(clean, loop.run())
    assert same(plain, loop.run())
