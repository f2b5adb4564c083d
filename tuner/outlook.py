"""What a candidate will come to in a proof, from how prompts differed for those before it.

Some prompts are hard under every policy. Once one candidate had all of them, and the search says
how much a policy adds of its own, the first few tell what the others will give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from ditune.db.records import Constraint, Expectation, Trial
from ditune.profiler.statistics import worst_lower_bound
from ditune.tuner.quality import UNSEEN, counts, lower_bound
from ditune.tuner.sequential import in_common, level, pattern

_FIRST_LOOK = 2  # prompts
_FUTILE = 0.02  # chance to hold in the end, below which a candidate is given up


class Outlook:
    """Learns from the candidates that had all prompts of a proof."""

    def __init__(self, constraints: Sequence[Constraint], trials: Sequence[Trial]) -> None:
        """Take what the search saw.

        Args:
            constraints: The floors; of those on metrics that count nothing is foreseen.
            trials: Of the search.
        """
        seeds = sorted({score.seed for trial in trials for score in trial.scores})
        self._constraints = [each for each in constraints if not counts(each)]
        metrics = {each.metric for each in self._constraints}
        self._searched = {metric: pattern(metric, trials, seeds) for metric in metrics}
        self._tables: dict[str, list[list[float]]] = {metric: [] for metric in metrics}

    def learn(self, values: Sequence[Mapping[str, float]]) -> None:
        """Take what each prompt of the proof gave under a policy."""
        for metric, table in self._tables.items():
            table.append([level(metric, value[metric]) for value in values])

    def hopeless(self, values: Sequence[Mapping[str, float]]) -> str:
        """Return which floor will hardly be held once all prompts are there, empty if none.

        Args:
            values: Each metric's value, in the order of the proof's prompts; some are missing.
        """
        for constraint in self._constraints:
            scores = [value[constraint.metric] for value in values]
            chance = self._chance(constraint, scores)
            if chance is not None and chance < _FUTILE:
                seen = f"{len(scores)} prompts leave little hope"
                return f"{constraint.name}: {seen} to prove {constraint.floor:g}"
        return ""

    def _chance(self, constraint: Constraint, scores: Sequence[float]) -> float | None:
        """Return how probable it is that a bound holds its floor in the end; None if unknown."""
        usual = self._usual(constraint.metric)
        seen = np.array([level(constraint.metric, score) for score in scores])
        if usual is None or not _FIRST_LOOK <= len(scores) < len(usual.differences):
            return None
        if not np.array_equal(seen, scores):
            return None  # a bound of levels is none of the scores
        differences = np.array(usual.differences)
        count, left = len(seen), len(differences) - len(seen)
        likely = float((seen - differences[:count]).mean()) + differences[count:]
        whole = [*seen.tolist(), *likely.tolist()]
        if constraint.statistic == "worst":
            bound = worst_lower_bound(whole, UNSEEN)
        else:
            bound = lower_bound(constraint, whole)
        sd = usual.sd * math.sqrt(1.0 / count + 1.0 / left) * left / len(whole)
        return float(stats.t.cdf((bound - constraint.floor) / sd, usual.freedom))

    def _usual(self, metric: str) -> Expectation | None:
        """Return how the prompts of the proof differ, None before anything tells."""
        table = np.array(self._tables[metric])
        found = in_common(table) if len(table) else None
        searched = self._searched[metric]
        if found is not None or searched is None or not len(table):
            return found
        return Expectation(
            differences=tuple((table.mean(axis=0) - table.mean()).tolist()),
            sd=searched.sd * math.sqrt(1.0 + 1.0 / len(table)),
            freedom=searched.freedom,
        )
