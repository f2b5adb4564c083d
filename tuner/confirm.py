"""Prove candidates on prompts and seeds that the search never saw.

The fastest candidate whose bounds hold every floor ships. What the search measured says which ones
to look at, and plays no part in the evidence.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from scipy import stats

from ditune.db.policy import Policy
from ditune.db.record import now
from ditune.db.records import (
    Constraint,
    Evidence,
    Interval,
    PolicyFile,
    Profile,
    Quality,
    SearchFigures,
    Trial,
)
from ditune.profiler.statistics import CONFIDENCE, paired_speedup, worst_lower_bound
from ditune.tuner.evaluate import Case, Evaluates, Outcome
from ditune.tuner.outlook import Outlook
from ditune.tuner.quality import UNSEEN, bound_by, lower_bound, summarise

PAIRS_MIN, PAIRS_MOST = 6, 20  # interleaved pairs that a speedup rests on
_WIDE = 0.1  # interval of a speedup, in shares of it, beyond which more pairs are run
_FIRST_LOOK = 4  # prompts after which a candidate may be given up
_FUTILE = 0.05  # chance to hold in the end, below which it is


@dataclass(frozen=True)
class Confirmation:
    """What confirmation found: the winner with its evidence, or nothing."""

    policy: Policy | None
    evidence: Evidence | None
    looked_at: int
    reasons: tuple[str, ...]  # why candidates were passed over


@dataclass(frozen=True)
class Provenance:
    """Where candidates and prompts come from; `trials` are those of the search."""

    study: str
    prompts_digest: str
    trials: Sequence[Trial] = ()


@dataclass(frozen=True)
class Looked:
    """A candidate that was looked at: what it gave, and why it does not ship, if so.

    `values` are those of each metric, prompt by prompt.
    """

    policy: Policy
    values: Sequence[Mapping[str, float]]
    quality: Mapping[str, Quality]
    reason: str


class Candidates(Protocol):
    """Says what to prove next."""

    def next(self, looked: Sequence[Looked]) -> Policy | None:
        """Return the next candidate, faster than all that hold; None ends the proof."""


class Listed:
    """Some policies in order; the first one that holds ends the proof."""

    def __init__(self, policies: Sequence[Policy]) -> None:
        """Take the policies, the fastest first."""
        self._policies = policies

    def next(self, looked: Sequence[Looked]) -> Policy | None:
        """Return the next one."""
        if any(not each.reason for each in looked) or len(looked) == len(self._policies):
            return None
        return self._policies[len(looked)]


class Proof:
    """Measures candidates on prompts that the search never saw."""

    def __init__(
        self,
        evaluator: Evaluates,
        cases: Sequence[Case],
        progress: Callable[[int], None] = lambda _: None,
        trials: Sequence[Trial] = (),
    ) -> None:
        """Take what to measure on.

        Args:
            evaluator: Of the source, with the floors.
            cases: Prompts and seeds that the search never saw.
            progress: Called after every video with their number.
            trials: Of the search: they say how much a policy adds to what prompts give.
        """
        self._evaluator = evaluator
        self._cases = cases
        self._progress = progress
        self._outlook = Outlook(evaluator.constraints, trials)
        self._pairs: dict[str, list[Outcome]] = {}  # by policy
        self._done = 0

    @property
    def constraints(self) -> Sequence[Constraint]:
        """The floors."""
        return self._evaluator.constraints

    def look(self, policy: Policy) -> Looked:
        """Measure the quality of a candidate until it misses a floor, or on all cases.

        Where a plain video has to be made for it, that run makes a pair for its speed.
        """
        constraints, cases = self._evaluator.constraints, self._cases
        outcomes: list[Outcome] = []
        reason = ""
        for case in cases:
            outcomes.append(self._measured(policy, case, not self._evaluator.knows(case)))
            values = [outcome.values for outcome in outcomes]
            reason = missed(constraints, values, len(cases) - len(outcomes))
            reason = reason or self._outlook.hopeless(values)
            if reason:
                break
        self._pairs[policy.id] = [each for each in outcomes if each.baseline_ms is not None]
        values = [outcome.values for outcome in outcomes]
        if len(values) == len(cases):
            self._outlook.learn(values)
        return Looked(policy, values, summarise(constraints, values), reason)

    def timed(self, policy: Policy) -> list[Outcome]:
        """Return the pairs of a candidate that was looked at.

        Those that are missing are run, and on a noisy machine more, until the interval is narrow.
        """
        pairs = self._pairs[policy.id]
        for case in self._cases[len(pairs) : PAIRS_MOST]:
            if len(pairs) >= PAIRS_MIN and _width(pairs) <= _WIDE:
                break
            pairs.append(self._measured(policy, case, True))
        return pairs

    def _measured(self, policy: Policy, case: Case, paired: bool) -> Outcome:
        outcome = self._evaluator.measure(policy, case, paired=paired)
        self._done += 1
        self._progress(self._done)
        return outcome


def confirm(proof: Proof, candidates: Candidates, provenance: Provenance) -> Confirmation:
    """Look at candidates until none is left to look at; the last that held ships.

    Each is faster than those that held before it. So only that one is timed, unless it turns out
    to be no faster than the plain pipeline.

    Args:
        proof: Measures them.
        candidates: Say what is next.
        provenance: Goes into the evidence.
    """
    looked: list[Looked] = []
    while True:
        while (policy := candidates.next(looked)) is not None:
            looked.append(proof.look(policy))
        held = [number for number, each in enumerate(looked) if not each.reason]
        if not held:
            return Confirmation(None, None, len(looked), _reasons(looked))
        best = looked[held[-1]]
        pairs = proof.timed(best.policy)
        if _speedup(pairs).ci95[0] > 1.0:
            evidence = evidence_of(proof.constraints, best, pairs, len(looked), provenance)
            return Confirmation(best.policy, evidence, len(looked), _reasons(looked))
        slow = "it is not certainly faster than the plain pipeline"
        looked[held[-1]] = replace(best, reason=slow)


def _reasons(looked: Sequence[Looked]) -> tuple[str, ...]:
    return tuple(f"{each.policy.id[7:19]}: {each.reason}" for each in looked if each.reason)


def missed(
    constraints: Sequence[Constraint], values: Sequence[Mapping[str, float]], left: int
) -> str:
    """Return which floor a candidate misses, empty if none (or if it is too early to say).

    Args:
        constraints: The floors.
        values: Each metric's value, case by case.
        left: How many cases are still to come. Where none is, each floor has to hold with its
            bound; before, a candidate is given up that will hardly come to hold one.
    """
    for constraint in constraints:
        scores = [value[constraint.metric] for value in values]
        if constraint.statistic == "worst":
            if min(scores) < constraint.floor:
                return f"{constraint.name} {min(scores):.4g} < {constraint.floor:g}"
            bound = worst_lower_bound(scores, UNSEEN)
        else:
            bound = lower_bound(constraint, scores)
            if left and len(scores) >= _FIRST_LOOK and _chance(constraint, scores, left) < _FUTILE:
                mean = sum(scores) / len(scores)
                return f"{constraint.name} {mean:.4g} is too little to prove {constraint.floor:g}"
        if not left and bound < constraint.floor:
            return f"{constraint.name} is certain only above {bound:.4g}, not {constraint.floor:g}"
    return ""


def _chance(constraint: Constraint, scores: Sequence[float], left: int) -> float:
    """Return how probable it is that a mean's bound holds its floor once all cases are there."""
    bound, most = lower_bound(constraint, scores), -lower_bound(constraint, [-s for s in scores])
    middle, half = (bound + most) / 2.0, (most - bound) / 2.0
    share = len(scores) / (len(scores) + left)
    final = middle - half * math.sqrt(share)  # the bound, should the mean stay
    apart = half / float(stats.norm.ppf(CONFIDENCE)) * math.sqrt(1.0 - share)
    if apart == 0.0:
        return float(final >= constraint.floor)
    return float(stats.norm.cdf((final - constraint.floor) / apart))


