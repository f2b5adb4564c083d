"""How far from the limit is ditune? Masks that are searched for each prompt, its answer known.

For every held-out prompt the best step mask of every number of computed steps is searched on the
very prompt and seed that it is scored on, from ditune's masks, every peer's, the profile's and
those of the prompt's own trajectory, with at least 350 videos a prompt. Forecasts run over the
steps' numbers, the profile's arc length or the prompt's own. The oracle then spends computed steps
where they help most: no policy that is fixed before the prompt is known can do that. Needs the
folder of `benchmarks.peers`; takes hours on a CPU, minutes on a GPU, and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from benchmarks.masked import Attempt, MaskedVideos
from benchmarks.resumed import require_same
from benchmarks.rows import Benchmark, Row, main
from torch import nn

from ditune.accel.anatomy import denoisers
from ditune.accel.apply import accelerate
from ditune.accel.payload import positions
from ditune.accel.spans import BlockStack
from ditune.cli.sources import quieten_libraries
from ditune.db.comparison import Comparison, Standing
from ditune.db.errors import UsageFault
from ditune.db.files import write_atomically
from ditune.db.policy import Action, ArcLength, MaskCache, Payload, Policy
from ditune.miniature.system import MiniatureSource
from ditune.profiler.trajectory import Trajectory
from ditune.profiler.work import WorkCounter
from ditune.tuner.bench import Options, held_out_cases
from ditune.tuner.evaluate import Case, Evaluator
from ditune.tuner.peers import ours
from ditune.tuner.peers.catalogue import PEERS
from ditune.tuner.peers.contract import Setting
from ditune.tuner.quality import parse_constraints
from ditune.tuner.schedule import StepSchedules, arc_length_of

_EVALUATIONS, _PROMPTS = 350, 20
_OUT = Path("bench-out")
_BUDGETS = range(4, 17)
_NEAR_DB = 4.0  # budgets whose best mask lies this near to a floor are searched
_TARGET = 0.85
_OFF_DB = 0.05  # between a video made here and the pipeline's
_ROUND = 20  # masks of each prompt whose videos are made together
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

    def __init__(self, case: Case, folder: Path, axes: Mapping[Axis, ArcLength | None]) -> None:
        """Take up what the file holds."""
        self.case = case
        self.frontier = Frontier()
        steps = next(len(arc) for arc in axes.values() if arc is not None)
        self._positions = {axis: tuple(positions(arc, steps)) for axis, arc in axes.items()}
        self._steps = steps
        self._source = random.Random(case.seed)
        self._log = folder / f"{case.seed}.jsonl"
        for line in self._log.read_text().splitlines() if self._log.exists() else ():
            found = json.loads(line)
            mask = Mask(tuple(found["computed"]), found["axis"])
            self.frontier.tried[mask] = found["psnr"]

    def fresh(self, starts: Iterable[Mask]) -> list[Mask]:
        """Return what was not tried yet, once each; the first step is always computed."""
        known = self.frontier.tried
        return [m for m in dict.fromkeys(starts) if m not in known and m.computed[:1] == (0,)]

    def changed(self, count: int, floors: Sequence[float]) -> list[Mask]:
        """Return new changes of the best masks near the floors."""
        best = self.frontier.best()
        near = [k for k, (psnr, _) in best.items() if min(abs(psnr - f) for f in floors) < _NEAR_DB]
        found: dict[Mask, None] = {}
        while len(found) < count:
            mask = self._neighbour(best, self._source.choice(near or list(best)))
            found |= dict.fromkeys(self.fresh([mask]))
        return list(found)

    def attempt(self, case: int, mask: Mask) -> Attempt:
        """Return a mask of this prompt as a video to make."""
        return Attempt(case, mask.computed, self._positions[mask.axis])

    def keep(self, mask: Mask, psnr: float) -> None:
        """Remember what a mask gave."""
        self.frontier.tried[mask] = psnr
        line = {"prompt": self.case.prompt, **mask._asdict(), "psnr": psnr}
        with self._log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _neighbour(self, best: dict[int, tuple[float, Mask]], count: int) -> Mask:
        """Return a neighbour: of the best mask of a count, or of one that computes a step more."""
        source = self._source
        larger = best.get(count + 1)
        if larger is not None and source.random() < 0.3:
            steps, axis = larger[1]
            gone = source.choice(steps[1:])
            return Mask(tuple(step for step in steps if step != gone), axis)
        steps, axis = best[count][1]
        if source.random() < _OTHER_AXIS:
            axis = source.choice(get_args(Axis))
        return Mask(self._moved(steps), axis)

    def _moved(self, steps: Steps) -> Steps:
        """Return steps of which one or two lie elsewhere, mostly near by."""
        source = self._source
        computed = set(steps)
        for _ in range(1 if source.random() < 0.7 else 2):
            moved = source.choice(sorted(computed - {0}))
            free = [s for s in range(1, self._steps) if s not in computed]
            near = [s for s in free if abs(s - moved) <= 3]
            computed = (computed - {moved}) | {source.choice(near or free)}
        return tuple(sorted(computed))


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


def options(parser: argparse.ArgumentParser) -> None:
    """Add what this benchmark alone has."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of the search")
    parser.add_argument(
        "--stop-before-search", action="store_true", help="only note what the peers compute"
    )


