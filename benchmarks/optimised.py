"""What a plain optimiser does on the same space: by chance, then Gaussian processes, to the end.

No ladder, no surrogate, no early end: each policy is run on all prompts, and the sampler hears its
speed and its constraints as our search would tell them. Every evaluation is kept at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
from pydantic import TypeAdapter

from ditune.db.policy import Policy
from ditune.tuner.evaluate import Case, Evaluates
from ditune.tuner.space import Space
from ditune.tuner.verdict import search_speedup, violations

_BY_CHANCE = 50  # evaluations, before the processes begin


@dataclass(frozen=True)
class Evaluation:
    """One point of the plain optimiser and what it gave."""

    point: Mapping[str, float | int | str]
    violation: Mapping[str, float]  # by constraint; <= 0 holds it
    speedup: float
    work_ratio: float

    @property
    def feasible(self) -> bool:
        """Whether it held all floors on the prompts of the search."""
        return all(value <= 0.0 for value in self.violation.values())


@dataclass(frozen=True)
class Spent:
    """An evaluation of the plain optimiser, and all forwards when it was over."""

    evaluation: Evaluation
    forwards: float


@dataclass(frozen=True)
class Problem:
    """What is searched: the space, who evaluates, on what, and who counts forwards."""

    space: Space
    evaluator: Evaluates
    cases: Sequence[Case]
    forwards: Callable[[], float]


def kept(path: Path, problem: Problem, evaluations: int, seed: int) -> list[Spent]:
    """Let the plain optimiser go on where a file says that it stopped; return all evaluations."""
    kind = TypeAdapter(Spent)
    lines = path.read_bytes().splitlines() if path.exists() else []
    plain = [kind.validate_json(line) for line in lines][:evaluations]
    before, began = (plain[-1].forwards if plain else 0.0), problem.forwards()
    known = [each.evaluation for each in plain]
    for each in _optimised(problem, evaluations, seed, known):
        plain.append(Spent(each, before + problem.forwards() - began))
        with path.open("ab") as file:
            file.write(kind.dump_json(plain[-1]) + b"\n")
    return plain


def _optimised(
    problem: Problem, evaluations: int, seed: int, known: Sequence[Evaluation]
) -> Iterator[Evaluation]:
    """Yield one evaluation after the other; those that are known count, and are not yielded."""
    space, evaluator = problem.space, problem.evaluator
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.GPSampler(
        seed=seed + len(known),
        deterministic_objective=False,
        n_startup_trials=min(_BY_CHANCE, evaluations // 2),
    )
    study = optuna.create_study(sampler=sampler)
    for each in known:
        told = optuna.trial.create_trial(
            value=1.0 / each.speedup,
            params=dict(each.point),
            distributions=space.distributions,
            constraints=dict(each.violation),
        )
        study.add_trial(told)
    for _ in range(evaluations - len(known)):
        asked = study.ask(space.distributions)
        policy = space.policy(asked.params)
        outcomes = list(evaluator.run(policy, problem.cases, pairs=1))
        found = Evaluation(
            asked.params,
            violations(evaluator.constraints, [outcome.values for outcome in outcomes]),
            1.0 if policy == Policy() else search_speedup(outcomes),
            float(np.median([outcome.summary.work_ratio for outcome in outcomes])),
        )
        for name, violation in found.violation.items():
            asked.set_constraint(name, violation)
        study.tell(asked, 1.0 / found.speedup)
        yield found
