"""How fast is a video that starts with the large model and ends with the small one, as right?

Searches caches, hand-offs and both together under floors on what the judge sees, proves the fastest
of each kind, and measures them on 600 held-out pairs of caption and seed. It takes hours; what it
measured stays in `bench-out/handoff` (`bench-out/handoff-quick`), and the next run goes on from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.rows import Benchmark, Row, main
from rich.console import Console

from ditune.accel.apply import accelerate
from ditune.cli.sources import quieten_libraries
from ditune.db.policy import AdaptiveHandoff, BandedHandoff, Handoff, Policy
from ditune.db.records import Trial
from ditune.miniature.system import MiniatureSource
from ditune.profiler.record import Recorded, record
from ditune.profiler.statistics import counts_lower_bound, paired_speedup
from ditune.tuner.bench_runs import PLAIN, Runs
from ditune.tuner.confirm import missed
from ditune.tuner.evaluate import Evaluator, cases_of
from ditune.tuner.handoffs import edge
from ditune.tuner.measurements import Measurements
from ditune.tuner.peers.contract import Setting
from ditune.tuner.quality import parse_constraints
from ditune.tuner.search import Budget, candidates
from ditune.tuner.space import Space
from ditune.tuner.studies import searched, settings_of

_ATTRIBUTES = ("digit", "colour", "motion")
_MEAN_FLOOR, _BOUND_FLOOR = -0.01, -0.03  # of the paired difference on held-out pairs
_ALONE, _BOTH = 2.5, 4.0  # speedups to reach
_CACHE, _HANDOFF, _JOINT = "cache only", "hand-off only", "both"
_FIRST, _SMALL = "small model first", "small model alone"
_SEARCH_SEED, _PROOF_SEED, _HELD_OUT_SEED = 1_000, 600_000, 900_000


@dataclass(frozen=True)
class Sizes:
    """How much to measure."""

    trials: int = 44
    search: int = 32
    proof: int = 200
    held_out: int = 600
    timed: int = 40  # of them beside the plain pipeline, in turn
    floor: float = -0.03

    @property
    def floors(self) -> str:
        """What binds the search and the proof."""
        return ",".join(f"judge_{name}>={self.floor}" for name in _ATTRIBUTES)


_QUICK = Sizes(trials=8, search=4, proof=8, held_out=4, timed=3, floor=-0.5)


class Comparison:
    """The miniature, a search, and what was measured so far."""

    def __init__(self, folder: Path, sizes: Sizes, say: Callable[[str], None]) -> None:
        """Take up what the folder holds."""
        self.source = MiniatureSource()
        self.sizes = sizes
        self.say = say
        self.floors = parse_constraints(sizes.floors)
        self.evaluator = Evaluator(self.source, self.floors)
        self.runs = Runs(self.evaluator, Measurements(folder / "measurements.jsonl"))
        self._folder = folder
        held_out = self.source.held_out
        self.search_cases = cases_of(self.source.calibration, sizes.search, _SEARCH_SEED)
        self.proof = cases_of(held_out, sizes.proof, _PROOF_SEED)
        self.held_out = cases_of(held_out, sizes.held_out, _HELD_OUT_SEED)

    def recorded(self) -> Recorded:
        """Return the profile that the search rests on."""
        prompts = self.source.calibration[:2]
        small, call = self.source.small, self.source.call
        return record(self.source.pipe, prompts, call=call, small=small, seed=_SEARCH_SEED)

    def searched(self, recorded: Recorded) -> list[Trial]:
        """Run the search that `tune run` runs."""
        space = Space(recorded.profile, handoff=True, trajectories=recorded.trajectories)
        return searched(
            settings_of(self.evaluator, recorded.profile, space),
            space,
            self.evaluator,
            self.search_cases,
            str(self._folder / "search.db"),
            lambda search: search.run(Budget(self.sizes.trials), self._show),
        )

    def _show(self, trial: Trial, count: int) -> None:
        held = "holds" if trial.feasible else f"misses {trial.reason or trial.violation}"
        self.say(f"trial {count} of {self.sizes.trials}: {trial.speedup:.2f}x, {held}")

    def setting(self, policy: Policy) -> Setting:
        """Return a policy as something that runs can be taken under."""
        return Setting(policy.id[7:19], partial(self._on, policy=policy))

    @contextmanager
    def _on(self, pipe: Any, policy: Policy) -> Iterator[Mapping[str, Any]]:
        with accelerate(pipe, policy, small=self.source.small):
            yield {}

    def proved(self, name: str, policies: Sequence[Policy]) -> Policy | None:
        """Return the first of some policies that is proved to hold the floors."""
        for policy in policies:
            values = []
            for index, case in enumerate(self.proof, start=1):
                self.say(f"{name}: proving {policy.id[7:19]}, video {index} of {len(self.proof)}")
                values.append(self.runs.timed(name, self.setting(policy), case).values)
                reason = missed(self.floors, values, final=index == len(self.proof))
                if reason:
                    self.say(f"{name}: {policy.id[7:19]} fails: {reason}")
                    break
            else:
                return policy
        return None

    def measure(self, chosen: Mapping[str, Policy], rivals: Mapping[str, Policy]) -> None:
        """Run what was chosen on all held-out pairs, and everything in turn on the first ones."""
        settings = [(name, self.setting(policy)) for name, policy in chosen.items()]
        beside = {**rivals, _SMALL: small_alone()}
        others = [(name, self.setting(policy)) for name, policy in beside.items()]
        timed = self.held_out[: self.sizes.timed]
        self.runs.timed_in_turn([*settings, *others], timed, self.say)
        for index, case in enumerate(self.held_out[len(timed) :], start=len(timed) + 1):
            for name, setting in settings:
                self.say(f"held-out pair {index} of {len(self.held_out)}: {name}")
                self.runs.timed(name, setting, case)

    def latencies(self, name: str, policy: Policy | None) -> list[float]:
        """Return the latencies on the pairs that were timed in turn."""
        setting = Setting(PLAIN, _never) if policy is None else self.setting(policy)
        timed = self.held_out[: self.sizes.timed]
        return [self.runs.timed(name, setting, case).ms or 0.0 for case in timed]


def _never(_pipe: Any) -> Any:
    raise AssertionError("the plain pipeline was measured already")


def small_alone() -> Policy:
    """Return the policy under which the small model runs every step: the ceiling."""
    return Policy(handoff=BandedHandoff(bands=((1000.0, 0.0),)))


def kind_of(policy: Policy) -> str:
    """Return which of the three families a policy belongs to."""
    if policy.handoff is None:
        return _CACHE
    return _HANDOFF if policy.cache is None else _JOINT


def small_first(sigmas: Sequence[float], steps: int) -> Policy:
    """Return T-Stitch's order: the small model runs the first steps."""
    bands = ((edge(sigmas, 0), edge(sigmas, steps)),)
    return Policy(handoff=BandedHandoff(bands=bands))


