"""What caches do on a GPU, in bf16, on a transformer of real size: time, waiting, memory.

The weights are random, so this says nothing about quality: it says whether work that is left out is
time that is saved, what an applied policy costs that never reuses, how often it makes the host wait
for the device, and whether its caches take what was planned. Needs CUDA.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.rows import Benchmark, Row, main
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from ditune.accel.apply import Summary, accelerate
from ditune.accel.memory import planned_bytes
from ditune.accel.tap import tapped
from ditune.cli.sources import quieten_libraries
from ditune.db.errors import UsageFault
from ditune.db.policy import Action, MaskCache, Payload, Policy, RuleCache
from ditune.profiler.redundancy import Redundancy
from ditune.profiler.statistics import paired_speedup
from ditune.profiler.timing import timed

_STEPS = 12
_DEVICE = torch.device("cuda")
_OVERHEAD, _AGREES = 1.01, 0.1
_NEVER = 1e-9  # an indicator's threshold at which every step is computed
# Wan 2.1 1.3B: 30 blocks of width 1536
_MODEL: Mapping[str, Any] = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_CALL: Mapping[str, Any] = {"height": 480, "width": 832, "num_frames": 9}


def masks() -> dict[str, Policy]:
    """Return masks of every granularity and form that leave about half of the work out."""
    half: tuple[Action, ...] = ("full", "full", *(("step", "full") * (_STEPS // 2 - 1)))
    cfg: tuple[Action, ...] = ("full", "full", *(("cfg", "full") * (_STEPS // 2 - 1)))
    block: tuple[Action, ...] = ("full", "full", *(("block", "full") * (_STEPS // 2 - 1)))
    return {
        "step, output in a line": Policy(cache=MaskCache(actions=half, payload=Payload(order=1))),
        "step, hidden, order 2": Policy(
            cache=MaskCache(actions=half, payload=Payload(form="hidden", order=2))
        ),
        "cfg": Policy(cache=MaskCache(actions=cfg)),
        "block, one in front": Policy(cache=MaskCache(actions=block, fn_blocks=1)),
    }


def computing_everything() -> dict[str, Policy]:
    """Return policies that never reuse."""
    rule = RuleCache(warmup_frac=0.0, cooldown_steps=0, threshold=_NEVER)
    full: list[Action] = ["full"] * _STEPS
    kinds = ("latent", "spectral", "timestep", "first_block")
    return {
        "mask": Policy(cache=MaskCache(actions=tuple(full))),
        "MixCache's rule": Policy(cache=RuleCache(warmup_frac=1.0)),
        **{
            f"{kind} indicator": Policy(cache=rule.model_copy(update={"indicator": kind}))
            for kind in kinds
        },
    }


@dataclass
class Bench:
    """One pipeline, and how it is called."""

    pipe: WanPipeline
    call: dict[str, Any]

    def generate(self) -> None:
        """Run one call; its latents are not decoded."""
        self.pipe(**self.call, generator=torch.Generator().manual_seed(1))

    def pairs(self, policy: Policy, count: int) -> tuple[list[float], list[float], Summary]:
        """Return milliseconds without and with a policy, in turn, and what it did."""
        plain, tuned = [], []
        with accelerate(self.pipe, policy):
            self.generate()  # allocates what is not allocated yet
        for _ in range(count):
            plain.append(timed(self.generate, _DEVICE)[1])
            with accelerate(self.pipe, policy) as applied:
                tuned.append(timed(self.generate, _DEVICE)[1])
                summary = applied.summary()
        return plain, tuned, summary

    def waits(self) -> int:
        """Return how often one call made the host wait for the device."""
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.generate()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(each.message) for each in caught)

    def peak_bytes(self) -> int:
        """Return the most memory that one call held at any time."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.generate()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def build(quick: bool) -> Bench:
    """Return the pipeline with random weights on the device."""
    torch.manual_seed(0)
    size = {**_MODEL, "num_layers": 4} if quick else _MODEL
    with torch.device(_DEVICE):
        model = WanTransformer3DModel(attention_head_dim=128, text_dim=4096, **size)
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=model,
    )
    pipe.set_progress_bar_config(disable=True)
    embeds = torch.randn(2, 512, 4096, dtype=torch.bfloat16, device=_DEVICE)
    call = {
        **_CALL,
        "prompt_embeds": embeds[:1],
        "negative_prompt_embeds": embeds[1:],
        "num_inference_steps": _STEPS,
        "guidance_scale": 5.0,
        "output_type": "latent",
    }
    return Bench(pipe, call)


