"""How often is what a search ships truly below its floors, how often is it nothing, how fast is it?

Simulates whole searches, with their proofs, on landscapes whose truth is known; beside it the naive
pick, the fastest trial that held its floors in the search. In a row of their own stand landscapes
on which few prompts lose much, each at a place of its own: no proof on some dozen prompts can see
what one prompt in thirty does. What was simulated stays in `bench-out/search_honesty`
(`bench-out/search_honesty-quick`), and the next run goes on from it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from benchmarks.landscapes import PROOF_PROMPTS, SEARCH_PROMPTS, Kind, Landscape, Simulated
from benchmarks.rows import Benchmark, Row, main
from benchmarks.simulated import PROMPTS, settings
from rich.console import Console
from scipy import stats

from ditune.db.policy import Policy
from ditune.db.records import Trial
from ditune.tuner.confirm import Proof, Provenance, confirm
from ditune.tuner.contenders import to_prove
from ditune.tuner.evaluate import Case, cases_of
from ditune.tuner.pace import candidates
from ditune.tuner.result import Options
from ditune.tuner.search import Budget
from ditune.tuner.space import Space
from ditune.tuner.studies import searched

_SEARCHES, _QUICK = 300, 4  # on the two kinds that are judged, in turn
_BESIDE, _QUICK_BESIDE = 60, 1  # on the third
_SEARCH_SEED, _PROOF_SEED = 1_000, 500_000
_WORTH = 1.1  # a feasible policy this fast should be found
_INFEASIBLE, _NONE, _SHARE = 0.02, 0.05, 0.93


@dataclass(frozen=True)
class Found:
    """What one search came to."""

    seed: int
    kind: Kind
    best: float  # the greatest true speedup that holds the floors
    naive: float  # true speedup of the naive pick, 1 if there was none
    naive_margin_db: float
    shipped: float | None  # true speedup, None without a winner
    margin_db: float | None
    looked_at: int
    forwards: int
    proof_forwards: int  # of them


def simulated(seed: int, kind: Kind, options: Options) -> Found:
    """Run one search as `tune run` does, and compare what it ships with the truth."""
    landscape = Landscape(seed, kind)
    evaluator = Simulated(landscape, seed)
    space = landscape.space()
    cases = cases_of(SEARCH_PROMPTS, options.search_prompts, _SEARCH_SEED + 1_000 * seed)
    trials = searched_in_memory(space, evaluator, cases, options.trials, seed)
    searched_for = evaluator.forwards
    proof = cases_of(PROOF_PROMPTS, options.confirm_prompts, _PROOF_SEED + 1_000 * seed)
    most = options.confirm_candidates
    contenders = to_prove(trials, space, evaluator.constraints, len(proof), most)
    provenance = Provenance("study-simulated", PROMPTS)
    shipped = confirm(Proof(evaluator, proof, trials=trials), contenders, provenance)
    fastest = candidates(trials, 1, space.pace(trials))
    naive = fastest[0].policy if fastest else Policy()
    won = shipped.policy
    return Found(
        seed,
        kind,
        best=landscape.best[0],
        naive=landscape.true_speedup(naive),
        naive_margin_db=landscape.margin_db(naive),
        shipped=None if won is None else landscape.true_speedup(won),
        margin_db=None if won is None else landscape.margin_db(won),
        looked_at=shipped.looked_at,
        forwards=evaluator.forwards,
        proof_forwards=evaluator.forwards - searched_for,
    )


def searched_in_memory(
    space: Space, evaluator: Simulated, cases: Sequence[Case], trials: int, seed: int
) -> list[Trial]:
    """Run a search in a database that lasts as long as it does; return its trials."""
    with tempfile.TemporaryDirectory() as folder:
        return searched(
            settings(evaluator.constraints, seed, space),
            space,
            evaluator,
            cases,
            f"sqlite:///{folder}/search.db",
            lambda search: search.run(Budget(trials), lambda *_: None),
        )


def measure(benchmark: Benchmark, arguments: argparse.Namespace) -> None:
    """Simulate searches on all kinds of landscapes."""
    folder = Path("bench-out") / ("search_honesty-quick" if arguments.quick else "search_honesty")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "found.jsonl"
    known = (
        [Found(**json.loads(line)) for line in path.read_text().splitlines()]
        if path.exists()
        else []
    )
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    count, beside = (_QUICK, _QUICK_BESIDE) if arguments.quick else (_SEARCHES, _BESIDE)
    asked: list[tuple[int, Kind]] = [(n // 2, ("smooth", "cliff")[n % 2]) for n in range(count)]
    asked += [(seed, "own cliffs") for seed in range(beside)]
    done = {(found.seed, found.kind): found for found in known}
    for number, (seed, kind) in enumerate(asked, start=1):
        if (seed, kind) in done:
            continue
        found = done[seed, kind] = simulated(seed, kind, Options())
        with path.open("a") as file:
            file.write(json.dumps(asdict(found)) + "\n")
        console.print(f"search {number} of {len(asked)}: {found}")
    report(benchmark, [done[each] for each in asked])


def report(benchmark: Benchmark, found: Sequence[Found]) -> None:
    """Add the rows: both kinds that are judged, then each kind alone."""
    groups = {
        "": [f for f in found if f.kind != "own cliffs"],
        " (smooth)": [f for f in found if f.kind == "smooth"],
        " (with a cliff)": [f for f in found if f.kind == "cliff"],
        " (each prompt with a cliff of its own)": [f for f in found if f.kind == "own cliffs"],
    }
    for name, group in groups.items():
        judged = name == ""
        won = [f for f in group if f.shipped is not None]
        wrong = sum(f.margin_db is not None and f.margin_db < 0.0 for f in won)
        worth = [f for f in group if f.best >= _WORTH]
        none = sum(f.shipped is None for f in worth)
        shares = [f.shipped / f.best for f in won if f.shipped is not None]
        _add_share(
            benchmark,
            f"shipped and truly infeasible{name}",
            wrong,
            len(group),
            _INFEASIBLE if judged else None,
        )
        _add_share(benchmark, f"no winner{name}", none, len(worth), _NONE if judged else None)
        naive = sum(f.naive_margin_db < 0.0 for f in group)
        _add_share(benchmark, f"naive pick truly infeasible{name}", naive, len(group), None)
        median = float(np.median(shares)) if shares else 0.0
        held = median >= _SHARE if judged else None
        target = f">= {_SHARE}" if judged else ""
        benchmark.add(
            Row(
                f"true speedup / best feasible{name}",
                median,
                "",
                target,
                held,
                n=len(shares),
                status="simulated",
            )
        )
    benchmark.conditions["search"] = f"{Options().trials} trials, 3 prompts each, then the proof"


def _add_share(benchmark: Benchmark, figure: str, hits: int, n: int, most: float | None) -> None:
    interval = stats.binomtest(hits, n).proportion_ci(method="wilson")
    held = None if most is None else hits / n <= most
    target = "" if most is None else f"<= {most}"
    ci95 = (float(interval.low), float(interval.high))
    benchmark.add(Row(figure, hits / n, "", target, held, ci95, n, status="simulated"))


if __name__ == "__main__":
    main("search_honesty", measure, __doc__ or "")