def measure(benchmark: Benchmark, arguments: argparse.Namespace) -> None:
    """Search, prove and measure on the miniature in its reference setting."""
    quieten_libraries()
    folder = Path("bench-out") / ("handoff-quick" if arguments.quick else "handoff")
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    compared = Comparison(folder, _QUICK if arguments.quick else Sizes(), console.print)
    recorded = compared.recorded()
    trials = compared.searched(recorded)
    ordered = [trial.policy for trial in candidates(trials, len(trials))]
    chosen: dict[str, Policy] = {}
    for kind in (_CACHE, _HANDOFF, _JOINT):
        found = compared.proved(kind, [policy for policy in ordered if kind_of(policy) == kind])
        if found is None:
            benchmark.add(Row(f"{kind}: nothing was proved", 1.0, "x"))
        else:
            chosen[kind] = found
    sigmas = [step.sigma for step in recorded.profile.redundancy if step.sigma is not None]
    rivals = rival_policies(compared, trials, sigmas)
    compared.measure(chosen, rivals)
    report(benchmark, compared, chosen, rivals)


def rival_policies(
    compared: Comparison, trials: Sequence[Trial], sigmas: Sequence[float]
) -> dict[str, Policy]:
    """Return what is compared with: each the fastest of its kind that is proved.

    The switch for good and the adaptive rules are in our search too; here they stand alone.
    """
    held = [trial.policy for trial in candidates(trials, len(trials))]
    switches = [
        policy
        for policy in held
        if policy.cache is None
        and isinstance(policy.handoff, Handoff)
        and policy.handoff.until is None
    ]
    steps = len(sigmas)
    shares = sorted({round(steps * share) for share in (0.8, 0.6, 0.4, 0.2, 0.1, 0.04)})
    ladders = {
        _FIRST: [small_first(sigmas, count) for count in reversed(shares) if 0 < count < steps],
        "switch for good": switches,
        **{
            f"adaptive {delta}": [Policy(handoff=AdaptiveHandoff(delta=delta))]
            for delta in (0.01, 0.03)
        },
    }
    found = {name: compared.proved(name, policies) for name, policies in ladders.items()}
    return {name: policy for name, policy in found.items() if policy is not None}


