"""What a plain optimiser does on the same space: by chance, then Gaussian processes, to the end.

No profile, no ladder, no early end, no proof: each policy is run on all prompts, and the sampler
hears its speed and its constraints as our search would tell them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import optuna

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


def optimised(
    space: Space,
    evaluator: Evaluates,
    cases: Sequence[Case],
    evaluations: int,
    seed: int,
    known: Sequence[Evaluation] = (),
) -> Iterator[Evaluation]:
    """Yield one evaluation after the other.

    Args:
        space: To search.
        evaluator: Runs policies.
        cases: The prompts that each of them takes.
        evaluations: How many in all.
        seed: Of the sampler.
        known: What an earlier run yielded; it counts, and is not yielded again.
    """
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
        outcomes = list(evaluator.run(policy, cases, pairs=1))
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
