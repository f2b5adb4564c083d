"""What do 20 evaluations find, and what would a plain optimiser have spent on the same?

Runs the search on landscapes whose truth is known, with its proof, and beside it 200 evaluations of
the same space by chance and then by Gaussian processes, each on all prompts to the end. Compared is
the true speedup of what ships with the best truly feasible policy of the 200; and all forwards of
the search, those of its profile and proof among them, with what the plain optimiser had spent when
it first had as fast a policy. It takes hours; what was measured stays in `bench-out/search_cost`
(`bench-out/search_cost-quick`), and the next run goes on from it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import optuna
from benchmarks.landscapes import SEARCH_PROMPTS, Landscape, Simulated
from benchmarks.rows import Benchmark, Row, main
from benchmarks.search_honesty import simulated
from benchmarks.simulated import STEPS
from rich.console import Console

from ditune.db.policy import Policy
from ditune.tuner.evaluate import cases_of
from ditune.tuner.result import Options
from ditune.tuner.verdict import search_speedup, violations

_SEEDS, _QUICK_SEEDS = 20, 1
_EVALUATIONS, _QUICK_EVALUATIONS = 200, 12
_BY_CHANCE = 50  # of them, before the processes begin
_SHARE, _FORWARDS = 0.95, 0.35
_SEARCH_SEED = 1_000


@dataclass(frozen=True)
class Step:
    """The plain optimiser after an evaluation: its best truly feasible speedup, all forwards."""

    best: float
    forwards: int


@dataclass(frozen=True)
class Pair:
    """Both searches on one landscape."""

    seed: int
    cliff: bool
    shipped: float  # true speedup, 1 without a winner
    forwards: int
    plain: tuple[Step, ...]

    @property
    def share(self) -> float:
        """The true speedup over the best of the plain optimiser."""
        return self.shipped / self.plain[-1].best

    @property
    def spent(self) -> float:
        """The forwards over what the plain optimiser spent until it was as fast, or in all."""
        reached = (step.forwards for step in self.plain if step.best >= self.shipped)
        return self.forwards / next(reached, self.plain[-1].forwards)


def optimised(seed: int, cliff: bool, evaluations: int, prompts: int) -> tuple[Step, ...]:
    """Search a landscape's space without a profile, each policy on all prompts to the end."""
    landscape = Landscape(seed, cliff)
    evaluator = Simulated(landscape, seed)
    space = landscape.space()
    cases = cases_of(SEARCH_PROMPTS, prompts, _SEARCH_SEED + 1_000 * seed)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.GPSampler(
        seed=seed, deterministic_objective=False, n_startup_trials=min(_BY_CHANCE, evaluations // 2)
    )
    study = optuna.create_study(sampler=sampler)
    best, steps = 1.0, []
    for _ in range(evaluations):
        asked = study.ask(space.distributions)
        policy = space.policy(asked.params)
        outcomes = list(evaluator.run(policy, cases, pairs=1))
        values = [outcome.values for outcome in outcomes]
        for name, violation in violations(evaluator.constraints, values).items():
            asked.set_constraint(name, violation)
        study.tell(asked, 1.0 / (1.0 if policy == Policy() else search_speedup(outcomes)))
        if landscape.margin_db(policy) >= 0.0:
            best = max(best, landscape.true_speedup(policy))
        steps.append(Step(best, evaluator.forwards))
    return tuple(steps)


def measure(benchmark: Benchmark, arguments: argparse.Namespace) -> None:
    """Run both searches on both kinds of landscape."""
    folder = Path("bench-out") / ("search_cost-quick" if arguments.quick else "search_cost")
    folder.mkdir(parents=True, exist_ok=True)
    seeds = _QUICK_SEEDS if arguments.quick else _SEEDS
    evaluations = _QUICK_EVALUATIONS if arguments.quick else _EVALUATIONS
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for cliff in (False, True):
        pairs = []
        for seed in range(seeds):
            pairs.append(_pair(folder, seed, cliff, evaluations))
            console.print(
                f"landscape {seed + 1} of {seeds}{' with a cliff' if cliff else ''}: "
                f"{pairs[-1].share:.3f} of the plain best, {pairs[-1].spent:.3f} of its forwards"
            )
        report(benchmark, pairs, "with a cliff" if cliff else "smooth")


def _pair(folder: Path, seed: int, cliff: bool, evaluations: int) -> Pair:
    path = folder / f"{'cliff' if cliff else 'smooth'}-{seed}.json"
    if not path.exists():
        options = Options()
        found = simulated(seed, cliff, options)
        plain = optimised(seed, cliff, evaluations, options.search_prompts)
        forwards = found.forwards + STEPS * options.profile_prompts
        pair = Pair(seed, cliff, found.shipped or 1.0, forwards, plain)
        path.write_text(json.dumps(asdict(pair)) + "\n", encoding="utf-8")
    read = json.loads(path.read_text(encoding="utf-8"))
    return Pair(**{**read, "plain": tuple(Step(**step) for step in read["plain"])})


def report(benchmark: Benchmark, pairs: Sequence[Pair], kind: str) -> None:
    """Add the rows of one kind of landscape."""
    share = float(np.median([pair.share for pair in pairs]))
    total = sum(pair.forwards for pair in pairs)
    spent = math.exp(float(np.mean([math.log(pair.spent) for pair in pairs])))
    reached = sum(pair.plain[-1].best >= pair.shipped for pair in pairs)
    n = len(pairs)
    benchmark.add(
        Row(
            f"{kind}: true speedup of what ships / best of {len(pairs[0].plain)} evaluations",
            share,
            "",
            f">= {_SHARE}",
            share >= _SHARE,
            n=n,
            status="simulated",
        )
    )
    benchmark.add(
        Row(
            f"{kind}: forwards / those of the plain optimiser to the same result",
            spent,
            "",
            f"<= {_FORWARDS}",
            spent <= _FORWARDS,
            n=n,
            status="simulated",
        )
    )
    figure = f"{kind}: landscapes on which the plain optimiser was ever as fast"
    benchmark.add(Row(figure, reached / n, "", n=n, status="simulated"))
    benchmark.conditions[f"{kind}: forwards of a search, mean"] = f"{total / n:.0f}"


if __name__ == "__main__":
    main("search_cost", measure, __doc__ or "")
