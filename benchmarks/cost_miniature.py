"""Both searches of `benchmarks.search_cost` on the miniature; every evaluation is kept at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.optimised import Problem, Spent, kept
from diffusers.utils import logging as diffusers_logging
from pydantic import TypeAdapter

from ditune.db.engine import study_storage_url
from ditune.db.files import write_atomically
from ditune.db.policy import Policy
from ditune.db.records import Interval
from ditune.db.store import Store
from ditune.miniature.system import MiniatureSource
from ditune.profiler.record import record
from ditune.profiler.statistics import paired_speedup
from ditune.tuner.evaluate import Case, Evaluator, cases_of
from ditune.tuner.progress import Stage
from ditune.tuner.quality import parse_constraints
from ditune.tuner.result import Options
from ditune.tuner.session import Session
from ditune.tuner.space import Space

_SEARCH_SEED, _TRUTH_SEED, _TIMING_SEED = 1_000, 2_000_000, 3_000_000
_APART = 20  # captions by which the prompts of one seed and the next are shifted
_UNSEEN, _PAIRS = 20, 24


@dataclass(frozen=True)
class Compared:
    """Both searches of one seed."""

    share: Interval  # latency of the plain optimiser's best over that of what ships
    speedup: Interval  # of what ships, against the plain pipeline
    forwards: float  # of profile, search and proof
    shared_forwards: float  # of profile and proof alone
    plain_forwards: float  # of evaluations until one was as fast, or of all
    reached: bool  # whether one ever was


class Forwards:
    """Counts forwards of a transformer; some of its blocks are that part of one."""

    def __init__(self, transformer: Any) -> None:
        """Watch a transformer's blocks from now on."""
        self._calls = 0
        self._depth = len(transformer.blocks)
        for block in transformer.blocks:
            block.register_forward_hook(self._count)

    @property
    def done(self) -> float:
        """How many forwards there were so far."""
        return self._calls / self._depth

    def _count(self, *_: Any) -> None:
        self._calls += 1


class _ByStage:
    """A progress that takes the count in each stage.

    Fewer steps are compared after the proof, and are no part of it.
    """

    def __init__(self, forwards: Forwards) -> None:
        self._forwards = forwards
        self.until: dict[str, float] = {}

    def update(self, stage: Stage, done: int, total: int, note: str) -> None:
        if note != "fewer steps":
            self.until[stage] = self._forwards.done


class _Truth:
    """Whether policies hold their floors on prompts that no search saw."""

    def __init__(self, evaluator: Evaluator, cases: Sequence[Case]) -> None:
        self._evaluator = evaluator
        self._cases = cases
        self._known: dict[str, bool] = {}

    def holds(self, policy: Policy) -> bool:
        if policy.id not in self._known:
            outcomes = self._evaluator.run(policy, self._cases, pairs=0)
            self._known[policy.id] = self._held([outcome.values for outcome in outcomes])
        return self._known[policy.id]

    def _held(self, values: Sequence[dict[str, float]]) -> bool:
        for constraint in self._evaluator.constraints:
            scores = [value[constraint.metric] for value in values]
            seen = min(scores) if constraint.statistic == "worst" else sum(scores) / len(scores)
            if seen < constraint.floor:
                return False
        return True


def compared(folder: Path, seed: int, evaluations: int) -> Compared:
    """Run both searches of a seed, time what they found in turn, and return how they compare."""
    path, kind = folder / f"miniature-{seed}.json", TypeAdapter(Compared)
    if not path.exists():
        diffusers_logging.set_verbosity_error()
        write_atomically(path, kind.dump_json(_compared(folder, seed, evaluations)))
    return kind.validate_json(path.read_bytes())


