"""Records made by hand: a study that found a policy, one that found none, and one full of traps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ditune.db.policy import Handoff, MaskCache, Policy, RuleCache
from ditune.db.records import (
    Clocks,
    Constraint,
    Evidence,
    Hardware,
    Interval,
    LayerTiming,
    PolicyFile,
    Profile,
    Quality,
    Settings,
    Software,
    StepRedundancy,
    Study,
    Trial,
    Workload,
)
from ditune.reports.content import FewerSteps, FrameStrip, ReportContent

Build = Callable[..., ReportContent]
DIGEST = "sha256:" + "ab" * 32
NOW = "2026-03-04T05:06:07Z"
STEPS = 50
BLOCKS = 40
CONSTRAINTS = (
    Constraint(metric="psnr", statistic="mean", floor=30.0),
    Constraint(metric="psnr", statistic="worst", floor=25.0),
    Constraint(metric="judge", statistic="mean", floor=-0.01),
)
HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "<b>bold</b><a href='javascript:alert(3)'>link</a>",
    "=cmd|'/C calc'!A0",
    "\x1b[31mred\x1b[0m\x07\x00",
    "safe\u202egnp.exe\u2066",
    "{{ 7 * 7 }}${alert(4)}%{y}",
    "<!--<script>",
    "lone \ud800 surrogate",
)


def workload(pipeline: str = "WanPipeline") -> Workload:
    """Return a text-to-video workload."""
    return Workload(
        pipeline_class=pipeline,
        transformer_class="WanTransformer3DModel",
        model_digest=DIGEST,
        model_revision="0fad780",
        dtype="bfloat16",
        height=480,
        width=832,
        frames=81,
        steps=STEPS,
        scheduler_class="UniPCMultistepScheduler",
        scheduler_shift=3.0,
        guidance=True,
        batch=1,
        attention_backend="native",
    )


def hardware(name: str = "NVIDIA H100 80GB HBM3") -> Hardware:
    """Return a GPU."""
    return Hardware(
        device_name=name,
        kind="cuda",
        capability="9.0",
        cores=132,
        memory_bytes=85_520_809_984,
        power_limit_w=700.0,
        driver="580.95",
        cuda_runtime="12.8",
    )


def profile(pipeline: str, device: str, layer: str = "transformer") -> Profile:
    """Return a profile whose change falls and rises again over the steps, as real ones do."""
    blocks = [
        LayerTiming(
            name=f"{layer}.blocks.{i}",
            median_ms=4.2 + 0.004 * i + 0.15 * (i % 7 == 3),
            p20_ms=4.1 + 0.004 * i,
            p80_ms=4.5 + 0.006 * i,
            n=100,
        )
        for i in range(BLOCKS)
    ]
    parts = [
        LayerTiming(name="text_encoder", median_ms=31.0, p20_ms=30.0, p80_ms=33.0, n=2),
        LayerTiming(name=layer, median_ms=176.0, p20_ms=174.0, p80_ms=179.0, n=100),
        LayerTiming(name="vae.decoder", median_ms=812.0, p20_ms=806.0, p80_ms=823.0, n=1),
    ]
    steps = [_change(step) for step in range(STEPS)]
    return Profile(
        hardware=hardware(device),
        software=software(),
        workload=workload(pipeline),
        prompts=4,
        total_ms=18_930.0,
        layers=tuple([*parts[:1], *blocks, *parts[1:]]),
        redundancy=tuple(steps),
        disagreement=None,
        peak_bytes=31_406_000_000,
        clocks=Clocks(sm_mhz_min=1740, sm_mhz_median=1905, sm_mhz_max=1980, throttle_reasons=()),
    )


def software() -> Software:
    """Return versions."""
    return Software(
        torch="2.13.0", triton="3.9.0", diffusers="0.42.1", transformers="5.23.0", ditune="0.1.0"
    )


def _change(step: int) -> StepRedundancy:
    at = step / (STEPS - 1)
    curve = 0.02 + 0.35 * np.exp(-8 * at) + 0.12 * np.exp(-14 * (1 - at))
    known = step > 0
    return StepRedundancy(
        step=step,
        sigma=float(3 * (1 - at) / (1 + 2 * (1 - at))),
        step_change=float(curve) if known else None,
        cfg_change=float(0.4 * curve + 0.01 * np.sin(step)) + 0.01 if known else None,
        block_change=float(1.3 * curve + 0.01) if known else None,
    )


def mask(full_every: int = 3) -> Policy:
    """Return a mask policy with all four actions: 50 steps, the first ten and the last full."""
    actions: list[Any] = []
    for step in range(STEPS):
        if step < 8 or step == STEPS - 1 or step % full_every == 0:
            actions.append("full")
        else:
            actions.append("cfg" if step % 10 == 4 else "block" if step % 13 == 5 else "step")
    return Policy(cache=MaskCache(actions=tuple(actions)))


def trials(count: int = 80) -> tuple[Trial, ...]:
    """Return a search: faster policies are worse, some are stopped early, the first is plain."""
    rng = np.random.default_rng(7)
    made = [_trial(0, Policy(), 1.0, 100.0, "baseline"), _trial(1, mask(), 1.91, 31.4, "prior")]
    for number in range(2, count):
        speedup = float(1 + 1.6 * rng.beta(2, 2.4))
        psnr = float(47 - 17 * (speedup - 1) + rng.normal(0, 1.6))
        policy = Policy(cache=RuleCache(delta2=round(0.01 + 0.005 * number, 4)))
        made.append(_trial(number, policy, speedup, psnr, "search"))
    return tuple(made)


def _trial(number: int, policy: Policy, speedup: float, psnr: float, source: Any) -> Trial:
    worst, judge = psnr - 3.5, -0.002
    rejected = psnr < 25
    missed = {
        "psnr": (30.0 - psnr) / 30.0,
        "psnr_worst": (25.0 - worst) / 25.0,
        "judge": -0.8,
    }
    return Trial(
        uuid=f"{number:032x}",
        study="study-0123456789abcdef",
        number=number,
        source=source,
        policy=policy,
        state="rejected" if rejected else "complete",
        speedup=speedup,
        work_ratio=speedup * 1.05,
        quality={
            "psnr": Quality(floor=30.0, mean=psnr, worst=worst, n=6),
            "psnr_worst": Quality(floor=25.0, mean=psnr, worst=worst, n=6),
            "judge": Quality(floor=-0.01, mean=judge, worst=-0.02, n=6),
        },
        violation=missed,
        reason=f"psnr {psnr:.1f} < 30 after 2 prompts" if rejected else None,
        duration_s=131.5,
        created_at=NOW,
    )


def policy_file(policy: Policy, study: Study) -> PolicyFile:
    """Return a policy that held every floor."""
    evidence = Evidence(
        speedup=Interval(median=1.87, ci95=(1.81, 1.93), n=48),
        baseline_ms=18_930.0,
        tuned_ms=10_123.0,
        quality={
            "psnr": Quality(floor=30.0, mean=31.12, worst=26.4, n=48),
            "psnr_worst": Quality(floor=25.0, mean=31.12, worst=26.4, n=48),
            "judge": Quality(floor=-0.01, mean=-0.0021, worst=-0.031, n=48),
        },
        bound_by="psnr",
        candidates=2,
        prompts_digest="sha256:" + "cd" * 32,
        study=study.name,
        git_commit="4f1c2ab7d09e3c5586f1b2a4c7d8e9f001122334",
        created_at=NOW,
        status="measured",
    )
    return PolicyFile(
        policy_id=policy.id,
        hardware=study.settings.hardware,
        software=study.settings.software,
        workload=study.settings.workload,
        policy=policy,
        evidence=evidence,
    )


def strips(prompts: tuple[str, ...], size: tuple[int, int, int] = (5, 24, 40)) -> tuple[Any, ...]:
    """Return moving gradients; the tuned ones are slightly off."""
    count, height, width = size
    n, y, x = np.mgrid[0:count, 0:height, 0:width]
    made = []
    for place, prompt in enumerate(prompts):
        centre = np.hypot(x - width * (0.2 + 0.12 * n), y - height / 2) < height * 0.3
        red = np.where(centre, 230, 40 + 3 * y) + 0 * n
        video = np.stack([red, 90 + 2 * x + 20 * place, 160 - 3 * y], axis=-1).clip(0, 255)
        off = (video + 6 * np.sin(x / 3.0)[..., None]).clip(0, 255)
        made.append(FrameStrip(prompt, video.astype(np.uint8), off.astype(np.uint8)))
    return tuple(made)


def build(
    *, found: bool = True, hostile: bool = False, policy: Policy | None = None
) -> ReportContent:
    """Return the content of a page."""
    name = HOSTILE[0] + HOSTILE[4] if hostile else "WanPipeline"
    device = HOSTILE[1] + HOSTILE[5] if hostile else "NVIDIA H100 80GB HBM3"
    asked = CONSTRAINTS if found else (CONSTRAINTS[0].model_copy(update={"floor": 60.0}),)
    settings = Settings(
        hardware=hardware(device),
        software=software(),
        workload=workload(name),
        constraints=asked,
        prompts_digest=DIGEST,
        seed=1234,
        space=DIGEST,
    )
    study = Study(name="study-0123456789abcdef", settings=settings, created_at=NOW)
    tried = trials()
    if not found:
        tried = tuple(_missing(t) for t in tried)
    if hostile:
        tried = tuple(_with(t, reason=HOSTILE[t.number % len(HOSTILE)]) for t in tried)
    prompts = HOSTILE if hostile else ("a red ball rolls over a green lawn", "a fox in the snow")
    fewer = FewerSteps(
        steps=32,
        speedup=Interval(median=1.55, ci95=(1.52, 1.58), n=48),
        quality={"psnr": Quality(floor=30.0, mean=22.4, worst=17.9, n=48)},
    )
    return ReportContent(
        study=study,
        profile=profile(name, device, HOSTILE[2] if hostile else "transformer"),
        trials=tried,
        chosen=policy_file(policy or mask(), study) if found else None,
        frames=strips(prompts) if found else (),
        fewer_steps=fewer if found else None,
    )


def _missing(trial: Trial) -> Trial:
    """Return the trial as it looks under a floor of 60 dB."""
    miss = {"psnr": (60.0 - trial.quality["psnr"].mean) / 60.0}
    return _with(trial, violation=miss)


def _with(trial: Trial, **changes: object) -> Trial:
    """Return a changed trial; lone surrogates are not valid text for pydantic, so none here."""
    if isinstance(reason := changes.get("reason"), str):
        changes["reason"] = reason.encode("utf-8", "replace").decode()
    return trial.model_copy(update=changes)


@pytest.fixture(name="build")
def build_fixture() -> Build:
    return build


@pytest.fixture
def content() -> ReportContent:
    return build()


@pytest.fixture
def handoff() -> Policy:
    """Return a policy with nothing but a hand-off."""
    return Policy(handoff=Handoff(sigma=0.6))
