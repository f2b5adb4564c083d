"""What do 20 evaluations find, and what would a plain optimiser have spent on the same?

Runs the search on landscapes whose truth is known and on the miniature, with its proof, and beside
it 200 evaluations of the same space by chance and then by Gaussian processes, each on all prompts
to the end. Compared is the speedup of what ships with that of the best policy among the 200 that
truly holds the floors; and all forwards of the search with those of the plain optimiser until it
first had as fast a policy, as if somebody told it so. Both pay the same profile, from which the
space is made, and the same proof, without which nobody knows what holds; the ratio to its
evaluations alone stands beside it. On landscapes the truth is known; on the miniature it is what 20
unseen prompts show, and the latencies of pairs in turn. It takes hours; what was measured stays in
`bench-out/search_cost` (`bench-out/search_cost-quick`), and the next run goes on from it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from benchmarks import cost_miniature
from benchmarks.landscapes import SEARCH_PROMPTS, Kind, Landscape, Simulated
from benchmarks.optimised import Problem, kept
from benchmarks.rows import Benchmark, Row, main
from benchmarks.search_honesty import Found, simulated
from benchmarks.simulated import STEPS
from rich.console import Console

from ditune.db.record import Status
from ditune.tuner.evaluate import cases_of
from ditune.tuner.result import Options

_KINDS: tuple[Kind, ...] = ("smooth", "cliff")
_SEEDS, _QUICK_SEEDS = 20, 1
_MINIATURE_SEEDS = 3
_EVALUATIONS, _QUICK_EVALUATIONS = 200, 12
_SHARE, _FORWARDS = 0.95, 0.35
_SEARCH_SEED = 1_000
# a profile's calls: layers, then each prompt timed and watched; and up to four for the impacts
_PROFILE_CALLS = 1 + 2 * Options().profile_prompts + 4


@dataclass(frozen=True)
class Pair:
    """Both searches on one problem: the speedups over each other, and the forwards of each."""

    share: float
    forwards: float  # of our profile, search and proof
    shared_forwards: float  # of profile and proof alone
    plain_forwards: float  # of plain evaluations until one was as fast, or of all
    reached: bool  # whether one ever was

    @property
    def spent(self) -> float:
        """Our forwards over those of the plain optimiser with the same profile and proof."""
        return self.forwards / (self.plain_forwards + self.shared_forwards)

    @property
    def spent_untold(self) -> float:
        """Our forwards over those of its evaluations alone."""
        return self.forwards / self.plain_forwards


def landscape_pair(folder: Path, seed: int, kind: Kind, evaluations: int) -> Pair:
    """Run both searches on a landscape, unless they were run before."""
    path = folder / f"ours-{kind}-{seed}.json"
    if not path.exists():
        path.write_text(json.dumps(asdict(simulated(seed, kind, Options()))), encoding="utf-8")
    ours = Found(**json.loads(path.read_text(encoding="utf-8")))
    landscape, shipped = Landscape(seed, kind), ours.shipped or 1.0
    evaluator = Simulated(landscape, seed)
    cases = cases_of(SEARCH_PROMPTS, Options().search_prompts, _SEARCH_SEED + 1_000 * seed)
    problem = Problem(landscape.space(), evaluator, cases, lambda: evaluator.forwards)
    plain = kept(folder / f"plain-{kind}-{seed}.jsonl", problem, evaluations, seed)
    policies = [problem.space.policy(each.evaluation.point) for each in plain]
    truth = [
        landscape.true_speedup(each) if landscape.margin_db(each) >= 0.0 else 1.0
        for each in policies
    ]
    as_fast = [s.forwards for s, speedup in zip(plain, truth, strict=True) if speedup >= shipped]
    profile = float(STEPS * _PROFILE_CALLS)
    return Pair(
        shipped / max(truth),
        ours.forwards + profile,
        ours.proof_forwards + profile,
        as_fast[0] if as_fast else plain[-1].forwards,
        bool(as_fast),
    )


def miniature_pair(folder: Path, seed: int, evaluations: int) -> Pair:
    """Run both searches on the miniature, unless they were run before."""
    found = cost_miniature.compared(folder, seed, evaluations)
    return Pair(
        found.share.median,
        found.forwards,
        found.shared_forwards,
        found.plain_forwards,
        found.reached,
    )


def measure(benchmark: Benchmark, arguments: argparse.Namespace) -> None:
    """Run both searches on both kinds of landscape and on the miniature."""
    folder = Path("bench-out") / ("search_cost-quick" if arguments.quick else "search_cost")
    folder.mkdir(parents=True, exist_ok=True)
    seeds = _QUICK_SEEDS if arguments.quick else _SEEDS
    evaluations = _QUICK_EVALUATIONS if arguments.quick else _EVALUATIONS
    console = Console(stderr=True, highlight=False, soft_wrap=True)

    def said(kind: str, pairs: list[Pair], pair: Pair) -> None:
        pairs.append(pair)
        console.print(
            f"{kind} {len(pairs)}: {pair.share:.3f} of the plain best, "
            f"{pair.spent:.3f} of its forwards"
        )

    for kind in _KINDS:
        pairs = list[Pair]()
        for seed in range(seeds):
            said(kind, pairs, landscape_pair(folder, seed, kind, evaluations))
        report(benchmark, pairs, f"landscapes ({kind})", evaluations, "simulated")
    pairs = []
    for seed in range(_QUICK_SEEDS if arguments.quick else _MINIATURE_SEEDS):
        said("miniature", pairs, miniature_pair(folder, seed, evaluations))
    report(benchmark, pairs, "miniature", evaluations, "measured")


def report(
    benchmark: Benchmark, pairs: Sequence[Pair], kind: str, evaluations: int, status: Status
) -> None:
    """Add the rows of one kind of problem."""
    share = float(np.median([pair.share for pair in pairs]))
    spent, untold = (_mean([p.spent for p in pairs]), _mean([p.spent_untold for p in pairs]))
    reached = sum(pair.reached for pair in pairs) / len(pairs)
    ours = f"{kind}: speedup of what ships / best of {evaluations} evaluations"
    forwards = f"{kind}: forwards / those of the plain optimiser to the same result"
    alone = f"{kind}: forwards / those of its evaluations alone, without profile and proof"
    ever = f"{kind}: share of problems on which the plain optimiser was ever as fast"
    n = len(pairs)
    for figure, value, target, held in (
        (ours, share, f">= {_SHARE}", share >= _SHARE),
        (forwards, spent, f"<= {_FORWARDS}", spent <= _FORWARDS),
        (alone, untold, "", None),
        (ever, reached, "", None),
    ):
        benchmark.add(Row(figure, value, "", target, held, n=n, status=status))
    mean = float(np.mean([pair.forwards for pair in pairs]))
    benchmark.conditions[f"{kind}: forwards of a search, mean"] = f"{mean:.0f}"


def _mean(ratios: Sequence[float]) -> float:
    """Return the geometric mean."""
    return math.exp(float(np.mean(np.log(ratios))))


if __name__ == "__main__":
    main("search_cost", measure, __doc__ or "")
