"""The search loop: ask, evaluate, store, tell.

Results go to our database first and to Optuna second, so that nothing that was measured is lost.
A trial that ran to its end or was rejected early is told as COMPLETE with all its constraints; FAIL
is for faults of the machine.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

import numpy as np
import optuna
from optuna.trial import TrialState

from ditune.db.policy import Policy
from ditune.db.records import Constraint, Trial
from ditune.profiler.statistics import CONFIDENCE, paired_speedup
from ditune.tuner.evaluate import Case, Evaluator, Outcome
from ditune.tuner.ladders import Ladders
from ditune.tuner.pace import Pace
from ditune.tuner.quality import counts, lower_bound, summarise
from ditune.tuner.space import Proposal, Space

_CASES_PER_PAIR = 8  # of a trial, at least one pair; confirmation takes one per prompt
_STARTUP_TRIALS = 8
_REPEATS = 50  # known policies in a row, after which there is nothing new to be found
_POLICY = "policy"  # of a trial whose parameters only come close to it
_MARGIN = 0.8  # confidence of the bound that a mean counts with


class TrialStore(Protocol):
    """Where trials are kept: `db.store.Store`, or a scripted one in tests."""

    def save_trial(self, trial: Trial) -> None:
        """Keep a trial; saving it twice changes nothing."""

    def trials(self, study: str) -> list[Trial]:
        """Return the trials of a study by number."""


@dataclass(frozen=True)
class Budget:
    """How long to search: a number of trials, and seconds on a clock that nobody can set back."""

    trials: int
    seconds: float = float("inf")


def now() -> str:
    """Return the time of day as our records hold it."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


