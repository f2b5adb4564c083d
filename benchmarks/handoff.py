"""How fast is a video that starts with the large model and ends with the small one, as right?

Searches caches, hand-offs and both together under floors on what the judge sees, proves the fastest
of each kind, judges them on 600 held-out pairs of caption and seed, and times them in turn with the
plain pipeline. It takes hours on a CPU; what it measured stays in `bench-out/handoff`
(`bench-out/handoff-quick`), and the next run goes on from it. With `--device cuda` it judges what
can be judged in batches, and stops: the run that times what was found is another one.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.judged import Difference, Judged, decides, name_of
from benchmarks.resumed import require_same
from benchmarks.rows import Benchmark, Row, main
from rich.console import Console

from ditune.cli.sources import quieten_libraries
from ditune.db.files import write_atomically
from ditune.db.policy import AdaptiveHandoff, BandedHandoff, Handoff, Policy
from ditune.db.records import Trial
from ditune.miniature.system import MiniatureSource
from ditune.profiler.record import record
from ditune.profiler.statistics import counts_lower_bound, paired_speedup
from ditune.tuner.confirm import Candidates, Listed, Looked, missed
from ditune.tuner.contenders import Narrowed
from ditune.tuner.evaluate import Case, Evaluator, cases_of
from ditune.tuner.handoffs import edge, small_steps, switched
from ditune.tuner.measurements import Measurement, Measurements
from ditune.tuner.pace import Pace, candidates
from ditune.tuner.quality import parse_constraints, summarise
from ditune.tuner.search import Budget
from ditune.tuner.space import Space
from ditune.tuner.studies import searched, settings_of

_ATTRIBUTES = ("judge_digit", "judge_colour", "judge_motion")
_MEAN_FLOOR, _BOUND_FLOOR = -0.01, -0.03  # of the paired difference on held-out pairs
_ALONE, _BOTH = 2.5, 4.0  # speedups to reach
_CACHE, _HANDOFF, _JOINT = "cache only", "hand-off only", "both"
_FIRST, _GOOD, _SMALL = "small model first", "switch for good", "small model alone"
_DELTAS = (0.01, 0.03)  # of the official adaptive rule
_SHARES = (0.8, 0.6, 0.4, 0.2, 0.1, 0.04)  # of the steps, that come first
_LOOKS = (50, 100, 150, 200, 300, 400, 550, 700, 850)  # videos after which a proof may end early
_IN_TURN = "in turn"
_SEARCH_SEED, _HELD_OUT_SEED = 1_000, 1_200_000
_PROOF_BLOCKS = ((600_000, 400), (900_000, 600))  # seed, pairs; decision 13 says why two


@dataclass(frozen=True)
class Sizes:
    """How much to measure."""

    trials: int = 52
    search: int = 34
    proof: int = 1000
    held_out: int = 600
    timed: int = 40  # of them in turn with the plain pipeline
    search_floor: float = -0.03
    proof_floor: float = -0.01  # with its 95 % bound: the mean that has to hold on what is held out

    @property
    def search_floors(self) -> str:
        """What binds the search."""
        return _floors(self.search_floor)

    @property
    def proof_floors(self) -> str:
        """What binds the proof."""
        return _floors(self.proof_floor)


_QUICK = Sizes(8, search=4, proof=8, held_out=4, timed=3, search_floor=-0.5, proof_floor=-0.5)


def _floors(floor: float) -> str:
    return ",".join(f"{name}>={floor}" for name in _ATTRIBUTES)


@dataclass(frozen=True)
class Found:
    """What a search gave: the policies that held its floors, the fastest first."""

    policies: tuple[Policy, ...]
    sigmas: tuple[float, ...]  # of the plain schedule
    pace: Pace

    def of_kind(self, kind: str) -> list[Policy]:
        """Return those of one family."""
        return [policy for policy in self.policies if kind_of(policy) == kind]

    def candidates(self, kind: str) -> Candidates:
        """Return what the proof of a family looks at."""
        return Narrowed(self.of_kind(kind), self.sigmas)


class Comparison:
    """The miniature, what was measured so far, and on which videos the rest is measured."""

    def __init__(self, folder: Path, sizes: Sizes, device: str, say: Callable[[str], None]) -> None:
        """Take up what the folder holds."""
        self.source = MiniatureSource()
        self.sizes = sizes
        self.floors = parse_constraints(sizes.proof_floors)
        self.log = Measurements(folder / "measurements.jsonl")
        self._say = say
        self._folder = folder
        self._device = device
        held_out = self.source.held_out
        proof = [cases_of(held_out, count, seed) for seed, count in _PROOF_BLOCKS]
        self.proof = [case for block in proof for case in block][: sizes.proof]
        self.held_out = cases_of(held_out, sizes.held_out, _HELD_OUT_SEED)
        self.timed = self.held_out[: sizes.timed]

    def found(self) -> Found:
        """Return what the search found, searching unless the folder has it."""
        path = self._folder / "found.json"
        if not path.exists():
            searched_trials, levels = self._search()
            lines = [trial.model_dump(mode="json") for trial in searched_trials]
            written = {"trials": lines, "sigmas": levels}
            write_atomically(path, json.dumps(written, indent=1).encode())
        read = json.loads(path.read_text())
        trials = [Trial.model_validate_json(json.dumps(each)) for each in read["trials"]]
        sigmas = tuple(read["sigmas"])
        pace = Pace(trials, sigmas)
        ordered = candidates(trials, len(trials), pace)
        return Found(tuple(trial.policy for trial in ordered), sigmas, pace)

    def _search(self) -> tuple[list[Trial], list[float]]:
        """Run the search that `tune run` runs."""
        source = self.source
        prompts = source.calibration[:2]
        recorded = record(
            source.pipe, prompts, call=source.call, small=source.small, seed=_SEARCH_SEED
        )
        evaluator = Evaluator(source, parse_constraints(self.sizes.search_floors))
        space = Space(recorded.profile, handoff=True, trajectories=recorded.trajectories)
        trials = searched(
            settings_of(evaluator, recorded.profile, space),
            space,
            evaluator,
            cases_of(source.calibration, self.sizes.search, _SEARCH_SEED),
            str(self._folder / "search.db"),
            lambda search: search.run(Budget(self.sizes.trials), self._show),
        )
        return trials, [s.sigma for s in recorded.profile.redundancy if s.sigma is not None]

    def _show(self, trial: Trial, count: int) -> None:
        held = "holds" if trial.feasible else f"misses {trial.reason or trial.violation}"
        speedup = "no result" if trial.speedup is None else f"{trial.speedup:.2f}x"
        self._say(f"trial {count} of {self.sizes.trials}: {speedup}, {held}")

    def judged(self) -> Judged:
        """Return what judges videos; the pipeline moves to the device."""
        return Judged(self.source, self.log, self._device, self._say)

    def proved(self, name: str, candidates: Candidates, judged: Judged) -> Policy | None:
        """Return the last of some candidates that is proved to hold the floors: the fastest."""
        looked: list[Looked] = []
        while (policy := candidates.next(looked)) is not None:
            looked.append(self._look(policy, judged))
            reason = looked[-1].reason
            self._say(f"{name}: {name_of(policy)} {f'fails: {reason}' if reason else 'holds'}")
        return next((each.policy for each in reversed(looked) if not each.reason), None)

    def _look(self, policy: Policy, judged: Judged) -> Looked:
        values: Sequence[Difference] = ()
        reason = ""
        for seen in (*(look for look in _LOOKS if look < len(self.proof)), len(self.proof)):
            values = judged.differences(policy, self.proof[:seen])
            reason = missed(self.floors, values, len(self.proof) - seen)
            if reason:
                break
        return Looked(policy, values, summarise(self.floors, values), reason)

    def rival(
        self,
        name: str,
        policies: Sequence[Policy],
        judged: Judged,
        may_hold: Callable[[Policy], bool],
    ) -> Policy | None:
        """Return the first of a rival's settings that is proved, or need not be: it is slower."""
        for policy in policies:
            if may_hold(policy):
                self._say(f"{name}: {name_of(policy)} is slower than ours, and taken to hold")
                return policy
            if self.proved(name, Listed([policy]), judged) is not None:
                return policy
        return None

    def time(self, policies: Mapping[str, Policy]) -> None:
        """Time the plain pipeline and some policies on the same cases, in an order drawn anew."""
        evaluator = Evaluator(self.source, ())
        for index, case in enumerate(self.timed, start=1):
            order = [Policy(), *policies.values()]
            random.Random(case.seed).shuffle(order)
            self._say(f"timing held-out pair {index} of {len(self.timed)}")
            for policy in order:
                if self.log.find("timed", _IN_TURN, name_of(policy), case) is None:
                    plain = policy == Policy()
                    made = evaluator.generate(case) if plain else evaluator.tuned(policy, case)
                    self._keep(policy, case, made[1])

    def _keep(self, policy: Policy, case: Case, ms: float) -> None:
        name = name_of(policy)
        self.log.keep(Measurement("timed", _IN_TURN, name, case.prompt, case.seed, {}, ms=ms))

    def latencies(self, policy: Policy) -> list[float]:
        """Return the latencies on the pairs that were timed in turn, in milliseconds."""
        found = (self.log.find("timed", _IN_TURN, name_of(policy), case) for case in self.timed)
        return [each.ms for each in found if each is not None and each.ms is not None]


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