def measure(benchmark: Benchmark, arguments: argparse.Namespace) -> None:
    """Search every prompt, then compare what the oracle computes with what ditune computes."""
    quieten_libraries()
    folder = _OUT / ("peers-quick" if arguments.quick else "peers")
    path = folder / "comparison.json"
    if not path.exists():
        raise UsageFault(f"there is no {path}: run python -m benchmarks.peers first")
    comparison = Comparison.model_validate_json(path.read_text())
    source = MiniatureSource()
    cases = held_out_cases(source, Options())[: 1 if arguments.quick else _PROMPTS]
    logs = folder / "oracle"
    logs.mkdir(exist_ok=True)
    require_same(logs, {})
    standing = Realised(source, comparison, logs / "realised.json")
    rivals = [standing.masks(case) for case in cases]
    if arguments.stop_before_search:
        return
    floors = tuple(lead.floors[0].floor for lead in comparison.leads)
    trajectories = ours.profiled(source).trajectories
    fixed, each = _work(source, cases[0])
    known = Mask(_planned(trajectories, None)[-1], "numbers")
    by_pipeline = _psnr(source, cases[0], known.computed)
    videos = MaskedVideos(source, cases, arguments.device)
    oracles = search(videos, logs, trajectories, rivals, floors)
    benchmark.conditions["device of the search"] = arguments.device
    fewest = min(len(oracle.frontier.tried) for oracle in oracles)
    benchmark.conditions["evaluations"] = f"{fewest} or more a prompt"
    off = abs(videos.psnr([oracles[0].attempt(0, known)])[0] - by_pipeline)
    benchmark.add(Row("PSNR, off the pipeline's", off, "dB", f"<= {_OFF_DB}", off <= _OFF_DB))
    frontiers = [oracle.frontier.best() for oracle in oracles]
    for lead in comparison.leads:
        own = next(
            s for s in comparison.standings if s.peer == ours.NAME and s.floors == lead.floors
        )
        counts = allocated(frontiers, lead.floors[0].floor, lead.floors[1].floor)
        work = (fixed + videos.steps * each) / (fixed + float(np.mean(counts)) * each)
        name = f"{lead.floors[0].floor:g} dB"
        benchmark.add(Row(f"{name}: oracle, computed steps", float(np.mean(counts)), "steps"))
        benchmark.add(Row(f"{name}: oracle, work ratio", work, "x", n=len(cases)))
        share = own.work_ratio.median / work
        held = share >= _TARGET
        benchmark.add(Row(f"{name}: ditune / oracle", share, "", f">= {_TARGET}", held))