def measure(benchmark: Benchmark, arguments: argparse.Namespace) -> None:
    """Measure eager first, then with compiled blocks."""
    if not torch.cuda.is_available():
        raise UsageFault("there is no CUDA device: this benchmark measures one")
    quieten_libraries()
    bench = build(arguments.quick)
    size = "x".join(str(value) for value in _CALL.values())
    benchmark.conditions["model"] = (
        f"Wan, {_MODEL['num_layers']} blocks of width 1536, random weights, bf16, {size}, "
        f"{_STEPS} steps with guidance, latents only"
    )
    pairs = 2 if arguments.quick else 4
    bench.generate()
    _add_memory(benchmark, bench)
    _add_waits(benchmark, bench)
    _add_speed(benchmark, "eager", bench, pairs)
    for name, policy in computing_everything().items():
        plain, tuned, _ = bench.pairs(policy, pairs)
        cost = paired_speedup(tuned, plain)
        held = cost.median <= _OVERHEAD
        figure = f"eager: {name} that computes everything"
        benchmark.add(Row(figure, cost.median, "x", f"<= {_OVERHEAD}", held, cost.ci95, cost.n))
    bench.pipe.transformer.compile_repeated_blocks(fullgraph=True)
    bench.generate()
    _add_speed(benchmark, "compiled blocks", bench, pairs)


def _add_speed(benchmark: Benchmark, kind: str, bench: Bench, pairs: int) -> None:
    for name, policy in masks().items():
        plain, tuned, summary = bench.pairs(policy, pairs)
        speed = paired_speedup(plain, tuned)
        figure = f"{kind}: {name}"
        benchmark.add(Row(f"{figure}, speedup", speed.median, "x", ci95=speed.ci95, n=speed.n))
        share = speed.median / summary.work_ratio
        target, held = f"within {_AGREES:.0%} of 1", abs(share - 1) <= _AGREES
        benchmark.add(Row(f"{figure}, speedup / work ratio", share, "", target, held, n=speed.n))


def _add_waits(benchmark: Benchmark, bench: Bench) -> None:
    plain = bench.waits()
    benchmark.add(Row("waits of the plain pipeline", plain, "a call"))
    allowed: list[tuple[str, Policy, int]] = [(n, p, 0) for n, p in masks().items()]
    allowed += [(n, p, _STEPS * (n != "mask")) for n, p in computing_everything().items()]
    for name, policy, most in allowed:
        with accelerate(bench.pipe, policy):
            more = bench.waits() - plain
        benchmark.add(Row(f"waits: {name}", more, "a call", f"<= {most}", more <= most))


def _add_memory(benchmark: Benchmark, bench: Bench) -> None:
    watched = Redundancy(bench.call["guidance_scale"])
    with tapped(bench.pipe, watched.watch):
        bench.generate()
    sizes = watched.forward_bytes()
    assert sizes is not None
    plain = bench.peak_bytes()
    benchmark.add(Row("peak memory of the plain pipeline", plain / 2**20, "MiB"))
    for name, policy in masks().items():
        assert policy.cache is not None
        planned = planned_bytes(policy.cache, sizes)
        with accelerate(bench.pipe, policy) as applied:
            more = bench.peak_bytes() - plain
            held = applied.summary().cache_bytes == planned
        benchmark.add(Row(f"caches: {name}, planned", planned / 2**20, "MiB", "as held", held))
        benchmark.add(Row(f"caches: {name}, peak above plain", more / 2**20, "MiB"))


if __name__ == "__main__":
    main("gpu_accel", measure, __doc__ or "")
