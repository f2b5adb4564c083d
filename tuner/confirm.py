"""Prove a candidate on prompts and seeds that the search never saw.

The fastest candidate whose bounds hold every floor ships; the next one is tried otherwise. What the
search measured plays no part in the evidence.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ditune.db.policy import Policy
from ditune.db.records import Constraint, Evidence, Quality, Trial
from ditune.profiler.statistics import paired_speedup, worst_lower_bound
from ditune.tuner.evaluate import Case, Evaluator, Outcome
from ditune.tuner.quality import bound_by, lower_bound, summarise
from ditune.tuner.search import now

UNSEEN = 20  # the worst of so many further prompts should hold its floor too
PAIRS_MIN = 6  # interleaved pairs that a speedup rests on
_FIRST_LOOK = 4  # prompts after which a candidate is given up if it already misses a floor


@dataclass(frozen=True)
class Confirmation:
    """What confirmation found: the winner with its evidence, or nothing."""

    policy: Policy | None
    evidence: Evidence | None
    looked_at: int
    reasons: tuple[str, ...]  # why each earlier candidate was passed over


def confirm(
    evaluator: Evaluator,
    candidates: Sequence[Trial],
    cases: Sequence[Case],
    *,
    prompts_digest: str,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Confirmation:
    """Re-measure candidates, the fastest first, and return the first that holds every floor.

    Quality comes first. Where a plain video has to be made for it, that run makes a pair; a later
    candidate finds the videos there, and takes its pairs only once its quality is proved.

    Args:
        evaluator: Of the same source and constraints as the search.
        candidates: Feasible trials, the fastest first.
        cases: Prompts and seeds that the search never saw.
        prompts_digest: Goes into the evidence.
        progress: Called after every video with the videos done and the most there can be.
    """
    reasons: list[str] = []
    done, most = 0, len(candidates) * (len(cases) + PAIRS_MIN)

    def measured(policy: Policy, case: Case, *, paired: bool) -> Outcome:
        nonlocal done
        outcome = evaluator.measure(policy, case, paired=paired)
        done += 1
        progress(done, most)
        return outcome

    for looked_at, trial in enumerate(candidates, start=1):
        outcomes: list[Outcome] = []
        reason = ""
        for case in cases:
            outcomes.append(measured(trial.policy, case, paired=not evaluator.knows(case)))
            values = [outcome.values for outcome in outcomes]
            reason = missed(evaluator.constraints, values, final=len(outcomes) == len(cases))
            if reason:
                break
        if not reason:
            pairs = [outcome for outcome in outcomes if outcome.baseline_ms is not None]
            missing = max(min(PAIRS_MIN, len(cases)) - len(pairs), 0)
            pairs += [measured(trial.policy, case, paired=True) for case in cases[:missing]]
            evidence = _evidence(evaluator, trial, outcomes, pairs, (looked_at, prompts_digest))
            if evidence.speedup.ci95[0] > 1.0:
                return Confirmation(trial.policy, evidence, looked_at, tuple(reasons))
            reason = "it is not certainly faster than the plain pipeline"
        reasons.append(f"trial {trial.number}: {reason}")
    return Confirmation(None, None, len(candidates), tuple(reasons))


def missed(
    constraints: Sequence[Constraint], values: Sequence[Mapping[str, float]], *, final: bool
) -> str:
    """Return which floor a candidate misses, empty if none (or if it is too early to say).

    Args:
        constraints: The floors.
        values: Each metric's value, case by case.
        final: Whether these are all cases: then each floor has to hold with its bound.
    """
    for constraint in constraints:
        scores = [value[constraint.metric] for value in values]
        if constraint.statistic == "worst":
            if min(scores) < constraint.floor:
                return f"{constraint.name} {min(scores):.4g} < {constraint.floor:g}"
            bound = worst_lower_bound(scores, UNSEEN)
        else:
            bound, mean = lower_bound(constraint, scores), sum(scores) / len(scores)
            if len(scores) >= _FIRST_LOOK and 2.0 * mean - bound < constraint.floor:
                return f"{constraint.name} {mean:.4g} < {constraint.floor:g}"
        if final and bound < constraint.floor:
            return f"{constraint.name} is certain only above {bound:.4g}, not {constraint.floor:g}"
    return ""


def _evidence(
    evaluator: Evaluator,
    trial: Trial,
    outcomes: Sequence[Outcome],
    pairs: Sequence[Outcome],
    origin: tuple[int, str],
) -> Evidence:
    """Return what a policy was proved to give; `origin` is candidates looked at and prompts."""
    baseline = [o.baseline_ms for o in pairs if o.baseline_ms is not None]
    tuned = [o.tuned_ms for o in pairs]
    quality: dict[str, Quality] = summarise(evaluator.constraints, [o.values for o in outcomes])
    return Evidence(
        speedup=paired_speedup(baseline, tuned),
        baseline_ms=sorted(baseline)[len(baseline) // 2],
        tuned_ms=sorted(tuned)[len(tuned) // 2],
        quality=quality,
        bound_by=bound_by(evaluator.constraints, quality),
        candidates=origin[0],
        prompts_digest=origin[1],
        study=trial.study,
        git_commit=_commit(),
        created_at=now(),
        status="measured",
    )


def _commit() -> str | None:
    """Return the commit of the checkout that this file stands in, None where it was installed."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    found = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        timeout=10,
    )
    return found.stdout.strip() or None