def options(parser: argparse.ArgumentParser) -> None:
    """Add what this benchmark alone has."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of the judging")


def measure(benchmark: Benchmark, arguments: argparse.Namespace) -> None:
    """Search, prove, judge and time on the miniature in its reference setting."""
    quieten_libraries()
    folder = Path("bench-out") / ("handoff-quick" if arguments.quick else "handoff")
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    sizes = _QUICK if arguments.quick else Sizes()
    require_same(folder, {"sizes": asdict(sizes)})
    compared = Comparison(folder, sizes, arguments.device, console.print)
    found = compared.found()
    judged = compared.judged()
    judged.prepare([*compared.proof, *compared.held_out])
    chosen = {
        kind: policy
        for kind in (_CACHE, _HANDOFF, _JOINT)
        if (policy := compared.proved(kind, found.candidates(kind), judged)) is not None
    }
    for policy in chosen.values():
        judged.differences(policy, compared.held_out)
    batches_only = arguments.device != "cpu"
    slower = slower_than(found, chosen.get(_HANDOFF))
    proved = {
        name: compared.rival(name, policies, judged, slower)
        for name, policies in rival_policies(found).items()
        if not (batches_only and any(map(decides, policies)))
    }
    if batches_only:
        return
    rivals = {name: policy for name, policy in proved.items() if policy is not None}
    compared.time({**chosen, **rivals, _SMALL: small_alone()})
    for name in proved.keys() - rivals.keys():
        benchmark.add(Row(f"{name}: nothing was proved", 1.0, "x"))
    report(benchmark, compared, chosen, rivals)


def slower_than(found: Found, ours: Policy | None) -> Callable[[Policy], bool]:
    """Return what says whether a policy is slower than ours by its work alone."""
    own = None if ours is None else found.pace.expected(ours, None)

    def slower(policy: Policy) -> bool:
        expected = found.pace.expected(policy, None)
        return own is not None and expected is not None and expected < own

    return slower


def rival_policies(found: Found) -> dict[str, list[Policy]]:
    """Return what is compared with, the fastest first: each stands with the first that holds.

    The switch for good and the adaptive rules are in our search too; here they stand alone, and the
    switches that it found are added to an even choice.
    """
    steps = len(found.sigmas)
    counts = [count for share in _SHARES if 0 < (count := round(steps * share)) < steps]
    switches = {
        steps - len(small_steps(policy.handoff, found.sigmas))
        for policy in found.of_kind(_HANDOFF)
        if isinstance(policy.handoff, Handoff) and policy.handoff.until is None
    }
    good = [switched(found.sigmas, large) for large in sorted({*counts, *switches})]
    return {
        _FIRST: [small_first(found.sigmas, count) for count in sorted(counts, reverse=True)],
        _GOOD: [Policy(handoff=handoff) for handoff in good if handoff is not None],
        **{f"adaptive {d}": [Policy(handoff=AdaptiveHandoff(delta=d))] for d in _DELTAS},
    }


def report(
    benchmark: Benchmark,
    compared: Comparison,
    chosen: Mapping[str, Policy],
    rivals: Mapping[str, Policy],
) -> None:
    """Add the rows: speed and rightness of each kind, the ceiling, and the rivals."""
    sizes = compared.sizes
    benchmark.conditions["floors"] = f"search {sizes.search_floors}; proof {sizes.proof_floors}"
    benchmark.conditions["pairs"] = (
        f"{sizes.search} to search on, {sizes.proof} to prove on, {sizes.held_out} held-out, "
        f"{sizes.timed} of them timed in turn"
    )
    for kind in (_CACHE, _HANDOFF, _JOINT):
        if kind not in chosen:
            benchmark.add(Row(f"{kind}: nothing was proved", 1.0, "x", "a policy", False))
    plain = compared.latencies(Policy())
    targets = {_HANDOFF: _ALONE, _JOINT: _BOTH}
    for name, policy in {**chosen, **rivals, _SMALL: small_alone()}.items():
        seen = paired_speedup(plain, compared.latencies(policy))
        target = targets.get(name)
        held = None if target is None else seen.median >= target
        said = f">= {target}" if target else ""
        benchmark.add(Row(f"{name}: speedup", seen.median, "x", said, held, seen.ci95, seen.n))
        if name in chosen:
            _add_rightness(benchmark, compared, name, policy)
    if _HANDOFF in chosen:
        _add_lead(benchmark, compared, chosen[_HANDOFF], rivals)


def _add_lead(
    benchmark: Benchmark, compared: Comparison, handoff: Policy, rivals: Mapping[str, Policy]
) -> None:
    """Add how the hand-off stands against the ceiling and against its rivals."""
    own, ceiling = compared.latencies(handoff), compared.latencies(small_alone())
    share = paired_speedup(ceiling, own).median
    benchmark.add(Row("hand-off only / ceiling 1/r (the small model alone)", share, ""))
    for name, policy in rivals.items():
        lead = paired_speedup(compared.latencies(policy), own)
        held = lead.median >= 1.0
        figure = f"hand-off only / {name}"
        benchmark.add(Row(figure, lead.median, "x", ">= 1", held, lead.ci95, lead.n))


def _add_rightness(benchmark: Benchmark, compared: Comparison, name: str, policy: Policy) -> None:
    """Add the paired differences of each attribute to the large model's videos."""
    seen = compared.judged().differences(policy, compared.held_out)
    for attribute in _ATTRIBUTES:
        differences = [values[attribute] for values in seen]
        n, mean, low = len(seen), sum(differences) / len(seen), counts_lower_bound(differences)
        figure = f"{name}: {attribute}"
        benchmark.add(Row(figure, mean, "", f">= {_MEAN_FLOOR}", mean >= _MEAN_FLOOR, n=n))
        held = low >= _BOUND_FLOOR
        benchmark.add(Row(f"{figure}, 95 % bound", low, "", f">= {_BOUND_FLOOR}", held, n=n))


if __name__ == "__main__":
    main("handoff", measure, __doc__ or "", options)