def _speedup(pairs: Sequence[Outcome]) -> Interval:
    baseline = [o.baseline_ms for o in pairs if o.baseline_ms is not None]
    return paired_speedup(baseline, [o.tuned_ms for o in pairs])


def _width(pairs: Sequence[Outcome]) -> float:
    """Return how wide the interval of a speedup is, in shares of the speedup."""
    speedup = _speedup(pairs)
    return (speedup.ci95[1] - speedup.ci95[0]) / speedup.median


def evidence_of(
    constraints: Sequence[Constraint],
    found: Looked,
    pairs: Sequence[Outcome],
    looked_at: int,
    provenance: Provenance,
) -> Evidence:
    """Return what a policy was proved to give.

    Args:
        constraints: What was scored.
        found: The policy with its quality.
        pairs: Interleaved with the plain pipeline.
        looked_at: How many policies were measured.
        provenance: Where policy and prompts come from.
    """
    return Evidence(
        speedup=_speedup(pairs),
        baseline_ms=sorted(o.baseline_ms for o in pairs if o.baseline_ms is not None)[
            len(pairs) // 2
        ],
        tuned_ms=sorted(o.tuned_ms for o in pairs)[len(pairs) // 2],
        quality=dict(found.quality),
        bound_by=bound_by(constraints, found.quality),
        candidates=looked_at,
        prompts_digest=provenance.prompts_digest,
        study=provenance.study,
        git_commit=_commit(),
        created_at=now(),
        status="measured",
        search=_search_figures(found.policy, provenance.trials),
    )


def policy_file_of(profile: Profile, policy: Policy, evidence: Evidence) -> PolicyFile:
    """Return a proved policy with all that is needed to find it again.

    Args:
        profile: Of the pipeline that it was proved on.
        policy: What was proved.
        evidence: Of the proof.
    """
    workload = profile.workload
    if policy.handoff is None:  # it serves with and without a small model at hand
        alone = {"small_model_digest": None, "small_model_revision": None}
        workload = workload.model_copy(update=alone)
    return PolicyFile(
        policy_id=policy.id,
        hardware=profile.hardware,
        software=profile.software,
        workload=workload,
        policy=policy,
        evidence=evidence,
    )


def _search_figures(policy: Policy, trials: Sequence[Trial]) -> SearchFigures | None:
    """Return what a search measured of a policy; what was only predicted is left out."""
    if not trials:
        return None
    tried = next((t for t in trials if t.policy == policy and t.quality), None)
    if tried is None:
        return SearchFigures(trials=len(trials), prompts=0, pairs=0, speedup=None, quality={})
    return SearchFigures(
        trials=len(trials),
        prompts=max(quality.n for quality in tried.quality.values()),
        pairs=tried.pairs or 0,
        speedup=tried.speedup if tried.pairs else None,
        quality=tried.quality,
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
