"""A trade-off curve: profile, search without floors, prove what nothing dominates.

Nothing is put in use. Every trial is stored, under a study that no search with floors shares; one
that was interrupted goes on from there.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ditune.db.curve import Curve, CurvePoint
from ditune.db.digest import digest_bytes
from ditune.db.policy import Policy
from ditune.db.record import now
from ditune.db.records import Job, PolicyFile, Profile, Proposer, Study, Trial
from ditune.db.store import Store
from ditune.profiler.parts import forwards_of
from ditune.profiler.record import Recorded
from ditune.tuner.confirm import PAIRS_MIN, Looked, Provenance, evidence_of, policy_file_of
from ditune.tuner.curve_points import Objectives, Proposals, marked, to_prove, unbounded
from ditune.tuner.devices import device_name, require_alone
from ditune.tuner.evaluate import Outcome, cases_of
from ditune.tuner.gauges import GaugedEvaluator
from ditune.tuner.goals import CONFIRM_SEED, search_cases
from ditune.tuner.here import Here
from ditune.tuner.meter import Meter
from ditune.tuner.profiled import profiled
from ditune.tuner.progress import Progress, Quiet
from ditune.tuner.quality import lower_bound, metrics, prepare, require_metric, summarise
from ditune.tuner.result import Options
from ditune.tuner.search import CASES_PER_PAIR
from ditune.tuner.source import Source, prompts_digest
from ditune.tuner.space import Space
from ditune.tuner.studies import settings_of
from ditune.tuner.verdict import trial_of


@dataclass(frozen=True)
class CurveResult:
    """A curve, and a policy file for each of its points, in their order."""

    curve: Curve
    policy_files: tuple[PolicyFile, ...]


class CurveSession:
    """Draws the curve of one source; what it measures goes into one store."""

    def __init__(
        self,
        source: Source,
        store: Store,
        objectives: Objectives,
        options: Options,
        progress: Progress | None = None,
    ) -> None:
        """Check what can be checked before anything runs.

        Args:
            source: The pipeline and its prompts.
            store: Keeps the profile and the trials.
            objectives: What to weigh.
            options: How to search and prove; floors and tiers play no part.
            progress: Shows what happens.

        Raises:
            UsageFault: The metric cannot be used, or the device cannot say what it takes.
        """
        require_metric(objectives.metric)
        prepare([objectives.scored])
        self.source = source
        self.store = store
        self.objectives = objectives
        self.options = options
        self.progress = progress or Quiet()
        self.evaluator = GaugedEvaluator(source, [objectives.scored], objectives.also)
        self.cases = search_cases(source, options, [objectives.scored])
        self.held_out = cases_of(source.held_out, options.confirm_prompts, CONFIRM_SEED)

    def run(self) -> CurveResult:
        """Profile, search and prove; every trial is in the store as soon as it ends.

        Raises:
            UsageFault: Another process draws this curve.
            NotMeasurable: Other programs compute on the device.
        """
        meter = Meter(lambda: self.evaluator.videos)
        evaluator, options = self.evaluator, self.options
        with meter.stage("profile"):
            prompts = options.profile_prompts
            recorded = profiled(evaluator, self.store, prompts, self.cases, self.progress)
        found, space = recorded.profile, self._space(recorded)
        study = self._study(found, space)
        with self.store.jobs.sole_asker(study.name), meter.stage("search"):
            trials = self._search(study, space)
        with meter.stage("confirm"):
            chosen = to_prove(trials, space, self.objectives, options.confirm_candidates)
            provenance = Provenance(study.name, prompts_digest(self.source), trials)
            proved = self._proved(chosen, provenance)
        points = marked(proved, trials[0], self.objectives)
        curve = Curve(
            hardware=found.hardware,
            software=found.software,
            workload=found.workload,
            metric=self.objectives.metric,
            also=self.objectives.also,
            study=study.name,
            plain_ms=found.total_ms,
            search_videos=len(self.cases),
            proof_videos=len(self.held_out),
            trials=tuple(trials),
            points=points,
            cost=meter.cost(forwards_of(found)),
            created_at=now(),
        )
        files = tuple(policy_file_of(found, p.policy, p.evidence) for p in points)
        return CurveResult(curve, files)

    # --- search --------------------------------------------------------------------------------

    def _space(self, recorded: Recorded) -> Space:
        """Return what may be tried: a hand-off changes content, which no reference allows."""
        free = not metrics()[self.objectives.metric].needs_reference
        handing = free and self.source.small is not None
        return Space(recorded.profile, handoff=handing, trajectories=recorded.trajectories)

    def _study(self, found: Profile, space: Space) -> Study:
        """Return the study of the curve; without floors, what is weighed belongs to its space."""
        objectives = self.objectives
        searched = f"curve {objectives.metric} {objectives.also} {space.digest}"
        settings = settings_of(self.evaluator, found, space, self.options.seed)
        own = {"constraints": (), "space": digest_bytes(searched.encode())}
        settings = settings.model_copy(update=own)
        study = Study(name=settings.study, settings=settings, created_at=now())
        self.store.save_study(study)
        return study

    def _search(self, study: Study, space: Space) -> list[Trial]:
        """Return the trials, those of earlier runs first."""
        wanted = self.options.trials
        done = self.store.trials(study.name)
        proposals = Proposals(space, self.objectives, self.options.seed)
        self.progress.update("search", len(done), wanted, study.name)
        while len(done) < wanted and (proposed := proposals.next(done)) is not None:
            trial = self._tried(self._job(study, space, proposed, done))
            self.store.save_trial(trial)
            done.append(trial)
            speedup = trial.speedup or 1.0
            self.progress.update("search", len(done), wanted, f"the last {speedup:.2f}x")
        return done

    def _job(
        self, study: Study, space: Space, proposed: tuple[Policy, Proposer], done: Sequence[Trial]
    ) -> Job:
        policy, source = proposed
        foreseen = space.pace(done).foreseen(policy)
        cases = self.cases
        return Job(
            uuid=uuid.uuid4().hex,
            study=study.name,
            number=len(done),
            source=source,
            policy=policy,
            constraints=self.evaluator.constraints,
            prompts=tuple(case.prompt for case in cases),
            seeds=tuple(case.seed for case in cases),
            pairs=0 if foreseen else max(1, len(cases) // CASES_PER_PAIR),
            expected_speedup=foreseen,
        )

    def _tried(self, job: Job) -> Trial:
        """Evaluate a policy in this process and return the trial, without the floor of the job."""
        require_alone(device_name(self.evaluator.device))
        began, before = time.monotonic(), self.evaluator.videos
        self.evaluator.drain()
        found = Here(self.evaluator).run(job)
        if job.policy == Policy() and self.objectives.also is not None:
            for case in self.cases:  # above, its videos were known already
                self.evaluator.tuned(Policy(), case)
        found = replace(found, videos=self.evaluator.videos - before)
        trial = trial_of(job, found, time.monotonic() - began)
        quality = unbounded(trial.quality)
        return trial.model_copy(update={"quality": quality, "violation": {}, **self._takes()})

    def _takes(self) -> dict[str, Any]:
        """Return what the last videos took, under the name that records have for it."""
        also, takes = self.objectives.also, self.evaluator.drain()
        if also is None or takes is None:
            return {}
        return {"peak_bytes": round(takes)} if also == "memory" else {"energy_j": takes}

    # --- proof ---------------------------------------------------------------------------------

    def _proved(self, chosen: Sequence[Trial], provenance: Provenance) -> list[CurvePoint]:
        """Measure policies one after another on all held-out cases."""
        cases, points = self.held_out, []
        for place, trial in enumerate(chosen):
            require_alone(device_name(self.evaluator.device))
            outcomes = []
            self.evaluator.drain()
            for number, case in enumerate(cases):
                done, total = place * len(cases) + number, len(chosen) * len(cases)
                self.progress.update("confirm", done, total, f"trial {trial.number}, held out")
                paired = number < PAIRS_MIN
                outcomes.append(self.evaluator.measure(trial.policy, case, paired=paired))
            points.append(self._point(trial, outcomes, len(chosen), provenance))
        return points

    def _point(
        self, trial: Trial, outcomes: Sequence[Outcome], looked_at: int, provenance: Provenance
    ) -> CurvePoint:
        """Return what a policy gave in the proof."""
        scored = self.objectives.scored
        values = [outcome.values for outcome in outcomes]
        quality = unbounded(summarise([scored], values))
        looked = Looked(trial.policy, values, quality, "")
        pairs = [outcome for outcome in outcomes if outcome.baseline_ms is not None]
        return CurvePoint(
            trial=trial.number,
            policy_id=trial.policy.id,
            policy=trial.policy,
            evidence=evidence_of([scored], looked, pairs, looked_at, provenance),
            bound=lower_bound(scored, [value[scored.metric] for value in values]),
            dominated=False,  # as long as nothing is known of the others
            **self._takes(),
        )
