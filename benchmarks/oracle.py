"""How far from the limit is ditune? Masks that are searched for each prompt, its answer known.

For every held-out prompt the best step mask of every number of computed steps is searched on the
very prompt and seed that it is scored on, from ditune's masks, every peer's and the profile's, with
at least 300 videos a prompt. The oracle then spends computed steps where they help most: no policy
that is fixed before the prompt is known can do that. Needs the folder of `benchmarks.peers`; takes
hours, and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.rows import Benchmark, Row, main
from torch import nn

from ditune.accel.anatomy import denoisers
from ditune.accel.apply import accelerate
from ditune.accel.spans import BlockStack
from ditune.cli.sources import quieten_libraries
from ditune.db.comparison import Comparison
from ditune.db.errors import UsageFault
from ditune.db.policy import Action, MaskCache, Payload, Policy
from ditune.miniature.system import MiniatureSource
from ditune.profiler.record import record
from ditune.profiler.work import WorkCounter
from ditune.tuner.bench import Options, held_out_cases
from ditune.tuner.evaluate import Case, Evaluator
from ditune.tuner.peers import ours
from ditune.tuner.peers.catalogue import PEERS
from ditune.tuner.quality import parse_constraints
from ditune.tuner.schedule import StepSchedules

_EVALUATIONS, _PROMPTS = 300, 20
_OUT = Path("bench-out")
_NEAR_DB = 4.0  # budgets whose best mask lies this near to a floor are searched
_TARGET = 0.85
Mask = tuple[int, ...]  # the computed steps, in order


@dataclass
class Frontier:
    """The best mask of every number of computed steps that was found for one prompt."""

    tried: dict[Mask, float] = field(default_factory=dict)

    def best(self) -> dict[int, tuple[float, Mask]]:
        """Return quality and mask by number of computed steps."""
        found: dict[int, tuple[float, Mask]] = {}
        for mask, psnr in self.tried.items():
            if psnr > found.get(len(mask), (-1.0, ()))[0]:
                found[len(mask)] = (psnr, mask)
        return found


class Oracle:
    """Searches the masks of one prompt; what it found is in a file of its own."""

    def __init__(self, source: MiniatureSource, case: Case, folder: Path) -> None:
        """Take up what the file holds."""
        self.case = case
        self.steps = int(source.call["num_inference_steps"])
        self.frontier = Frontier()
        self._evaluator = Evaluator(source, parse_constraints("psnr>=0"))
        self._log = folder / f"{case.seed}.jsonl"
        for line in self._log.read_text().splitlines() if self._log.exists() else ():
            found = json.loads(line)
            self.frontier.tried[tuple(found["computed"])] = found["psnr"]

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
            gone = source.choice(larger[1][1:])
            return tuple(step for step in larger[1] if step != gone)
        computed = set(best[count][1])
        for _ in range(1 if source.random() < 0.7 else 2):
            moved = source.choice(sorted(computed - {0}))
            free = [s for s in range(1, self.steps) if s not in computed]
            near = [s for s in free if abs(s - moved) <= 3]
            computed = (computed - {moved}) | {source.choice(near or free)}
        return tuple(sorted(computed))

    def _try(self, mask: Mask) -> None:
        if mask in self.frontier.tried or not mask or mask[0] != 0:
            return
        outcome = self._evaluator.measure(policy(mask, self.steps), self.case, paired=False)
        psnr = outcome.values["psnr"]
        self.frontier.tried[mask] = psnr
        line = {"prompt": self.case.prompt, "computed": mask, "psnr": psnr}
        with self._log.open("a") as file:
            file.write(json.dumps(line) + "\n")


@dataclass(frozen=True)
class Job:
    """What a worker needs to search one prompt."""

    case: Case
    folder: Path
    planned: tuple[Mask, ...]
    floors: tuple[float, ...]
    comparison: Comparison | None


def searched(job: Job) -> dict[int, tuple[float, Mask]]:
    """Search one prompt; return quality and mask by number of computed steps."""
    quieten_libraries()
    source = MiniatureSource()
    starts = list(job.planned)
    if job.comparison is not None:
        starts += _of_standings(source, job.comparison, job.folder, job.case)
    oracle = Oracle(source, job.case, _logs(job.folder))
    oracle.search(starts, job.floors)
    print(f"{job.case.prompt}: {len(oracle.frontier.tried)} masks", flush=True)
    return oracle.frontier.best()


def _logs(folder: Path) -> Path:
    found = folder / "oracle"
    found.mkdir(parents=True, exist_ok=True)
    return found


def policy(computed: Mask, steps: int) -> Policy:
    """Return the policy that computes some steps and continues the outputs in a line."""
    actions: list[Action] = ["full" if step in computed else "step" for step in range(steps)]
    return Policy(cache=MaskCache(actions=tuple(actions), payload=Payload(order=1)))


def realised(pipe: Any, run: Callable[[], object], steps: int) -> Mask:
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
    planned = tuple(_planned(source))
    jobs = [Job(case, folder, planned, floors, comparison) for case in cases]
    workers = min(len(os.sched_getaffinity(0)), len(jobs))
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(workers, torch.set_num_threads, (1,)) as pool:
        return pool.map(searched, jobs, chunksize=1)


def _planned(source: MiniatureSource) -> list[Mask]:
    """Return the masks of the profile, for every budget and several tilts."""
    recorded = record(source.pipe, source.calibration[:2], call=source.call, seed=1_000)
    schedules = StepSchedules(recorded.trajectories)
    return [
        tuple(schedules.computed(budget, tilt))
        for budget in range(6, 20)
        for tilt in (-2.0, -1.0, 0.0)
    ]


def _of_standings(
    source: MiniatureSource, comparison: Comparison, folder: Path, case: Case
) -> list[Mask]:
    """Return the masks of everything that stood in the comparison, as they come out here."""
    steps = int(source.call["num_inference_steps"])
    found: list[Mask] = []
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

    def counted(computed: Mask) -> int:
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
