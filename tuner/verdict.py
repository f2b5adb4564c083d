"""From what an evaluation gave to the trial that is kept: arithmetic over values and floors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ditune.db.policy import MaskCache
from ditune.db.record import now
from ditune.db.records import Constraint, Expectation, Job, Score, Trial
from ditune.profiler.statistics import CONFIDENCE, paired_speedup
from ditune.tuner.quality import MARGIN, counts, lower_bound, summarise
from ditune.tuner.sequential import guessed, shortfall, will_miss

if TYPE_CHECKING:
    from ditune.tuner.evaluate import Outcome

_UNFIT = 1.0  # by how much a policy that cannot run misses each floor, relative to it
_RULES_VARY = 1.25  # by how much more a rule may leave out of one video than of another


@dataclass(frozen=True)
class Found:
    """What evaluating a policy gave: each metric's value, case by case, and its speed.

    There are fewer values than cases where it was given up. `unfit` says why it cannot run here;
    then there are none. `pairs` is how many the speedup rests on; without any it is what the work
    left out allows. `videos` is how many plain ones' worth of compute it took.
    """

    values: tuple[dict[str, float], ...]
    speedup: float = 1.0
    work_ratio: float = 1.0
    unfit: str = ""
    pairs: int = 0
    videos: float | None = None


def trial_of(job: Job, found: Found, duration_s: float) -> Trial:
    """Return the trial that a job ends with.

    A policy that cannot run (too little memory, an error of the pipeline) misses every floor by a
    finite amount and is as slow as the plain pipeline: a sampler learns to keep away from it, and
    no value is so extreme that it spoils what it learnt of others.
    """
    if found.unfit:
        judged = _unfit(job.constraints)
        judged["reason"] = f"it cannot run here: {found.unfit}"
    else:
        whole = len(found.values) == len(job.prompts)
        judged = _judged(job.constraints, found.values, job.expected, whole=whole)
        if not whole:
            judged["reason"] = given_up(job, found.values, found.work_ratio) or None
    return Trial(
        uuid=job.uuid,
        study=job.study,
        number=job.number,
        source=job.source,
        policy=job.policy,
        speedup=(not found.pairs and job.expected_speedup) or found.speedup,
        pairs=found.pairs,
        work_ratio=found.work_ratio,
        scores=tuple(
            Score(seed=seed, values=values)
            for seed, values in zip(job.seeds, found.values, strict=False)
        ),
        duration_s=duration_s,
        created_at=now(),
        videos=found.videos,
        **judged,
    )


def imagined(job: Job, *, holds: bool) -> Trial:
    """Return the trial that a job may end with; only ladders see it."""
    violation: dict[str, float] = {c.name: -1.0 if holds else 1.0 for c in job.constraints}
    return Trial(
        uuid=job.uuid,
        study=job.study,
        number=job.number,
        source=job.source,
        policy=job.policy,
        state="complete" if holds else "rejected",
        speedup=1.0,
        work_ratio=1.0,
        quality={},
        violation=violation,
        reason=None if holds else "imagined",
        duration_s=0.0,
        created_at=now(),
    )


def rejudged(
    trial: Trial, constraints: Sequence[Constraint], seeds: Collection[int]
) -> Trial | None:
    """Return what a trial of another search says under other floors, without running anything.

    One that was given up under floors that these do not repeat stays rejected, without a reason:
    see `undecided`. None where the machine failed, or where not all metrics were scored.

    Args:
        trial: It keeps its uuid, its study and its number.
        constraints: The floors.
        seeds: Of the videos that a trial under these floors takes.
    """
    if trial.state == "rejected" and not trial.quality:  # it cannot run, whatever the floors
        return trial.model_copy(update=_unfit(constraints))
    metrics = {constraint.metric for constraint in constraints}
    scores = tuple(score for score in trial.scores if score.seed in seeds)
    values = [score.values for score in scores]
    if trial.state == "failed" or not values or any(metrics - each.keys() for each in values):
        return None
    whole = trial.state == "complete" and len(values) == len(seeds)
    judged = _judged(constraints, values, guessed(constraints, len(seeds)), whole=whole)
    return trial.model_copy(update={"scores": scores, **judged})


def undecided(trial: Trial) -> bool:
    """Whether a trial was given up under other floors than those that it is looked at with."""
    return trial.state == "rejected" and trial.reason is None


def with_known(known: Sequence[Trial], trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials of a search after those of others; of a policy in both its own one counts.

    Args:
        known: Of other searches, judged under the same floors.
        trials: Of this one.
    """
    tried = {trial.policy.id for trial in trials}
    return [*(trial for trial in known if trial.policy.id not in tried), *trials]


def _judged(
    constraints: Sequence[Constraint],
    values: Sequence[Mapping[str, float]],
    expected: Mapping[str, Expectation],
    *,
    whole: bool,
) -> dict[str, Any]:
    """Return what values mean under some floors, as fields of a trial."""
    missed = violations(constraints, values)
    reason = missed_for_sure(constraints, values)
    if not whole:
        reason = hopeless(constraints, values, expected)
    return {
        "state": "complete" if whole else "rejected",
        "quality": summarise(constraints, values),
        "violation": missed | _foreseen(constraints, values, expected, missed),
        "reason": reason or None,
    }


