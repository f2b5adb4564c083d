"""What users do with real pipelines while ditune is on: batches, sizes, offloading, compiling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from tests.conftest import tiny_vae, wan_pipeline, wan_transformer
from torch import nn

from ditune.accel.apply import accelerate
from ditune.db.errors import UsageFault
from ditune.db.policy import Action, MaskCache, Payload, Policy, RuleCache

STEPS = 12
ACTIONS: tuple[Action, ...] = ("full", "full", "step", "cfg", "block", "full") * 2
Generate = Any


def masked(actions: tuple[Action, ...] = ACTIONS, **changes: Any) -> Policy:
    return Policy(cache=MaskCache(actions=actions, **changes))


def test_blocks_that_all_run_are_a_full_step(pipe: WanPipeline, generate: Generate) -> None:
    plain = generate(pipe)
    policy = masked(("full", "full", "block", "block") * 3, fn_blocks=3, bn_blocks=1)
    with accelerate(pipe, policy):
        assert torch.equal(plain, generate(pipe))


def test_a_batch_gives_what_its_prompts_give_alone(pipe: WanPipeline, generate: Generate) -> None:
    embeds = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(5))
    noise = torch.randn(2, 16, 2, 4, 4, generator=torch.Generator().manual_seed(6))
    with accelerate(pipe, masked()) as applied:
        both = generate(
            pipe,
            prompt_embeds=embeds,
            negative_prompt_embeds=torch.zeros_like(embeds),
            latents=noise,
        )
        assert applied.summary().steps == {"full": 6, "step": 2, "cfg": 2, "block": 2}
        for place in range(2):
            alone = generate(
                pipe,
                prompt_embeds=embeds[place : place + 1],
                negative_prompt_embeds=torch.zeros_like(embeds[:1]),
                latents=noise[place : place + 1],
            )
            torch.testing.assert_close(both[place], alone[0], atol=1e-4, rtol=1e-4)


def test_several_videos_of_a_prompt(pipe: WanPipeline, generate: Generate) -> None:
    plain = generate(pipe, num_videos_per_prompt=3)
    with accelerate(pipe, masked()):
        tuned = generate(pipe, num_videos_per_prompt=3)
    assert len(tuned) == 3
    assert not torch.equal(plain, tuned)
    assert bool(tuned.isfinite().all())


def test_steps_and_sizes_may_change_from_call_to_call(
    pipe: WanPipeline, generate: Generate
) -> None:
    rule = Policy(cache=RuleCache(warmup_frac=0.1, indicator="latent", threshold=0.5))
    sizes = [{"steps": 12}, {"steps": 7, "height": 48}, {"steps": 12, "num_frames": 9}]
    with accelerate(pipe, rule) as applied:
        first = [generate(pipe, **size) for size in sizes]
        again = [generate(pipe, **size) for size in sizes]
        assert sum(applied.summary().steps.values()) == 12
        assert not applied.summary().trips
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_multistep_solvers_get_every_output(pipe: WanPipeline, generate: Generate) -> None:
    pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    with accelerate(pipe, masked()):
        assert bool(generate(pipe).isfinite().all())


def test_group_offloading_moves_what_runs(pipe: WanPipeline, generate: Generate) -> None:
    with accelerate(pipe, masked()):
        wanted = generate(pipe)
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    )
    with accelerate(pipe, masked()) as applied:
        assert torch.equal(wanted, generate(pipe))
        assert applied.summary().steps["block"] == 2


class Moved(ModelHook):  # type: ignore[misc]  # accelerate has no types
    """What model offloading puts around a transformer: it moves the whole of it in every call."""

    def __init__(self) -> None:
        self.reached: set[int] = set()

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.reached.add(sum(tensor.numel() for tensor in module.parameters()))
        return args, kwargs


@pytest.mark.parametrize("form", ["output", "hidden"])
def test_what_moves_a_model_reaches_blocks_that_are_left_out(
    pipe: WanPipeline, generate: Generate, form: Any
) -> None:
    hook, size = Moved(), sum(tensor.numel() for tensor in pipe.transformer.parameters())
    add_hook_to_module(pipe.transformer, hook)
    with accelerate(pipe, masked(payload=Payload(form=form, order=1))):
        generate(pipe)
    assert hook.reached == {size}


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_to_the_cpu(pipe: WanPipeline, generate: Generate, offload: str) -> None:
    with accelerate(pipe, masked()):
        wanted = generate(pipe)
    getattr(pipe, offload)()
    with accelerate(pipe, masked()) as applied:
        torch.testing.assert_close(generate(pipe).cpu(), wanted, atol=1e-3, rtol=1e-3)
        assert applied.summary().steps["block"] == 2


# --- two experts -------------------------------------------------------------------------------


def test_each_expert_has_caches_of_its_own(generate: Generate) -> None:
    """The second expert begins with two full steps, whatever the first one left."""
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=wan_transformer(),
        transformer_2=wan_transformer(seed=1),
        boundary_ratio=0.7,
    )
    pipe.set_progress_bar_config(disable=True)
    ran = {"first": 0, "second": 0}
    for name, model in zip(ran, (pipe.transformer, pipe.transformer_2), strict=True):

        def count(*_: Any, name: str = name) -> None:
            ran[name] += 1

        model.blocks[0].register_forward_hook(count)
    plain = generate(pipe)
    asked = dict(ran)
    ran.update(first=0, second=0)
    rule = RuleCache(warmup_frac=0.0, cooldown_steps=0, indicator="latent", threshold=99.0)
    steps_only = rule.model_copy(update={"allowed": ("step",), "interval_max": 8})
    with accelerate(pipe, Policy(cache=steps_only)):
        tuned = generate(pipe)
    assert asked["first"] + asked["second"] == 2 * STEPS
    assert min(asked.values()) >= 6
    assert ran == {"first": 4, "second": 4}  # two full steps of each, two branches
    assert not torch.equal(plain, tuned)


# --- image to video: more channels go in than come out -------------------------------------------


@pytest.mark.parametrize("form", ["latent", "hidden"])
def test_image_to_video(form: Any) -> None:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        **{**dict(wan_transformer().config), "in_channels": 36, "out_channels": 16}
    ).eval()
    pipe = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    call = {
        "image": Image.new("RGB", (32, 32), (200, 30, 30)),
        "prompt_embeds": torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(2)),
        "negative_prompt_embeds": torch.zeros(1, 6, 32),
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "num_inference_steps": STEPS,
        "output_type": "latent",
    }

    def generate() -> torch.Tensor:
        frames: torch.Tensor = pipe(**call, generator=torch.Generator().manual_seed(1)).frames
        return frames

    plain = generate()
    with accelerate(pipe, masked(payload=Payload(form=form, order=1))) as applied:
        tuned = generate()
        summary = applied.summary()
    assert summary.steps == {"full": 6, "step": 2, "cfg": 2, "block": 2}
    assert not summary.trips
    assert tuned.shape == plain.shape
    assert torch.nn.functional.mse_loss(tuned, plain) < 0.1 * plain.var()
    assert torch.equal(plain, generate())


# --- regional compilation ------------------------------------------------------------------------


class CountingBackend:
    """Compiles nothing and counts the graphs that it gets."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def dynamo() -> Iterator[Any]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("first", ["compile", "accelerate"])