def _compared(folder: Path, seed: int, evaluations: int) -> Compared:
    source = source_of(seed)
    evaluator = Evaluator(source, parse_constraints(source.quality))
    space, plain = optimised_plainly(folder, seed, source, evaluator, evaluations)
    shipped, until = _ours(folder, seed, source)
    truth = _Truth(evaluator, cases_of(source.held_out, _UNSEEN, _TRUTH_SEED))
    feasible = [each for each in plain if each.evaluation.feasible]

    def policy_of(each: Spent) -> Policy:
        return space.policy(each.evaluation.point)

    fastest_first = sorted(feasible, key=lambda each: each.evaluation.speedup, reverse=True)
    best = next((each for each in fastest_first if truth.holds(policy_of(each))), None)
    rival = Policy() if best is None else policy_of(best)
    share, speedup = _in_turn(evaluator, source, shipped, rival)
    as_fast = (1.0 if best is None else best.evaluation.speedup) * share.median
    reached = [
        each.forwards
        for each in feasible
        if each.evaluation.speedup >= as_fast and truth.holds(policy_of(each))
    ]
    return Compared(
        share,
        speedup,
        forwards=until["confirm"],
        shared_forwards=until["confirm"] - until["search"] + until["profile"],
        plain_forwards=reached[0] if reached else plain[-1].forwards,
        reached=bool(reached),
    )


def source_of(seed: int) -> MiniatureSource:
    """Return the miniature with prompts of a seed's own, as far as there are so many."""
    source = MiniatureSource(small=None)
    return replace(
        source,
        calibration=_turned(source.calibration, seed),
        held_out=_turned(source.held_out, seed),
    )


def _turned(prompts: Sequence[str], seed: int) -> tuple[str, ...]:
    first = seed * _APART % len(prompts)
    return (*prompts[first:], *prompts[:first])


def optimised_plainly(
    folder: Path, seed: int, source: MiniatureSource, evaluator: Evaluator, evaluations: int
) -> tuple[Space, list[Spent]]:
    """Let the plain optimiser go on where it stopped, in the space that a profile gives."""
    options = Options()
    prompts = source.calibration[: options.profile_prompts]
    recorded = record(source.pipe, prompts, call=source.call, seed=_SEARCH_SEED)
    space = Space(recorded.profile, handoff=False, trajectories=recorded.trajectories)
    counter = Forwards(source.pipe.transformer)
    cases = cases_of(source.calibration, options.search_prompts, _SEARCH_SEED)
    problem = Problem(space, evaluator, cases, lambda: counter.done)
    return space, kept(folder / f"plain-miniature-{seed}.jsonl", problem, evaluations, seed)


def _ours(folder: Path, seed: int, source: MiniatureSource) -> tuple[Policy, dict[str, float]]:
    """Return what a session ships, and its forwards until the end of each stage."""
    path = folder / f"ours-miniature-{seed}.json"
    if not path.exists():
        progress = _ByStage(Forwards(source.pipe.transformer))
        url = f"sqlite:///{folder}/ours-miniature-{seed}.db"
        with Store.open(url) as store:
            session = Session(source, store, Options(seed=seed), progress)
            found = session.run(study_storage_url(url)).policy_file
        policy = Policy() if found is None else found.policy
        ours = {"policy": policy.model_dump(mode="json"), "until": progress.until}
        write_atomically(path, json.dumps(ours).encode())
    read = json.loads(path.read_text(encoding="utf-8"))
    return Policy.model_validate_json(json.dumps(read["policy"])), read["until"]


def _in_turn(
    evaluator: Evaluator, source: MiniatureSource, shipped: Policy, rival: Policy
) -> tuple[Interval, Interval]:
    """Return the rival's latency, and that of the plain pipeline, over that of what ships."""
    latencies: dict[str, list[float]] = {"plain": [], "shipped": [], "rival": []}
    runs: dict[str, Callable[[Case], float]] = {
        "plain": evaluator.baseline_ms,
        "shipped": lambda case: evaluator.tuned(shipped, case)[1],
        "rival": lambda case: evaluator.tuned(rival, case)[1],
    }
    for number, case in enumerate(cases_of(source.held_out, _PAIRS, _TIMING_SEED)):
        names = list(runs)
        for name in names[number % 3 :] + names[: number % 3]:
            latencies[name].append(runs[name](case))
    shipped_ms = latencies["shipped"]
    return (
        paired_speedup(latencies["rival"], shipped_ms),
        paired_speedup(latencies["plain"], shipped_ms),
    )
