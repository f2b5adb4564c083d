"""Record a profile: what a pipeline costs, layer by layer, and where its steps repeat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ditune.accel import fingerprint
from ditune.accel.anatomy import denoisers
from ditune.accel.request import Request, observed
from ditune.accel.request import arguments as asked
from ditune.accel.tap import Observation, tapped
from ditune.db.errors import UsageFault
from ditune.db.records import Profile
from ditune.profiler.redundancy import Redundancy
from ditune.profiler.statistics import quantiles
from ditune.profiler.timing import LayerClock, layers_of, timed
from ditune.profiler.trajectory import Trajectory, TrajectoryRecorder

_WARMUP_STEPS = 2  # they touch every part once


@dataclass(frozen=True)
class Recorded:
    """A profile, the plain trajectories that masks are made from, and what the pipeline returned.

    There is one output for each prompt, in order: a search compares with them. `videos` is how many
    plain ones' worth of compute it took; a forward of the small model counts as one.
    """

    profile: Profile
    trajectories: tuple[Trajectory, ...]
    outputs: tuple[Any, ...] = ()
    videos: float = 0.0


def profile(
    pipe: Any,
    prompts: Sequence[str],
    *,
    call: Mapping[str, Any] | None = None,
    small: Any = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Profile:
    """Run a pipeline on some prompts and return its profile; see `record`."""
    return record(pipe, prompts, call=call, small=small, seed=seed, progress=progress).profile


def record(
    pipe: Any,
    prompts: Sequence[str],
    *,
    call: Mapping[str, Any] | None = None,
    small: Any = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Recorded:
    """Run a pipeline on some prompts and return its profile and trajectories.

    After a short warm-up three passes, so that no instrument disturbs another: layers with clocks
    on them (first prompt only), whole calls timed bare, and redundancy with every forward watched.

    Args:
        pipe: A diffusers pipeline without ditune on.
        prompts: One or more prompts; redundancy is averaged over them.
        call: The arguments of the pipeline besides the prompt.
        small: The small model of the family, or its pipeline: adds the hand-off disagreement.
        seed: Of the first prompt's noise; each further prompt takes the next.
        progress: Called with a few words before each call of the pipeline.

    Raises:
        UsageFault: There are no prompts.
    """
    if not prompts:
        raise UsageFault("profiling needs at least one prompt and got none: add one to the file")
    arguments = dict(call or {})
    device = next(denoisers(pipe)[0].parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def run(index: int, **changes: Any) -> Any:
        generator = torch.Generator().manual_seed(seed + index)
        return pipe(prompt=prompts[index], generator=generator, **{**arguments, **changes})

    progress("warming up")
    run(0, **_short(arguments))
    progress("timing layers")
    with LayerClock(device).attached(layers_of(pipe)) as clock:
        run(0)
    lasted, outputs = [], []
    for index in range(len(prompts)):
        progress(f"timing prompt {index + 1} of {len(prompts)}")
        output, milliseconds = timed(lambda i=index: run(i), device)  # type: ignore[misc]
        outputs.append(output)
        lasted.append(milliseconds)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    watched = _Watched(pipe, float(asked(pipe, arguments).get("guidance_scale") or 1.0))
    with tapped(pipe, watched.watch, small):
        for index in range(len(prompts)):
            progress(f"watching prompt {index + 1} of {len(prompts)}")
            run(index)
    assert watched.request is not None, "no forward of the denoiser was seen"
    found = Profile(
        hardware=fingerprint.hardware(device),
        software=fingerprint.software(),
        workload=fingerprint.workload(pipe, watched.request, small),
        prompts=len(prompts),
        total_ms=quantiles(lasted)[1],
        layers=clock.timings(),
        redundancy=watched.redundancy.steps(),
        disagreement=watched.redundancy.disagreement(),
        peak_bytes=peak,
        clocks=None,
        forward_bytes=watched.redundancy.forward_bytes(),
    )
    warmup = _WARMUP_STEPS / found.workload.steps if _short(arguments) else 1.0
    passes = 3 if small is not None else 2  # timed and watched, and the small model beside it
    videos = warmup + 1.0 + passes * len(prompts)
    return Recorded(found, watched.trajectories.trajectories(), tuple(outputs), videos)


def _short(arguments: Mapping[str, Any]) -> dict[str, int]:
    """Return what makes a call short enough to warm up with; nothing where its steps are listed."""
    listed = arguments.get("sigmas") is not None or arguments.get("timesteps") is not None
    return {} if listed else {"num_inference_steps": _WARMUP_STEPS}


class _Watched:
    """What is taken from every forward that a tap sees."""

    def __init__(self, pipe: Any, guidance_scale: float) -> None:
        self.redundancy = Redundancy(guidance_scale)
        self.trajectories = TrajectoryRecorder(guidance_scale)
        self.request: Request | None = None
        self._pipe = pipe

    def watch(self, seen: Observation) -> None:
        """Take one forward; what is asked for can only be seen while the call runs."""
        if self.request is None:
            steps = seen.steps or len(self._pipe.scheduler.timesteps)
            self.request = observed(self._pipe, seen.latents, steps)
        self.redundancy.watch(seen)
        self.trajectories.watch(seen)