@pytest.mark.parametrize(
    "policy",
    [
        masked(),
        masked(payload=Payload(form="hidden", order=2)),
        Policy(cache=RuleCache(warmup_frac=0.0)),
        Policy(cache=RuleCache(warmup_frac=0.0, indicator="first_block", threshold=0.5)),
    ],
    ids=["mask", "hidden", "rule", "first_block"],
)
def test_compiled_blocks_stay_one_graph_without_breaks(
    generate: Generate, dynamo: Any, policy: Policy, first: str
) -> None:
    pipe = wan_pipeline()
    with accelerate(pipe, policy):
        eager = generate(pipe)
    backend = CountingBackend()

    def compiled(model: nn.Module) -> None:
        model.compile_repeated_blocks(fullgraph=True, backend=backend)  # type: ignore[operator]

    if first == "compile":
        compiled(pipe.transformer)
    with accelerate(pipe, policy) as applied:
        if first == "accelerate":
            compiled(pipe.transformer)
        torch.testing.assert_close(generate(pipe), eager)
        torch.testing.assert_close(generate(pipe), eager)
        assert applied.summary().steps["full"] < STEPS
    assert backend.graphs == 1
    assert not dynamo["graph_break"]


class OverwritingBackend:
    """Returns the same memory from every run of a graph, as CUDA graphs do."""

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        kept: list[torch.Tensor] = []

        def run(*arguments: Any) -> Any:
            outputs = graph.forward(*arguments)
            for index, output in enumerate(outputs):
                if len(kept) <= index:
                    kept.append(torch.empty_like(output))
                kept[index].copy_(output)
            return tuple(each.detach() for each in kept)

        return run


@pytest.mark.parametrize(
    "policy",
    [
        masked(),
        masked(payload=Payload(form="hidden", order=2)),
        Policy(cache=RuleCache(warmup_frac=0.0, indicator="first_block", threshold=0.5)),
    ],
    ids=["mask", "hidden", "first_block"],
)
@pytest.mark.usefixtures("dynamo")
def test_compiled_blocks_may_overwrite_what_they_returned(
    generate: Generate, policy: Policy
) -> None:
    pipe = wan_pipeline()
    with accelerate(pipe, policy):
        eager = generate(pipe)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=OverwritingBackend())
    with accelerate(pipe, policy):
        for _ in range(2):
            torch.testing.assert_close(generate(pipe), eager)


@pytest.mark.parametrize("first", ["compile", "accelerate"])
@pytest.mark.parametrize("form", ["output", "hidden"])
@pytest.mark.usefixtures("dynamo")
def test_a_model_that_is_compiled_as_a_whole(
    generate: Generate, first: str, form: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It is compiled once, without ditune's own code in it, and still is after removal."""
    policy = masked(("full", "full", "step", "full") * 3, payload=Payload(form=form, order=1))
    pipe = wan_pipeline()
    plain = generate(pipe)
    with accelerate(pipe, policy):
        eager = generate(pipe)
    backend = CountingBackend()
    whole = {"backend": backend, "fullgraph": first == "compile"}
    if first == "compile":
        pipe.transformer.compile(**whole)
    with accelerate(pipe, policy) as applied:
        if first == "accelerate":
            pipe.transformer.compile(**whole)
        for _ in range(2):
            torch.testing.assert_close(generate(pipe), eager)
        assert applied.summary().steps == {"full": 9, "step": 3}
        assert ("run uncompiled" in caplog.text) == (form == "hidden")
    torch.testing.assert_close(generate(pipe), plain)
    assert pipe.transformer._compiled_call_impl is not None
    assert backend.graphs == 1


def test_a_transformer_that_was_replaced_by_its_compiled_self_is_refused(pipe: WanPipeline) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(UsageFault, match="compile_repeated_blocks"):
        accelerate(pipe, masked())
