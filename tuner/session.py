"""One tuning session: profile, search, confirm, save; the way of the data from end to end."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext

import numpy as np

from ditune.accel.apply import accelerate
from ditune.db.errors import StoreFault, UsageFault
from ditune.db.record import now
from ditune.db.records import PolicyFile, Profile, Settings, Study, Trial
from ditune.db.store import Store
from ditune.profiler.parts import forwards_of
from ditune.tuner.confirm import PAIRS_MIN, Confirmation, Proof, Provenance, confirm, policy_file_of
from ditune.tuner.contenders import to_prove
from ditune.tuner.crew import Crew
from ditune.tuner.elsewhere import Elsewhere, crew_of, first_note, limit_s, require_shared
from ditune.tuner.evaluate import Case, Evaluator, cases_of
from ditune.tuner.fewer_steps import FewestSteps, fewest_steps
from ditune.tuner.goals import CONFIRM_SEED, Goal, goals_of, search_cases
from ditune.tuner.meter import Meter
from ditune.tuner.profiled import profiled
from ditune.tuner.progress import Progress, Quiet
from ditune.tuner.quality import prepare
from ditune.tuner.result import FramePair, Options, Result, TierResult
from ditune.tuner.search import Budget, Search
from ditune.tuner.source import Source, prompts_digest
from ditune.tuner.tiers import DEFAULT, Tier, tiers_of
from ditune.tuner.verdict import rejudged, with_known
from ditune.tuner.warm_start import warm_start

_TRIALS_MIN = 2  # the plain pipeline and one more, however little time the profile left
_WORST_SHOWN = 2
_FEWER_STEPS_PROMPTS = 4  # a comparison, not a promise: a third of the proof's prompts do


class Session:
    """Tunes one source into one store."""

    def __init__(
        self,
        source: Source,
        store: Store,
        options: Options,
        progress: Progress | None = None,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        """Check the options before anything runs.

        Args:
            source: The pipeline and its prompts.
            store: Keeps all that is found.
            options: How to search.
            progress: Shows what happens.
            elsewhere: Where policies are evaluated; by default in this process, where a generation
                that hangs cannot be ended.

        Raises:
            UsageFault: The quality floors are malformed, or name a metric that cannot be used; or
                workers are asked for and the database cannot be shared.
        """
        if elsewhere is not None and elsewhere.workers:
            require_shared(store.jobs)
        self.elsewhere = elsewhere
        self.source = source
        self.store = store
        self.options = options
        self.progress = progress or Quiet()
        self.tiers = tiers_of(options.quality, options.tiers, source.quality)
        for tier in self.tiers:
            prepare(tier.constraints)
        self.evaluator = Evaluator(source, self.tiers[0].constraints)
        self.notes: list[str] = []
        self.study_name: str | None = None
        self.expected_study: str | None = None  # refuse to run any other: set when resuming
        self._prompts_digest = prompts_digest(source)
        self._studies: tuple[str, ...] = ()  # of all tiers

    def run(self, storage_url: str) -> Result:
        """Profile, search, confirm and save; everything measured is in the store at any time."""
        meter = Meter(lambda: self.evaluator.videos)
        with meter.stage("profile"):
            cases = search_cases(self.source, self.options, self.tiers[0].constraints)
            profiled_prompts = self.options.profile_prompts
            recorded = profiled(self.evaluator, self.store, profiled_prompts, cases, self.progress)
        goals = goals_of(self.tiers, self.evaluator, self.options, recorded, self._note)
        self._require_expected([goal.settings for goal in goals])
        self._studies = tuple(goal.settings.study for goal in goals)
        found: dict[str, TierResult] = {}
        earlier: list[Trial] = []
        for goal in goals:
            reached = self._reach(goal, recorded.profile, earlier, meter, storage_url)
            found[goal.tier.name] = reached
            earlier = with_known(earlier, reached.trials)
        first = found[self.tiers[0].name]
        with meter.stage("confirm"):
            frames = self._frames(first.policy_file)
            fewer_steps = self._fewer_steps(first.policy_file)
        return Result(
            study=first.study,
            profile=recorded.profile,
            trials=first.trials,
            policy_file=first.policy_file,
            passed_over=first.passed_over,
            notes=tuple(self.notes),
            frames=frames,
            fewer_steps=fewer_steps,
            cost=meter.cost(forwards_of(recorded.profile)),
            tiers=found if self.options.tiers is not None else {},
        )

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    def _require_expected(self, all_settings: Sequence[Settings]) -> None:
        """Refuse to go on with a study that these settings do not name.

        Raises:
            UsageFault: The message says what changed.
        """
        if self.expected_study in (None, *(settings.study for settings in all_settings)):
            return
        known = {study.name: study.settings for study in self.store.studies()}
        before = known[str(self.expected_study)]
        alike = (s for s in all_settings if s.constraints == before.constraints)
        settings = next(alike, all_settings[0])
        differ = [n for n, value in before if value != getattr(settings, n)]
        raise UsageFault(
            f"cannot resume {self.expected_study} here: {', '.join(differ)} changed since; "
            "start a new study with tune run"
        )

    def _reach(
        self,
        goal: Goal,
        found: Profile,
        earlier: Sequence[Trial],
        meter: Meter,
        storage_url: str,
    ) -> TierResult:
        """Search and prove one tier, and put its policy in use.

        Args:
            goal: The tier.
            found: What the plain pipeline costs.
            earlier: Trials of the tiers before.
            meter: Of the session.
            storage_url: Optuna's own.
        """
        study = self._study(goal)
        proved = self._proved_before(study)
        if proved is not None:
            self._note(f"the tier {goal.tier.name} was proved before the run was interrupted")
            self._activate(proved, goal.tier)  # twice is once
            return TierResult(study, tuple(self.store.trials(study.name)), proved, ())
        seeds = {case.seed for case in goal.search_cases}
        judged = (rejudged(trial, goal.tier.constraints, seeds) for trial in earlier)
        known = [trial for trial in judged if trial is not None]
        with meter.stage("search"):
            search = self._prepared(goal, study, known)
            left = self.options.time_limit_s - (meter.seconds - meter.spent("confirm").seconds)
            budget = Budget(goal.trials, goal.share * left, _TRIALS_MIN)
            trials = self._search(search, found, budget, study.tier, storage_url)
        with meter.stage("confirm"):
            confirmation = self._confirm(goal, study, with_known(known, trials))
            policy_file = self._save(found, confirmation, goal.tier)
        result = TierResult(study, tuple(trials), policy_file, confirmation.reasons)
        if policy_file is None and self.options.tiers is not None:
            self._say_nothing_held(goal.tier, result)
        return result

    def _say_nothing_held(self, tier: Tier, result: TierResult) -> None:
        self._note(f"the tier {tier.name} has no policy: {result.best_seen()}")
        if tier == self.tiers[0]:
            self._note("what accelerate(pipe) takes without a tier stays as it was before this run")

    def _study(self, goal: Goal) -> Study:
        study = Study(
            name=goal.settings.study,
            settings=goal.settings,
            created_at=now(),
            arguments=dict(self.options.arguments),
            tier=goal.tier.name if self.options.tiers is not None else None,
        )
        self.study_name = study.name
        self.store.save_study(study)
        return self.store.study(study.name) or study

    def _proved_before(self, study: Study) -> PolicyFile | None:
        """Return what a run with tiers proved for one of them before it was interrupted."""
        if self.expected_study is None or study.tier is None:
            return None
        proved = (p for p in self.store.policies() if p.evidence.study == study.name)
        return next(proved, None)

    def _prepared(self, goal: Goal, study: Study, known: Sequence[Trial]) -> Search:
        """Return the search, with what was measured before and proved elsewhere to start from."""
        cases = goal.search_cases
        search = Search(study.name, goal.space, goal.evaluator, cases, self.options.seed)
        search.learn_from(known)
        if self.options.warm_start:
            found = warm_start(self.store, study, goal.space, self._studies)
            search.start_from(found.proposals)
            if found.note:
                self._note(found.note)
        return search

    def _search(
        self,
        search: Search,
        found: Profile,
        budget: Budget,
        tier: str | None,
        storage_url: str,
    ) -> list[Trial]:
        prefix = f"{tier}: " if tier is not None else ""
        best = 1.0

        def show(trial: Trial, count: int) -> None:
            nonlocal best
            if trial.feasible and trial.speedup is not None:
                best = max(best, trial.speedup)
            if self.elsewhere is not None:  # what this process does is counted already
                self.evaluator.videos += trial.videos or 0.0
            self.progress.update("search", count, budget.trials, f"{prefix}best {best:.2f}x")

        first = prefix + first_note(self.elsewhere, search.name)
        self.progress.update("search", 0, budget.trials, first)
        with self._crew(search.name) as crew:
            origin = self.elsewhere.origin if self.elsewhere is not None else None
            search.open(storage_url, self.store, crew, origin, limit_s(found, len(search.cases)))
            with closing(search):
                return search.run(budget, show)

    def _crew(self, study: str) -> AbstractContextManager[Crew | None]:
        """Return who evaluates policies during the search; None is this process."""
        if self.elsewhere is None:
            return nullcontext()
        return crew_of(self.elsewhere, self.store.jobs, study, self.evaluator)

    def _confirm(self, goal: Goal, study: Study, trials: Sequence[Trial]) -> Confirmation:
        cases = goal.proof_cases
        most = self.options.confirm_candidates
        total = most * (len(cases) + PAIRS_MIN)
        note = f"{study.tier}: held out" if study.tier is not None else "held out"
        proof = Proof(
            goal.evaluator,
            cases,
            lambda done: self.progress.update("confirm", done, max(total, done), note),
            trials,
        )
        provenance = Provenance(study.name, self._prompts_digest, trials)
        listed = to_prove(trials, goal.space, goal.tier.constraints, len(cases), most)
        return confirm(proof, listed, provenance)

    def _save(self, found: Profile, confirmation: Confirmation, tier: Tier) -> PolicyFile | None:
        policy, evidence = confirmation.policy, confirmation.evidence
        if policy is None or evidence is None:
            return None
        policy_file = policy_file_of(found, policy, evidence)
        self._activate(policy_file, tier)
        return policy_file

    def _activate(self, policy_file: PolicyFile, tier: Tier) -> None:
        """Put a policy in use under its tier; the first one is also what no tier stands for."""
        names = (tier.name, DEFAULT) if tier == self.tiers[0] else (tier.name,)
        self.store.save_and_activate(policy_file, dict.fromkeys(names))

    def _fewer_steps(self, policy_file: PolicyFile | None) -> FewestSteps | None:
        """Return the baseline of fewer steps, on prompts that proved the policy."""
        if policy_file is None:
            return None
        self.progress.update("confirm", 1, 1, "fewer steps")
        count = min(self.options.confirm_prompts, _FEWER_STEPS_PROMPTS)
        return fewest_steps(self.evaluator, cases_of(self.source.held_out, count, CONFIRM_SEED))

    def _frames(self, policy_file: PolicyFile | None) -> tuple[FramePair, ...]:
        """Return two held-out prompts before and after, none without a policy."""
        if policy_file is None:
            return ()
        cases = cases_of(self.source.held_out, _WORST_SHOWN, CONFIRM_SEED)
        return tuple(
            FramePair(case.prompt, self.evaluator.plain(case), self._applied(policy_file, case))
            for case in cases
        )

    def _applied(self, policy_file: PolicyFile, case: Case) -> np.ndarray:
        """Return a video as a user's program would get it: the policy comes from a lookup.

        A server's policies are not looked up at run time; there the policy is handed over.
        """
        given = policy_file.policy if self.store.file is None else None
        with accelerate(
            self.source.pipe, given, small=self.source.small, db=self.store.file
        ) as applied:
            video = self.evaluator.generate(case)[0]
            used = applied.summary()
        self.evaluator.videos += used.work_share
        if used.policy_id != policy_file.policy_id:
            raise StoreFault(
                f"the policy was saved to {self.store.where} and a lookup did not find it again "
                f"({used.reason}): run tune db check on it"
            )
        self._note(f"applied again as accelerate(pipe) does it: {used.reason}")
        return video