def _unfit(constraints: Sequence[Constraint]) -> dict[str, Any]:
    """Return what it means that a policy cannot run, but for the reason."""
    missed = {constraint.name: _UNFIT for constraint in constraints}
    return {"state": "rejected", "quality": {}, "violation": missed}


def search_speedup(outcomes: Sequence[Outcome]) -> float:
    """Return the median speedup of the pairs, but no more than the work that was left out allows.

    With few pairs on a shared machine a lucky ratio would otherwise lead the sampler astray. A
    trial that was given up before its pair is taken to be as fast as its work suggests; blocks of
    two sizes do not add up, so that a hand-off is then compared with the reference videos.
    """
    work_ratio = max(o.summary.work_ratio for o in outcomes)
    small = any(o.summary.small_forwards for o in outcomes)
    pairs = [(o.baseline_ms, o.tuned_ms) for o in outcomes if o.baseline_ms is not None]
    if not pairs and small:
        pairs = [(o.earlier_ms, o.tuned_ms) for o in outcomes if o.earlier_ms is not None]
    if not pairs:
        return work_ratio
    measured = paired_speedup([b for b, _ in pairs], [t for _, t in pairs]).median
    return measured if small else min(measured, work_ratio)


def violations(
    constraints: Sequence[Constraint], values: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """Return by how much each constraint is missed, relative to its floor; <= 0 holds it.

    A mean counts with its one-sided 80 % bound: the search leans on every lucky sample that it
    finds, and a candidate that cannot be confirmed costs videos. Confirmation asks for 95 % of many
    more prompts; with three, that would be a margin of many decibels. Of metrics that count, the
    mean itself counts: on a few dozen prompts every difference would fail its bound.
    """
    missed = {}
    for constraint in constraints:
        scores = [value[constraint.metric] for value in values]
        if constraint.statistic == "worst":
            seen = min(scores)
        elif counts(constraint):
            seen = float(np.mean(scores))
        else:
            seen = lower_bound(constraint, scores, MARGIN)
        missed[constraint.name] = (constraint.floor - seen) / max(abs(constraint.floor), 1e-3)
    return missed


def given_up(job: Job, values: Sequence[Mapping[str, float]], work_ratio: float) -> str:
    """Return why a job needs no further prompts, empty if it does.

    Args:
        job: It says what is known of its study.
        values: Each metric's value, of the prompts so far.
        work_ratio: Blocks asked for / blocks run.
    """
    reason = hopeless(job.constraints, values, job.expected)
    if reason or job.faster_than is None:
        return reason
    most = work_ratio if isinstance(job.policy.cache, MaskCache) else _RULES_VARY * work_ratio
    if most < job.faster_than:
        return f"it is slower than what is known to hold: at most {most:.3g}x by its work"
    return ""


def _foreseen(
    constraints: Sequence[Constraint],
    values: Sequence[Mapping[str, float]],
    expected: Mapping[str, Expectation],
    seen: Mapping[str, float],
) -> dict[str, float]:
    """Return by how much floors will be missed that the prompts so far, easy ones, still hold.

    Otherwise what was given up would be taken for something that holds.
    """
    found = {}
    for constraint in constraints:
        scores = [value[constraint.metric] for value in values]
        if seen[constraint.name] <= 0.0 and will_miss(
            constraint, scores, expected, len(constraints)
        ):
            pattern = expected[constraint.metric]
            found[constraint.name] = shortfall(constraint, scores, pattern)
    return found


def hopeless(
    constraints: Sequence[Constraint],
    values: Sequence[Mapping[str, float]],
    expected: Mapping[str, Expectation],
) -> str:
    """Return why a trial cannot hold its floors, empty if it still may.

    A worst prompt below its floor cannot be undone. What the other prompts will give is foreseen
    with a stated error; where the metric counts, a trial is given up once its upper bound misses.
    """
    for constraint in constraints:
        name, floor = constraint.name, constraint.floor
        scores = [value[constraint.metric] for value in values]
        if constraint.statistic == "worst" and min(scores) < floor:
            return f"{name}: a prompt gave {min(scores):.3g}, below {floor:g}"
        if will_miss(constraint, scores, expected, len(constraints)):
            return f"{name}: after {len(scores)} of its prompts it will miss {floor:g}"
        if constraint.statistic == "worst" or not counts(constraint) or len(scores) < 2:
            continue
        if _most(constraint, scores, CONFIDENCE) < floor:
            return f"{name}: {len(scores)} prompts stay below {floor:.3g}"
    return ""


def missed_for_sure(
    constraints: Sequence[Constraint], values: Sequence[Mapping[str, float]]
) -> str:
    """Return which floor a complete trial misses, empty if none or if it may have been unlucky.

    Of a metric that counts, a few dozen videos say little: a policy without any loss misses its
    floor every fourth time. So that a search does not turn away from it, the 80 % bound of what it
    may give has to miss.
    """
    missed = violations(constraints, values)
    for constraint in constraints:
        if missed[constraint.name] <= 0:
            continue
        scores = [value[constraint.metric] for value in values]
        unlucky = constraint.statistic == "mean" and counts(constraint)
        if not unlucky or _most(constraint, scores, MARGIN) < constraint.floor:
            return f"{constraint.name}: {len(scores)} prompts miss {constraint.floor:g}"
    return ""


def _most(constraint: Constraint, scores: Sequence[float], confidence: float) -> float:
    """Return the one-sided upper bound of a metric's mean."""
    return -lower_bound(constraint, [-score for score in scores], confidence)
