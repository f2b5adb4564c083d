"""Pick out of records the numbers that each figure and table shows; nothing is drawn here.

No statistic is computed: medians, quantiles and intervals are the records' own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ditune.db.policy import (
    Action,
    AdaptiveHandoff,
    BandedHandoff,
    Handoff,
    MaskCache,
    Policy,
)
from ditune.db.records import (
    Constraint,
    Interval,
    LayerTiming,
    PolicyFile,
    Profile,
    Quality,
    Settings,
    Study,
    Trial,
)
from ditune.reports.content import ReportContent
from ditune.reports.words import metric_label, unit_of

Verdict = Literal["feasible", "infeasible", "rejected", "baseline"]
VERDICTS: tuple[Verdict, ...] = ("feasible", "infeasible", "rejected", "baseline")
TRIALS_SHOWN = 500  # a page that lists more is neither small nor readable
_BLOCK = re.compile(r"^(?P<stack>.+)\.(?P<index>\d+)$")


# --- where the time goes ---------------------------------------------------------------------


@dataclass(frozen=True)
class Layers:
    """Layer timings, apart what repeats (blocks) and what does not (parts)."""

    parts: tuple[LayerTiming, ...]
    stacks: dict[str, tuple[LayerTiming, ...]]  # in block order


def layers(profile: Profile) -> Layers:
    """Return the timings of whole parts, and those of numbered blocks per stack."""
    parts: list[LayerTiming] = []
    stacks: dict[str, dict[int, LayerTiming]] = {}
    for layer in profile.layers:
        found = _BLOCK.match(layer.name)
        if found is None:
            parts.append(layer)
        else:
            stacks.setdefault(found["stack"], {})[int(found["index"])] = layer
    in_order = {name: tuple(b for _, b in sorted(found.items())) for name, found in stacks.items()}
    return Layers(tuple(parts), in_order)


# --- where steps repeat, and what is done about it -------------------------------------------


@dataclass(frozen=True)
class Redundancy:
    """Relative change of each step against the one before; None where there is no value."""

    steps: tuple[int, ...]  # counted from 1
    sigma: tuple[float | None, ...]
    lines: dict[str, tuple[float | None, ...]]  # by name, only lines with a value
    disagreement: tuple[float, ...] | None


def redundancy(profile: Profile) -> Redundancy:
    """Return the lines of step, guidance and block change, and the small model's disagreement."""
    seen = profile.redundancy
    lines = {
        "whole step": tuple(step.step_change for step in seen),
        "guidance": tuple(step.cfg_change for step in seen),
        "blocks": tuple(step.block_change for step in seen),
    }
    apart = profile.disagreement
    return Redundancy(
        steps=tuple(step.step + 1 for step in seen),
        sigma=tuple(step.sigma for step in seen),
        lines={name: line for name, line in lines.items() if any(v is not None for v in line)},
        disagreement=apart if apart is not None and len(apart) == len(seen) else None,
    )


@dataclass(frozen=True)
class StripCell:
    """What a policy does at one step."""

    step: int  # counted from 1
    action: Action
    small: bool  # whether the small model runs this step


def strip(policy: Policy, profile: Profile) -> tuple[StripCell, ...]:
    """Return a policy's action per step; empty where it is only decided at run time."""
    sigmas = {seen.step: seen.sigma for seen in profile.redundancy}
    actions: tuple[Action, ...]
    if isinstance(policy.cache, MaskCache):
        actions = policy.cache.actions
    elif policy.cache is None and policy.handoff is not None:  # large or small, all in full
        full: Action = "full"
        actions = (full,) * profile.workload.steps
    else:
        return ()
    if isinstance(policy.handoff, AdaptiveHandoff):
        return ()
    return tuple(
        StripCell(step + 1, action, _is_small(sigmas.get(step), policy.handoff))
        for step, action in enumerate(actions)
    )


def runs(cells: tuple[StripCell, ...]) -> list[tuple[int, int, StripCell]]:
    """Return stretches of equal steps as first step, last step and one of the cells."""
    found: list[tuple[int, int, StripCell]] = []
    for cell in cells:
        if found and (found[-1][2].action, found[-1][2].small) == (cell.action, cell.small):
            found[-1] = (found[-1][0], cell.step, cell)
        else:
            found.append((cell.step, cell.step, cell))
    return found


def _is_small(sigma: float | None, handoff: Handoff | BandedHandoff | None) -> bool:
    return sigma is not None and handoff is not None and handoff.takes(sigma)


# --- what was tried --------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One way to leave work out, and the fastest trial of it that held; None if none did."""

    name: str
    tried: int
    fastest: Trial | None


def ways(trials: tuple[Trial, ...]) -> tuple[Way, ...]:
    """Return caches, hand-offs and both beside each other; empty where nothing handed over."""
    names = {
        (True, False): "cache only",
        (False, True): "hand-off only",
        (True, True): "both",
    }
    found: dict[str, list[Trial]] = {name: [] for name in names.values()}
    for trial in trials:
        policy = trial.policy
        if policy != Policy():
            found[names[policy.cache is not None, policy.handoff is not None]].append(trial)
    if not found["hand-off only"] and not found["both"]:
        return ()
    return tuple(Way(name, len(each), _fastest(each)) for name, each in found.items())


