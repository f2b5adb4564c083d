"""The baseline that every policy has to beat: the same pipeline with fewer steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ditune.db.policy import Policy
from ditune.db.records import Interval, Quality
from ditune.profiler.statistics import paired_speedup
from ditune.tuner.evaluate import Case, Evaluator, Outcome
from ditune.tuner.quality import summarise
from ditune.tuner.source import FolderSource

_PAIRS = 3  # interleaved pairs that their speedup rests on


@dataclass(frozen=True)
class FewestSteps:
    """The fewest steps that hold every floor; the full number if no smaller one does."""

    steps: int
    speedup: Interval | None  # None for the full number
    quality: dict[str, Quality]


def fewest_steps(evaluator: Evaluator, cases: Sequence[Case]) -> FewestSteps:
    """Find the fewest steps that hold the floors on some cases, by bisection.

    Quality is taken to fall with every step left out; where it does not, the answer is a number of
    steps that holds, though perhaps not the fewest. Bisection is geometric, because a wrong guess
    costs as many steps as it has.

    Args:
        evaluator: Of the pipeline at its full number of steps.
        cases: Every count is tried on them in order, and given up at the first hopeless one.
    """
    full = int(evaluator.source.call["num_inference_steps"])
    missed, held = 0, full
    best: list[Outcome] = []
    while held - missed > 1:
        middle = min(max(round(math.sqrt(max(missed, 1) * held)), missed + 1), held - 1)
        outcomes = _outcomes(evaluator, cases, middle)
        if outcomes:
            held, best = middle, outcomes
        else:
            missed = middle
    pairs: list[Outcome] = []
    if held < full:
        shorter = _shorter(evaluator, held)
        pairs = [shorter.measure(Policy(), case, paired=True) for case in cases[:_PAIRS]]
    baseline = [o.baseline_ms for o in pairs if o.baseline_ms is not None]
    return FewestSteps(
        steps=held,
        speedup=paired_speedup(baseline, [o.tuned_ms for o in pairs]) if pairs else None,
        quality=summarise(evaluator.constraints, [o.values for o in best]) if best else {},
    )


def _shorter(evaluator: Evaluator, steps: int) -> Evaluator:
    """Return an evaluator of the pipeline with fewer steps that compares with the full number."""
    source = evaluator.source
    call: dict[str, Any] = {**source.call, "num_inference_steps": steps}
    worth = steps / int(source.call["num_inference_steps"])
    return Evaluator(
        FolderSource(source.name, source.pipe, None, call, source.calibration, source.held_out),
        evaluator.constraints,
        plain=evaluator,
        worth=worth,
    )


def _outcomes(evaluator: Evaluator, cases: Sequence[Case], steps: int) -> list[Outcome]:
    """Return the outcomes with fewer steps, empty as soon as a floor is certainly missed."""
    shorter = _shorter(evaluator, steps)
    outcomes: list[Outcome] = []
    for case in cases:
        outcomes.append(shorter.measure(Policy(), case, paired=False))
        quality = summarise(evaluator.constraints, [o.values for o in outcomes])
        for constraint in evaluator.constraints:
            seen = quality[constraint.name]
            certain = constraint.statistic == "worst" or len(outcomes) == len(cases)
            value = seen.mean if constraint.statistic == "mean" else seen.worst
            if certain and value < constraint.floor:
                return []
    return outcomes
