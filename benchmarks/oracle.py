"""How far from the limit is ditune? Masks that are searched for each prompt, its answer known.

For every held-out prompt the best step mask of every number of computed steps is searched on the
very prompt and seed that it is scored on, from ditune's masks, every peer's, the profile's and
those of the prompt's own trajectory, with at least 400 videos a prompt. Forecasts run over the
steps' numbers, the profile's arc length or the prompt's own. The oracle then spends computed steps
where they help most: no policy that is fixed before the prompt is known can do that. Needs the
folder of `benchmarks.peers`; takes hours, and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from benchmarks.rows import Benchmark, Row, main
from torch import nn

from ditune.accel.anatomy import denoisers
from ditune.accel.apply import accelerate
from ditune.accel.spans import BlockStack
from ditune.accel.tap import tapped
from ditune.cli.sources import quieten_libraries
from ditune.db.comparison import Comparison
from ditune.db.errors import UsageFault
from ditune.db.policy import Action, ArcLength, MaskCache, Payload, Policy
from ditune.miniature.system import MiniatureSource
from ditune.profiler.trajectory import Trajectory, TrajectoryRecorder
from ditune.profiler.work import WorkCounter
from ditune.tuner.bench import Options, held_out_cases
from ditune.tuner.evaluate import Case, Evaluator
from ditune.tuner.peers import ours
from ditune.tuner.peers.catalogue import PEERS
from ditune.tuner.quality import parse_constraints
from ditune.tuner.schedule import StepSchedules, arc_length_of

_EVALUATIONS, _PROMPTS = 400, 20
_OUT = Path("bench-out")
_BUDGETS = range(6, 17)
_NEAR_DB = 4.0  # budgets whose best mask lies this near to a floor are searched
_TARGET = 0.85
_EARLY = (5.0, 1.0, 20.0)
_OTHER_AXIS = 0.2  # how often a change of a mask also changes what its forecasts run over
Steps = tuple[int, ...]  # the computed ones, in order
Axis = Literal["numbers", "profile", "own"]  # what forecasts run over


class Mask(NamedTuple):
    """What the oracle tries."""

    computed: Steps
    axis: Axis


@dataclass
class Frontier:
    """The best mask of every number of computed steps that was found for one prompt."""

    tried: dict[Mask, float] = field(default_factory=dict)

    def best(self) -> dict[int, tuple[float, Mask]]:
        """Return quality and mask by number of computed steps."""
        found: dict[int, tuple[float, Mask]] = {}
        for mask, psnr in self.tried.items():
            count = len(mask.computed)
            if count not in found or psnr > found[count][0]:
                found[count] = (psnr, mask)
        return found


class Oracle:
    """Searches the masks of one prompt; what it found is in a file of its own."""

    def __init__(
        self, source: MiniatureSource, case: Case, folder: Path, axes: Mapping[Axis, ArcLength]
    ) -> None:
        """Take up what the file holds."""
        self.case = case
        self.axes = axes
        self.steps = int(source.call["num_inference_steps"])
        self.frontier = Frontier()
        self._evaluator = Evaluator(source, parse_constraints("psnr>=0"))
        self._log = folder / f"{case.seed}.jsonl"
        for line in self._log.read_text().splitlines() if self._log.exists() else ():
            found = json.loads(line)
            mask = Mask(tuple(found["computed"]), found.get("axis", "numbers"))
            self.frontier.tried[mask] = found["psnr"]

    def search(self, starts: Iterable[Mask], floors: Sequence[float]) -> None:
        """Spend the evaluations of the prompt: the starts first, then changes of the best masks."""
        for mask in starts:
            self._try(mask)
        source = random.Random(self.case.seed)
        while len(self.frontier.tried) < _EVALUATIONS:
            best = self.frontier.best()
            near = [
                k for k, (psnr, _) in best.items() if min(abs(psnr - f) for f in floors) < _NEAR_DB
            ]
            self._try(self._changed(best, source.choice(near or list(best)), source))

    def _changed(
        self, best: dict[int, tuple[float, Mask]], count: int, source: random.Random
    ) -> Mask:
        """Return a neighbour: of the best mask of a count, or of one that computes a step more."""
        larger = best.get(count + 1)
        if larger is not None and source.random() < 0.3:
            steps, axis = larger[1]
            gone = source.choice(steps[1:])
            return Mask(tuple(step for step in steps if step != gone), axis)
        steps, axis = best[count][1]
        if source.random() < _OTHER_AXIS:
            axis = source.choice(get_args(Axis))
        return Mask(self._moved(steps, source), axis)

    def _moved(self, steps: Steps, source: random.Random) -> Steps:
        """Return steps of which one or two lie elsewhere, mostly near by."""
        computed = set(steps)
        for _ in range(1 if source.random() < 0.7 else 2):
            moved = source.choice(sorted(computed - {0}))
            free = [s for s in range(1, self.steps) if s not in computed]
            near = [s for s in free if abs(s - moved) <= 3]
            computed = (computed - {moved}) | {source.choice(near or free)}
        return tuple(sorted(computed))

    def _try(self, mask: Mask) -> None:
        if mask in self.frontier.tried or mask.computed[:1] != (0,):
            return
        tried = policy(mask.computed, self.steps, self.axes.get(mask.axis))
        psnr = self._evaluator.measure(tried, self.case, paired=False).values["psnr"]
        self.frontier.tried[mask] = psnr
        line = {"prompt": self.case.prompt, **mask._asdict(), "psnr": psnr}
        with self._log.open("a") as file:
            file.write(json.dumps(line) + "\n")


@dataclass(frozen=True)
class Job:
    """What a worker needs to search one prompt."""

    case: Case
    folder: Path
    arc_length: ArcLength  # of the profile
    planned: tuple[Steps, ...]
    floors: tuple[float, ...]
    comparison: Comparison | None


def searched(job: Job) -> dict[int, tuple[float, Mask]]:
    """Search one prompt; return quality and mask by number of computed steps."""
    quieten_libraries()
    source = MiniatureSource()
    own = _trajectories(source, job.case)
    axes: dict[Axis, ArcLength] = {"profile": job.arc_length, "own": _arc_length(own)}
    starts = [Mask(steps, "profile") for steps in job.planned]
    starts += [Mask(steps, "own") for steps in _planned(own, axes["own"])]
    if job.comparison is not None:
        found = _of_standings(source, job.comparison, job.folder, job.case)
        starts += [Mask(steps, axis) for steps in found for axis in get_args(Axis)]
    oracle = Oracle(source, job.case, _logs(job.folder), axes)
    oracle.search(starts, job.floors)
    print(f"{job.case.prompt}: {len(oracle.frontier.tried)} masks", flush=True)
    return oracle.frontier.best()


def _logs(folder: Path) -> Path:
    found = folder / "oracle"
    found.mkdir(parents=True, exist_ok=True)
    return found


def policy(computed: Steps, steps: int, arc_length: ArcLength | None = None) -> Policy:
    """Return the policy that computes some steps and continues the outputs in a line."""
    actions: list[Action] = ["full" if step in computed else "step" for step in range(steps)]
    payload = Payload(order=1, arc_length=arc_length)
    return Policy(cache=MaskCache(actions=tuple(actions), payload=payload))


def realised(pipe: Any, run: Callable[[], object], steps: int) -> Steps:
    """Return which steps a peer really computed: those at which the last layer of blocks ran."""
    blocks = list(BlockStack(denoisers(pipe)[0]).named_blocks().values())
    last = [module for module in blocks[-1].modules() if isinstance(module, nn.Linear)][-1]
    seen: set[int] = set()

    def note(*_: Any) -> None:
        index = pipe.scheduler.step_index
        seen.add(int(index) if index is not None else 0)

    handle = last.register_forward_hook(note)
    try:
        run()
    finally:
        handle.remove()
    return tuple(sorted(step for step in seen if step < steps))


def measure(benchmark: Benchmark, arguments: argparse.Namespace) -> None:
    """Search every prompt, then compare what the oracle computes with what ditune computes."""
    quieten_libraries()
    folder = _OUT / ("peers-quick" if arguments.quick else "peers")
    path = folder / "comparison.json"
    if not path.exists():
        raise UsageFault(f"there is no {path}: run python -m benchmarks.peers first")
    comparison = Comparison.model_validate_json(path.read_text())
    benchmark.conditions["evaluations"] = f"at least {_EVALUATIONS} a prompt"
    source = MiniatureSource()
    cases = held_out_cases(source, Options())[: 1 if arguments.quick else _PROMPTS]
    floors = tuple(lead.floors[0].floor for lead in comparison.leads)
    frontiers = search(source, cases, folder, floors, comparison)
    fixed, each = _work(source, cases[0])
    steps = int(source.call["num_inference_steps"])
    for lead in comparison.leads:
        mean, worst = lead.floors[0].floor, lead.floors[1].floor
        counts = allocated(frontiers, mean, worst)
        work = (fixed + steps * each) / (fixed + float(np.mean(counts)) * each)
        own = next(
            s for s in comparison.standings if s.peer == ours.NAME and s.floors == lead.floors
        )
        name = f"{mean:g} dB"
        benchmark.add(Row(f"{name}: oracle, computed steps", float(np.mean(counts)), "steps"))
        benchmark.add(Row(f"{name}: oracle, work ratio", work, "x", n=len(cases)))
        share = own.work_ratio.median / work
        held = share >= _TARGET
        benchmark.add(Row(f"{name}: ditune / oracle", share, "", f">= {_TARGET}", held))


def search(
    source: MiniatureSource,
    cases: Sequence[Case],
    folder: Path,
    floors: tuple[float, ...],
    comparison: Comparison | None = None,
) -> list[dict[int, tuple[float, Mask]]]:
    """Search all prompts, on as many cores as there are; a mask is evaluated on one thread."""
    trajectories = ours.profiled(source).trajectories
    arc = _arc_length(trajectories)
    planned = tuple(_planned(trajectories, arc))
    jobs = [Job(case, folder, arc, planned, floors, comparison) for case in cases]
    workers = min(len(os.sched_getaffinity(0)), len(jobs))
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(workers, torch.set_num_threads, (1,)) as pool:
        return pool.map(searched, jobs, chunksize=1)


def _trajectories(source: MiniatureSource, case: Case) -> tuple[Trajectory, ...]:
    """Return the plain trajectory of a case."""
    recorder = TrajectoryRecorder(float(source.call["guidance_scale"]))
    with tapped(source.pipe, recorder.watch):
        generator = torch.Generator().manual_seed(case.seed)
        source.pipe(prompt=case.prompt, generator=generator, **source.call)
    return recorder.trajectories()


def _planned(trajectories: Sequence[Trajectory], arc: ArcLength) -> list[Steps]:
    """Return the masks of some trajectories, for every budget and several weights of errors."""
    schedules = StepSchedules(trajectories, arc)
    return [tuple(schedules.computed(budget, early)) for budget in _BUDGETS for early in _EARLY]


def _arc_length(trajectories: Sequence[Trajectory]) -> ArcLength:
    found = arc_length_of(trajectories)
    assert found is not None, "outputs of the miniature never move at an even pace"
    return found


def _of_standings(
    source: MiniatureSource, comparison: Comparison, folder: Path, case: Case
) -> list[Steps]:
    """Return the masks of everything that stood in the comparison, as they come out here."""
    steps = int(source.call["num_inference_steps"])
    found: list[Steps] = []
    for standing in comparison.standings:
        if standing.setting is None or standing.peer == "fewer steps":
            continue  # fewer steps are other steps, not some of these
        if standing.peer == ours.NAME:
            setting = ours.setting_of(ours.policy_of(standing.setting, folder))
        else:
            settings = PEERS[standing.peer](source)
            setting = next(s for s in settings if s.label == standing.setting)
        with setting.on(source.pipe):

            def run() -> object:
                generator = torch.Generator().manual_seed(case.seed)
                return source.pipe(prompt=case.prompt, generator=generator, **source.call)

            found.append(realised(source.pipe, run, steps))
    return found


def _work(source: MiniatureSource, case: Case) -> tuple[float, float]:
    """Return the operations of a video beside its steps, and of one computed step."""

    steps = int(source.call["num_inference_steps"])

    def counted(computed: Steps) -> int:
        generator = torch.Generator().manual_seed(case.seed)
        counter = WorkCounter()
        with accelerate(source.pipe, policy(computed, steps)), counter:
            source.pipe(prompt=case.prompt, generator=generator, **source.call)
        return counter.flops

    few, more = (0, 1, 2), tuple(range(12))
    each = (counted(more) - counted(few)) / (len(more) - len(few))
    return counted(few) - len(few) * each, each


def allocated(
    frontiers: Sequence[dict[int, tuple[float, Mask]]], mean: float, worst: float
) -> list[int]:
    """Return the fewest computed steps for each prompt that hold a mean and a worst floor together.

    Greedy: from the least that holds the worst floor, the prompt that gains most per step goes on.
    """
    curves = []
    for best in frontiers:
        curve: dict[int, float] = {}
        for count in sorted(best):  # more computed steps are never worse
            curve[count] = max(best[count][0], max(curve.values(), default=0.0))
        curves.append(curve)
    counts = [min((k for k, p in c.items() if p >= worst), default=max(c)) for c in curves]
    while np.mean([c[k] for c, k in zip(curves, counts, strict=True)]) < mean:
        gains = [
            (max((c[more] - c[k]) / (more - k) for more in c if more > k), place)
            for place, (c, k) in enumerate(zip(curves, counts, strict=True))
            if any(more > k for more in c)
        ]
        if not gains:
            break
        _, place = max(gains)
        curve, now = curves[place], counts[place]
        counts[place] = max(
            (more for more in curve if more > now),
            key=lambda more: (curve[more] - curve[now]) / (more - now),
        )
    return counts


if __name__ == "__main__":
    main("oracle", measure, __doc__ or "")
