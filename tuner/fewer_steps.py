"""The baseline that every policy has to beat: the same pipeline with fewer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ditune.db.records import Interval, Policy, Quality
from ditune.profiler.statistics import paired_speedup
from ditune.tuner.evaluate import Case, Evaluator, Outcome
from ditune.tuner.quality import summarise
from ditune.tuner.source import FolderSource


@dataclass(frozen=True)
class FewestSteps:
    """The fewest steps that hold every floor; the full number if no smaller one does."""

    steps: int
    speedup: Interval | None  # None for the full number
    quality: dict[str, Quality]


def fewest_steps(evaluator: Evaluator, cases: Sequence[Case]) -> FewestSteps:
    """Find the fewest steps that hold the floors on some cases, by bisection.

    Quality is taken to fall with every step left out; where it does not, the answer is a number of
    steps that holds, though perhaps not the fewest.

    Args:
        evaluator: Of the pipeline at its full number of steps.
        cases: Every count is tried on them in order, and given up at the first hopeless one.
    """
    full = int(evaluator.source.call["num_inference_steps"])
    low, high = 1, full
    while high - low > 1:
        middle = (low + high) // 2
        if _outcomes(evaluator, cases, middle, paired=False):
            high = middle
        else:
            low = middle
    best = _outcomes(evaluator, cases, high, paired=True) if high < full else []
    pairs = [(o.baseline_ms, o.tuned_ms) for o in best if o.baseline_ms is not None]
    return FewestSteps(
        steps=high,
        speedup=paired_speedup([b for b, _ in pairs], [t for _, t in pairs]) if pairs else None,
        quality=summarise(evaluator.constraints, [o.values for o in best]) if best else {},
    )


def _outcomes(
    evaluator: Evaluator, cases: Sequence[Case], steps: int, *, paired: bool
) -> list[Outcome]:
    """Return the outcomes with fewer steps, empty as soon as a floor is certainly missed."""
    source = evaluator.source
    call: dict[str, Any] = {**source.call, "num_inference_steps": steps}
    shorter = Evaluator(
        FolderSource(source.name, source.pipe, None, call, source.calibration, source.held_out),
        evaluator.constraints,
        plain=evaluator,
    )
    outcomes: list[Outcome] = []
    for case in cases:
        outcomes.append(shorter.measure(Policy(), case, paired=paired))
        quality = summarise(evaluator.constraints, [o.values for o in outcomes])
        for constraint in evaluator.constraints:
            seen = quality[constraint.name]
            certain = constraint.statistic == "worst" or len(outcomes) == len(cases)
            value = seen.mean if constraint.statistic == "mean" else seen.worst
            if certain and value < constraint.floor:
                return []
    return outcomes
