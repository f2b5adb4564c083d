"""Prompts taken one by one: when those seen say that a floor will be missed, with a stated error.

Some prompts are hard under every policy. The complete trials of a study show by how much, and how
little of its own a policy adds to that; so the first prompts tell what the others will give. Of all
trials that would hold their floors, at most five in a hundred are given up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from ditune.db.policy import Policy
from ditune.db.records import Constraint, Expectation, Trial
from ditune.profiler.statistics import mean_below
from ditune.tuner.quality import MARGIN, counts, in_decibels

_REJECTED_WRONGLY = 0.05  # of the trials that would hold, shared by all looks and floors
_FEWEST = 3  # complete trials that tell how prompts differ
_APART_DB, _FREEDOM = 4.0, 30  # between prompts, while nothing is known of them
_FAR, _GRID = 4.0, 201  # what the other prompts may give is looked at from so far down, in so many


def guessed(constraints: Sequence[Constraint], prompts: int) -> dict[str, Expectation]:
    """Return what to expect of metrics that have decibels before anything is known, cautiously."""
    guess = Expectation(differences=(0.0,) * prompts, sd=_APART_DB, freedom=_FREEDOM)
    metrics = {c.metric for c in constraints if not counts(c)}
    return {metric: guess for metric in metrics if in_decibels(metric) is not None}


def expectations(
    constraints: Sequence[Constraint], trials: Sequence[Trial], seeds: Sequence[int]
) -> dict[str, Expectation]:
    """Return how each metric usually differs between prompts, guessed until three trials tell.

    The level of a video is taken to be the sum of its policy's, its prompt's, and a rest. Metrics
    that are not expected to do anything are left out.

    Args:
        constraints: They name the metrics; those that count have no such pattern.
        trials: Of one study.
        seeds: Of the videos, in the order in which the next job takes them.
    """
    found = guessed(constraints, len(seeds))
    for metric in {c.metric for c in constraints if not counts(c)}:
        learnt = pattern(metric, trials, seeds)
        if learnt is not None:
            found[metric] = learnt
    return found


def pattern(metric: str, trials: Sequence[Trial], seeds: Sequence[int]) -> Expectation | None:
    """Return how a metric differs between videos in the complete trials, None if too few tell.

    Args:
        metric: One that does not count.
        trials: Of one study.
        seeds: Of the videos, in the order that is wanted.
    """
    if not seeds:
        return None
    whole = [t for t in trials if t.state == "complete" and t.policy != Policy()]
    tables = [{s.seed: level(metric, s.values[metric]) for s in t.scores} for t in whole]
    rows = [[table[seed] for seed in seeds] for table in tables if table.keys() == set(seeds)]
    return in_common(np.array([row for row in rows if np.ptp(row) > 0.0]))


def will_miss(
    constraint: Constraint,
    scores: Sequence[float],
    expected: Mapping[str, Expectation],
    floors: int,
) -> bool:
    """Return whether a floor will be missed once all prompts are there; False if it may hold.

    Args:
        constraint: With the floor.
        scores: Seen so far, in the order of the job.
        expected: How each metric differs between prompts; of others nothing is foreseen.
        floors: How many are asked about in all. They share the error evenly, and so do the looks:
            one after each prompt but the last.
    """
    usual = expected.get(constraint.metric)
    if usual is None or len(scores) >= len(usual.differences):
        return False
    wrongly = _REJECTED_WRONGLY / floors / (len(usual.differences) - 1)
    floor = level(constraint.metric, constraint.floor)
    return _best(constraint, scores, usual, wrongly) < floor


def shortfall(constraint: Constraint, scores: Sequence[float], usual: Expectation) -> float:
    """Return by how much a floor will probably be missed, relative to it, both as levels."""
    floor = level(constraint.metric, constraint.floor)
    return (floor - _best(constraint, scores, usual, 0.5)) / max(abs(floor), 1e-3)


def level(metric: str, score: float) -> float:
    """Return a score in decibels where its metric has a level in them, else as it is."""
    found = in_decibels(metric)
    return score if found is None else found(score)


def _best(
    constraint: Constraint, scores: Sequence[float], usual: Expectation, wrongly: float
) -> float:
    """Return the most that a constraint may come to, but for the given probability; a level.

    The policy's own level, as the seen prompts show it, is what the others share: they all may give
    more than expected, or less. For the mean counts the best of what they may give, since a single
    high value widens its bound.
    """
    seen = np.array([level(constraint.metric, score) for score in scores])
    differences = np.array(usual.differences)
    count, left = len(seen), len(differences) - len(seen)
    likely = float((seen - differences[:count]).mean()) + differences[count:]
    reach = float(stats.t.ppf(1.0 - wrongly, usual.freedom)) * usual.sd
    if constraint.statistic == "worst":
        return float(likely.min()) + reach * math.sqrt(1.0 / count + 1.0)
    shifts = reach * math.sqrt(1.0 / count + 1.0 / left) * np.linspace(-_FAR, 1.0, _GRID)
    whole = np.hstack([np.tile(seen, (_GRID, 1)), likely + shifts[:, None]])
    bounds = whole.mean(axis=1)
    if np.array_equal(seen, scores):
        # elsewhere a level bends: only that its mean is no less than that of the scores is certain
        bounds -= mean_below(len(differences), MARGIN) * whole.std(axis=1, ddof=1)
    return float(bounds.max())


def in_common(table: np.ndarray) -> Expectation | None:
    """Return what the levels of some trials [trials, prompts] have in common, None if too little.

    The standard deviation counts what is not known of the differences themselves, so that the
    distribution of Student is exact where the rest is normal.
    """
    if len(table) < _FEWEST or table.shape[1] < 2:
        return None
    differences = table.mean(axis=0) - table.mean()
    rest = table - table.mean(axis=1, keepdims=True) - differences
    trials, freedom = len(table), (len(table) - 1) * (table.shape[1] - 1)
    sd = math.sqrt(float(np.square(rest).sum()) / freedom * (1.0 + 1.0 / trials))
    if sd == 0.0:
        return None
    return Expectation(differences=tuple(differences.tolist()), sd=sd, freedom=freedom)