def _fastest(trials: Sequence[Trial]) -> Trial | None:
    held = [trial for trial in trials if trial.feasible and trial.speedup is not None]
    return max(held, key=lambda trial: trial.speedup or 0.0, default=None)


@dataclass(frozen=True)
class Point:
    """One trial in the plane of speedup and quality."""

    trial: Trial
    verdict: Verdict
    speedup: float
    quality: float


@dataclass(frozen=True)
class Scatter:
    """Every listed trial that has both numbers, and how the chosen policy did."""

    constraint: Constraint | None  # whose metric is the vertical axis
    points: tuple[Point, ...]
    left_out: int  # of the trials listed, those without a speedup or without this metric
    ringed: Point | None  # the trial of the chosen policy, as the search saw it
    confirmed: tuple[Interval, float] | None  # its speedup and quality on unseen prompts


def scatter(content: ReportContent) -> Scatter:
    """Return the trials as points of speedup against the first quality that was asked for."""
    constraint = shown_constraint(content.study)
    trials = listed(content.trials)
    points = [_point(trial, constraint) for trial in trials] if constraint else []
    placed = tuple(point for point in points if point is not None)
    wanted = content.chosen.policy_id if content.chosen is not None else None
    own = [p for p in placed if p.trial.policy.id == wanted and p.trial.source != "confirmation"]
    return Scatter(
        constraint=constraint,
        points=placed,
        left_out=len(trials) - len(placed),
        ringed=own[0] if own else None,
        confirmed=_confirmed(content.chosen, constraint),
    )


def shown_constraint(study: Study) -> Constraint | None:
    """Return the constraint that the scatter shows: mean PSNR, or else the first."""
    constraints = study.settings.constraints
    psnr = [c for c in constraints if c.name == "psnr"]
    return next(iter([*psnr, *constraints]), None)


def verdict(trial: Trial) -> Verdict:
    """Return how a trial ended; one that tried the plain pipeline is the baseline."""
    if trial.source == "baseline" or trial.policy == Policy():
        return "baseline"
    if trial.state != "complete":
        return "rejected"
    return "feasible" if trial.feasible else "infeasible"


def bounded_value(constraint: Constraint, quality: Quality) -> float:
    """Return the statistic that a constraint bounds."""
    return quality.mean if constraint.statistic == "mean" else quality.worst


def listed(trials: tuple[Trial, ...]) -> tuple[Trial, ...]:
    """Return the trials that a page lists: all, or the best ones if they are too many, in order."""
    if len(trials) <= TRIALS_SHOWN:
        return trials
    best = sorted(trials, key=lambda t: (not t.feasible, -(t.speedup or 0.0)))[:TRIALS_SHOWN]
    return tuple(sorted(best, key=lambda t: t.number))


def best_seen(content: ReportContent) -> Trial | None:
    """Return the trial that came nearest: the fastest that held the floors, or missed by least."""
    tried = [t for t in content.trials if verdict(t) != "baseline" and t.speedup is not None]
    held = [t for t in tried if t.feasible]
    if held:
        return max(held, key=lambda t: t.speedup or 0.0)
    missed = [t for t in tried if t.violation and t.state == "complete"]
    return min(missed, key=lambda t: max(t.violation.values())) if missed else None


def _point(trial: Trial, constraint: Constraint | None) -> Point | None:
    seen = trial.quality.get(constraint.name) if constraint is not None else None
    if seen is None or constraint is None or trial.speedup is None:
        return None
    return Point(trial, verdict(trial), trial.speedup, bounded_value(constraint, seen))


def _confirmed(
    chosen: PolicyFile | None, constraint: Constraint | None
) -> tuple[Interval, float] | None:
    if chosen is None or constraint is None or constraint.name not in chosen.evidence.quality:
        return None
    evidence = chosen.evidence
    return evidence.speedup, bounded_value(constraint, evidence.quality[constraint.name])


# --- what the chosen policy is worth ---------------------------------------------------------


@dataclass(frozen=True)
class QualityRow:
    """One metric of a policy, beside what was asked for."""

    label: str
    unit: str
    statistic: Literal["mean", "worst"]  # which of the two the floor bounds
    quality: Quality
    floor: float | None
    held: bool | None  # the bounded value is not below the floor; None without a floor
    binds: bool  # the constraint with the least room left


def quality_rows(
    settings: Settings, quality: Mapping[str, Quality], bound_by: str | None = None
) -> tuple[QualityRow, ...]:
    """Return every metric that has a value: first those asked for, in that order, then the rest."""
    asked = {c.name: c for c in settings.constraints if c.name in quality}
    names = [*asked, *(name for name in quality if name not in asked)]
    return tuple(_quality_row(n, asked.get(n), quality[n], n == bound_by) for n in names)


def _quality_row(
    name: str, constraint: Constraint | None, quality: Quality, binds: bool
) -> QualityRow:
    if constraint is None:
        return QualityRow(name, "", "mean", quality, None, None, binds)
    return QualityRow(
        label=metric_label(constraint),
        unit=unit_of(constraint),
        statistic=constraint.statistic,
        quality=quality,
        floor=constraint.floor,
        held=bounded_value(constraint, quality) >= constraint.floor,
        binds=binds,
    )