def search(
    videos: MaskedVideos,
    logs: Path,
    profile: Sequence[Trajectory],
    rivals: Sequence[Sequence[Steps]],
    floors: Sequence[float],
) -> list[Oracle]:
    """Search all prompts side by side: what is planned and rivals compute, then changes of it."""
    arc = _arc_length(profile)
    planned = [Mask(steps, "profile") for steps in _planned(profile, arc)]
    oracles, first = [], []
    for index, case in enumerate(videos.cases):
        own = [videos.trajectory(index)]
        axes: dict[Axis, ArcLength | None]
        axes = {"numbers": None, "profile": arc, "own": _arc_length(own)}
        oracles.append(Oracle(case, logs, axes))
        starts = [*planned, *(Mask(steps, "own") for steps in _planned(own, axes["own"]))]
        starts += [Mask(steps, axis) for steps in rivals[index] for axis in get_args(Axis)]
        first.append(oracles[-1].fresh(starts))
    for place in range(0, max(map(len, first)), _ROUND):
        _evaluate(videos, oracles, [masks[place : place + _ROUND] for masks in first])
    while left := [max(0, _EVALUATIONS - len(oracle.frontier.tried)) for oracle in oracles]:
        if not any(left):
            break
        rounds = [
            oracle.changed(min(_ROUND, more), floors)
            for oracle, more in zip(oracles, left, strict=True)
        ]
        _evaluate(videos, oracles, rounds)
    return oracles


def _evaluate(
    videos: MaskedVideos, oracles: Sequence[Oracle], masks: Sequence[Sequence[Mask]]
) -> None:
    """Make the videos of some masks of each prompt, and keep what they give."""
    asked = [(index, mask) for index, each in enumerate(masks) for mask in each]
    if not asked:
        return
    found = videos.psnr([oracles[index].attempt(index, mask) for index, mask in asked])
    for (index, mask), psnr in zip(asked, found, strict=True):
        oracles[index].keep(mask, psnr)
    print(f"masks of each prompt: {min(len(o.frontier.tried) for o in oracles)}", flush=True)


class Realised:
    """Which steps everything that stood in the comparison computes on a prompt, kept in a file."""

    def __init__(self, source: MiniatureSource, comparison: Comparison, path: Path) -> None:
        """Take up what the file holds."""
        self._source = source
        self._standings = {
            (standing.peer, standing.setting): standing
            for standing in comparison.standings
            if standing.setting and standing.peer != "fewer steps"  # those are other steps
        }
        self._path = path
        self._known: dict[str, list[int]] = json.loads(path.read_text()) if path.exists() else {}

    def masks(self, case: Case) -> list[Steps]:
        """Return the computed steps of every standing on one case."""
        found = dict.fromkeys(self._one(case, s) for s in self._standings.values())
        return list(found)

    def _one(self, case: Case, standing: Standing) -> Steps:
        key = f"{case.seed}: {standing.peer}, {standing.setting}"
        if key not in self._known:
            if standing.policy is not None:
                setting = ours.setting_of(standing.policy)
            else:
                settings = PEERS[standing.peer](self._source)
                setting = next(s for s in settings if s.label == standing.setting)
            self._known[key] = list(self._run(case, setting))
            write_atomically(self._path, json.dumps(self._known, indent=0).encode())
        return tuple(self._known[key])

    def _run(self, case: Case, setting: Setting) -> Steps:
        source = self._source

        def run() -> object:
            generator = torch.Generator().manual_seed(case.seed)
            return source.pipe(
                prompt=case.prompt, generator=generator, output_type="latent", **source.call
            )

        with setting.on(source.pipe):
            return realised(source.pipe, run, int(source.call["num_inference_steps"]))


def _planned(trajectories: Sequence[Trajectory], arc: ArcLength | None) -> list[Steps]:
    """Return the masks of some trajectories, for every budget and several weights of errors."""
    schedules = StepSchedules(trajectories, arc)
    return [tuple(schedules.computed(budget, early)) for budget in _BUDGETS for early in _EARLY]


def _arc_length(trajectories: Sequence[Trajectory]) -> ArcLength:
    found = arc_length_of(trajectories)
    assert found is not None, "outputs of the miniature never move at an even pace"
    return found


def _psnr(source: MiniatureSource, case: Case, computed: Steps) -> float:
    """Return what the pipeline gives under a mask."""
    tried = policy(computed, int(source.call["num_inference_steps"]))
    evaluator = Evaluator(source, parse_constraints("psnr>=0"))
    return evaluator.measure(tried, case, paired=False).values["psnr"]


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
    main("oracle", measure, __doc__ or "", options)