class Search:
    """One study: its space, its evaluator, its two memories."""

    def __init__(
        self, name: str, space: Space, evaluator: Evaluator, cases: Sequence[Case], seed: int
    ) -> None:
        """Prepare a study; `open` connects it to its memories."""
        self.name = name
        self.space = space
        self.evaluator = evaluator
        self.cases = list(cases)
        self._ladders = Ladders(space)
        self._sampler = optuna.samplers.GPSampler(
            seed=seed, deterministic_objective=False, n_startup_trials=_STARTUP_TRIALS
        )
        self._chance = optuna.samplers.RandomSampler(seed=seed)

    def open(self, storage_url: str, store: TrialStore) -> None:
        """Create or reopen the study; trials that a dead process left running are closed."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.store = store
        self.study = optuna.create_study(
            study_name=self.name,
            storage=storage_url,
            sampler=self._sampler,
            direction="minimize",
            load_if_exists=True,
        )
        fresh = not self.study.trials
        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            self.study.tell(trial.number, state=TrialState.FAIL)
        if fresh:
            self._enqueue(self.space.baseline())

    def run(self, budget: Budget, progress: Callable[[Trial, int], None]) -> list[Trial]:
        """Evaluate until the budget is spent; trials of earlier runs of the study count.

        Args:
            budget: Policies in all, and seconds for this run.
            progress: Called after every trial with it and the number of trials so far.
        """
        started = time.monotonic()
        done = self.store.trials(self.name)
        repeats = 0
        while len(done) < budget.trials and time.monotonic() - started < budget.seconds:
            trial, known = self._one(done, by_chance=repeats > 0)
            repeats = repeats + 1 if known else 0
            if repeats == _REPEATS:
                break
            if not known:
                done.append(trial)
                progress(trial, len(done))
        return done

    def _one(self, done: Sequence[Trial], *, by_chance: bool) -> tuple[Trial, bool]:
        """Ask, evaluate, store, tell; return the trial, and whether it was known already.

        Many points spell the same policy. A sampler that asks for a known one is told what is
        known, which costs nothing and is no trial; `by_chance` then keeps it from asking again.
        """
        self._propose(done)
        self.study.sampler = self._chance if by_chance else self._sampler
        asked = self.study.ask(self.space.distributions)
        explicit = asked.user_attrs.get(_POLICY)
        policy = (
            Policy.model_validate_json(explicit) if explicit else self.space.policy(asked.params)
        )
        known = next((t for t in done if t.policy.id == policy.id), None)
        trial = known or self._tried(policy, asked, len(done))
        if known is None:
            self.store.save_trial(trial)
        for name, violation in trial.violation.items():
            asked.set_constraint(name, violation)
        pace = Pace([*done, trial], self.space.sigmas)
        self.study.tell(asked, 1.0 / pace.speedup(trial))
        return trial, known is not None

    def _propose(self, done: Sequence[Trial]) -> None:
        """Queue the next proposal, unless something waits already or enough is known."""
        if self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            return
        proposal = self._ladders.next(done)
        if proposal is not None:
            self._enqueue(proposal)

    def _enqueue(self, proposal: Proposal) -> None:
        attributes: dict[str, str] = {"source": proposal.source}
        if proposal.policy is not None:
            attributes[_POLICY] = proposal.policy.model_dump_json()
        self.study.enqueue_trial(proposal.parameters, user_attrs=attributes)

    def _tried(self, policy: Policy, asked: optuna.Trial, number: int) -> Trial:
        """Evaluate a policy; the plain pipeline is known without running it against itself."""
        started = time.monotonic()
        constraints = self.evaluator.constraints
        speedup, work_ratio, rejected, reason = 1.0, 1.0, False, ""
        if policy == Policy():
            values = [self.evaluator.plain_values(case) for case in self.cases]
        else:
            outcomes = self._outcomes(policy)
            values = [outcome.values for outcome in outcomes]
            speedup = search_speedup(outcomes)
            work_ratio = float(np.median([o.summary.work_ratio for o in outcomes]))
            rejected = len(outcomes) < len(self.cases)
            reason = (hopeless if rejected else missed_for_sure)(constraints, values)
        return Trial(
            uuid=uuid.uuid4().hex,
            study=self.name,
            number=number,
            source=asked.user_attrs.get("source", "search"),
            policy=policy,
            state="rejected" if rejected else "complete",
            speedup=speedup,
            work_ratio=work_ratio,
            quality=summarise(constraints, values),
            violation=violations(constraints, values),
            reason=reason or None,
            duration_s=time.monotonic() - started,
            created_at=now(),
        )

    def _outcomes(self, policy: Policy) -> list[Outcome]:
        """Run a policy on the cases, until it is certain that it misses a floor."""
        constraints = self.evaluator.constraints
        return list(
            self.evaluator.run(
                policy,
                self.cases,
                pairs=max(1, len(self.cases) // _CASES_PER_PAIR),
                stop=lambda seen: bool(hopeless(constraints, [each.values for each in seen])),
            )
        )


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
            seen = lower_bound(constraint, scores, _MARGIN)
        missed[constraint.name] = (constraint.floor - seen) / max(abs(constraint.floor), 1e-3)
    return missed


def hopeless(constraints: Sequence[Constraint], values: Sequence[Mapping[str, float]]) -> str:
    """Return why a trial cannot hold its floors whatever comes, empty if it still can.

    A worst prompt below its floor cannot be undone. A mean is given up after two prompts that both
    miss it by a tenth, or, where the metric counts, once its upper bound misses it.
    """
    for constraint in constraints:
        scores = [value[constraint.metric] for value in values]
        if constraint.statistic == "worst" and min(scores) < constraint.floor:
            return f"{constraint.name}: a prompt gave {min(scores):.3g}, below {constraint.floor:g}"
        if constraint.statistic == "worst":
            continue
        most, lost = max(scores), constraint.floor - 0.1 * abs(constraint.floor)
        if counts(constraint):
            most, lost = _most(constraint, scores, CONFIDENCE), constraint.floor
        if len(scores) >= 2 and most < lost:
            return f"{constraint.name}: {len(scores)} prompts stay below {lost:.3g}"
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
        if not unlucky or _most(constraint, scores, _MARGIN) < constraint.floor:
            return f"{constraint.name}: {len(scores)} prompts miss {constraint.floor:g}"
    return ""


def _most(constraint: Constraint, scores: Sequence[float], confidence: float) -> float:
    """Return the one-sided upper bound of a metric's mean."""
    return -lower_bound(constraint, [-score for score in scores], confidence)