def report(
    benchmark: Benchmark,
    compared: Comparison,
    chosen: Mapping[str, Policy],
    rivals: Mapping[str, Policy],
) -> None:
    """Add the rows: speed and rightness of each kind, the ceiling, and the rivals."""
    benchmark.conditions["floors"] = compared.sizes.floors
    benchmark.conditions["pairs"] = (
        f"{len(compared.search_cases)} to search on, {len(compared.proof)} to prove on, "
        f"{len(compared.held_out)} held-out, {compared.sizes.timed} of them timed in turn"
    )
    plain = compared.latencies(PLAIN, None)
    targets = {_HANDOFF: _ALONE, _JOINT: _BOTH}
    for name, policy in {**chosen, **rivals, _SMALL: small_alone()}.items():
        seen = paired_speedup(plain, compared.latencies(name, policy))
        target = targets.get(name)
        held = None if target is None else seen.median >= target
        said = f">= {target}" if target else ""
        benchmark.add(Row(f"{name}: speedup", seen.median, "x", said, held, seen.ci95, seen.n))
        if name in chosen:
            _add_rightness(benchmark, compared, name, policy)
    ceiling = paired_speedup(plain, compared.latencies(_SMALL, small_alone())).median
    if _HANDOFF in chosen:
        own = compared.latencies(_HANDOFF, chosen[_HANDOFF])
        share = paired_speedup(plain, own).median / ceiling
        benchmark.add(Row("hand-off only / ceiling 1/r (the small model alone)", share, ""))
        for name, policy in rivals.items():
            lead = paired_speedup(compared.latencies(name, policy), own)
            held = lead.ci95[1] >= 1.0
            figure = f"hand-off only / {name}"
            benchmark.add(Row(figure, lead.median, "x", ">= 1", held, lead.ci95, lead.n))


def _add_rightness(benchmark: Benchmark, compared: Comparison, name: str, policy: Policy) -> None:
    """Add the paired differences of each attribute to the large model's videos."""
    setting = compared.setting(policy)
    seen = [compared.runs.timed(name, setting, case).values for case in compared.held_out]
    for attribute in _ATTRIBUTES:
        differences = [values[f"judge_{attribute}"] for values in seen]
        n, mean, low = len(seen), sum(differences) / len(seen), counts_lower_bound(differences)
        figure = f"{name}: {attribute}"
        benchmark.add(Row(figure, mean, "", f">= {_MEAN_FLOOR}", mean >= _MEAN_FLOOR, n=n))
        held = low >= _BOUND_FLOOR
        benchmark.add(Row(f"{figure}, 95 % bound", low, "", f">= {_BOUND_FLOOR}", held, n=n))


if __name__ == "__main__":
    main("handoff", measure, __doc__ or "")
