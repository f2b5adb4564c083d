"""One tuning session: profile, search, confirm, save; the way of the data from end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from ditune.accel.apply import accelerate
from ditune.accel.lookup import default_database
from ditune.db.engine import study_storage_url
from ditune.db.errors import NoFeasiblePolicy, StoreFault, UsageFault
from ditune.db.policy import Policy
from ditune.db.records import Impacts, PolicyFile, Profile, Study, Trial
from ditune.db.store import Store
from ditune.profiler.impact import impacts
from ditune.profiler.parts import forwards_of
from ditune.profiler.record import Recorded, record
from ditune.tuner.confirm import PAIRS_MIN, Confirmation, Proof, Provenance, confirm
from ditune.tuner.contenders import to_prove
from ditune.tuner.crew import Crew
from ditune.tuner.elsewhere import Elsewhere, crew_of, first_note, limit_s, require_shared
from ditune.tuner.evaluate import Case, Evaluator, cases_of
from ditune.tuner.fewer_steps import FewestSteps, fewest_steps
from ditune.tuner.meter import Meter
from ditune.tuner.progress import Progress, Quiet
from ditune.tuner.quality import (
    cases_needed,
    cases_to_search,
    counts,
    needs_reference,
    parse_constraints,
    prepare,
)
from ditune.tuner.result import FramePair, Options, Result
from ditune.tuner.search import Budget, Search
from ditune.tuner.source import FolderSource, Source, prompts_digest
from ditune.tuner.space import Space
from ditune.tuner.studies import settings_of
from ditune.tuner.verdict import now
from ditune.tuner.warm_start import warm_start

_SEARCH_SEED = 1_000  # noise seeds of the search and of confirmation never meet
_CONFIRM_SEED = 500_000
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
        self.constraints = parse_constraints(options.quality or source.quality)
        prepare(self.constraints)
        self.evaluator = Evaluator(source, self.constraints)
        self.notes: list[str] = []
        self.study_name: str | None = None
        self.expected_study: str | None = None  # refuse to run any other: set when resuming
        self._prompts_digest = prompts_digest(source)

    def run(self, storage_url: str) -> Result:
        """Profile, search, confirm and save; everything measured is in the store at any time."""
        meter = Meter(lambda: self.evaluator.videos)
        with meter.stage("profile"):
            recorded = self._profile()
        found = recorded.profile
        handing = self._may_hand_off()
        space = Space(found, handoff=handing, trajectories=recorded.trajectories)
        if handing and not space.hands_over:
            self.notes.append("the hand-off is left out: the scheduler tells no noise levels")
        study = self._study(found, space)
        with meter.stage("search"):
            search = self._prepared(study, space)
            budget = Budget(
                self.options.trials, self.options.time_limit_s - meter.seconds, _TRIALS_MIN
            )
            trials = self._search(search, found, budget, storage_url)
        with meter.stage("confirm"):
            confirmation = self._confirm(study, trials, space)
            policy_file = self._save(found, confirmation)
            frames = self._frames(policy_file)
            fewer_steps = self._fewer_steps(policy_file)
        return Result(
            study=study,
            profile=found,
            trials=tuple(trials),
            policy_file=policy_file,
            passed_over=confirmation.reasons,
            notes=tuple(self.notes),
            frames=frames,
            fewer_steps=fewer_steps,
            cost=meter.cost(forwards_of(found)),
        )

    def _profile(self) -> Recorded:
        options = self.options
        total = 2 * options.profile_prompts + 3
        done = -1

        def note(words: str) -> None:
            nonlocal done
            done += 1
            self.progress.update("profile", done, total, words)

        recorded = record(
            self.source.pipe,
            self.source.calibration[: options.profile_prompts],
            call={**self.source.call, "output_type": "np"},
            small=self.source.small,
            seed=_SEARCH_SEED,
            progress=note,
        )
        for case, output in zip(self._search_cases(), recorded.outputs, strict=False):
            self.evaluator.adopt(case, output)  # the same prompts and seeds
        self.evaluator.videos += recorded.videos
        known = self.store.impacts(recorded.profile.workload)
        if known is None:
            note("measuring what errors do")
            known = self._impacts(forwards_of(recorded.profile))
        found = recorded.profile.model_copy(update={"impacts": known})
        self.progress.update("profile", total, total, "done")
        self.store.save_profile(found)
        return replace(recorded, profile=found)

    def _impacts(self, forwards_per_video: int) -> Impacts | None:
        def count(forwards: int) -> None:
            self.evaluator.videos += forwards / forwards_per_video

        source = self.source
        prompt, call = source.calibration[0], source.call
        return impacts(source.pipe, prompt, call=call, seed=_SEARCH_SEED, spent=count)

    def _may_hand_off(self) -> bool:
        """Whether the hand-off belongs into the space; says so when it does not."""
        if self.source.small is None:
            return False
        if needs_reference(self.constraints):
            self.notes.append(
                "the hand-off to the small model is left out: it changes content, which a "
                "same-seed floor (psnr, ssim) cannot allow; use judge floors alone to search it"
            )
            return False
        return True

    def _study(self, found: Profile, space: Space) -> Study:
        settings = settings_of(self.evaluator, found, space, self.options.seed)
        study = Study(
            name=settings.study,
            settings=settings,
            created_at=now(),
            arguments=dict(self.options.arguments),
        )
        known = {s.name: s for s in self.store.studies()}
        if self.expected_study not in (None, study.name):
            before = known[str(self.expected_study)].settings
            differ = [n for n, value in before if value != getattr(settings, n)]
            raise UsageFault(
                f"cannot resume {self.expected_study} here: {', '.join(differ)} changed since; "
                "start a new study with tune run"
            )
        self.study_name = study.name
        if study.name in known:
            return known[study.name]
        self.store.save_study(study)
        return study

    def _prepared(self, study: Study, space: Space) -> Search:
        """Return the search, with what was proved elsewhere to start from."""
        cases = self._search_cases()
        search = Search(study.name, space, self.evaluator, cases, self.options.seed)
        if self.options.warm_start:
            found = warm_start(self.store, study, space)
            search.start_from(found.proposals)
            self.notes += [found.note] if found.note else []
        return search

    def _search(
        self, search: Search, found: Profile, budget: Budget, storage_url: str
    ) -> list[Trial]:
        best = 1.0

        def show(trial: Trial, count: int) -> None:
            nonlocal best
            if trial.feasible and trial.speedup is not None:
                best = max(best, trial.speedup)
            if self.elsewhere is not None:  # what this process does is counted already
                self.evaluator.videos += trial.videos or 0.0
            self.progress.update("search", count, budget.trials, f"best {best:.2f}x")

        first = first_note(self.elsewhere, search.name)
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

    def _confirm(self, study: Study, trials: Sequence[Trial], space: Space) -> Confirmation:
        cases = cases_of(self.source.held_out, self._proof_videos(), _CONFIRM_SEED)
        most = self.options.confirm_candidates
        total = most * (len(cases) + PAIRS_MIN)
        proof = Proof(
            self.evaluator,
            cases,
            lambda done: self.progress.update("confirm", done, max(total, done), "held out"),
        )
        provenance = Provenance(study.name, self._prompts_digest, trials)
        return confirm(
            proof, to_prove(trials, space, self.constraints, len(cases), most), provenance
        )

    def _save(self, found: Profile, confirmation: Confirmation) -> PolicyFile | None:
        policy, evidence = confirmation.policy, confirmation.evidence
        if policy is None or evidence is None:
            return None
        workload = found.workload
        if policy.handoff is None:  # it serves with and without a small model at hand
            alone = {"small_model_digest": None, "small_model_revision": None}
            workload = workload.model_copy(update=alone)
        policy_file = PolicyFile(
            policy_id=policy.id,
            hardware=found.hardware,
            software=found.software,
            workload=workload,
            policy=policy,
            evidence=evidence,
        )
        self.store.save_and_activate(policy_file)
        return policy_file

    def _fewer_steps(self, policy_file: PolicyFile | None) -> FewestSteps | None:
        """Return the baseline of fewer steps, on prompts that proved the policy."""
        if policy_file is None:
            return None
        self.progress.update("confirm", 1, 1, "fewer steps")
        count = min(self.options.confirm_prompts, _FEWER_STEPS_PROMPTS)
        return fewest_steps(self.evaluator, cases_of(self.source.held_out, count, _CONFIRM_SEED))

    def _search_cases(self) -> list[Case]:
        count = self.options.search_prompts
        if any(map(counts, self.constraints)):
            count = max(count, cases_to_search(self.constraints))
        return cases_of(self.source.calibration, count, _SEARCH_SEED)

    def _proof_videos(self) -> int:
        """Return how many videos the proof takes: metrics that count need many."""
        asked, needed = self.options.confirm_prompts, cases_needed(self.constraints)
        if needed > asked:
            self.notes.append(
                f"the proof takes {needed} videos instead of {asked}: floors on shares of right "
                "videos cannot be proved with fewer"
            )
        return max(asked, needed)

    def _frames(self, policy_file: PolicyFile | None) -> tuple[FramePair, ...]:
        """Return two held-out prompts before and after, none without a policy."""
        if policy_file is None:
            return ()
        cases = cases_of(self.source.held_out, _WORST_SHOWN, _CONFIRM_SEED)
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
        said = f"applied again as accelerate(pipe) does it: {used.reason}"
        if said not in self.notes:
            self.notes.append(said)
        return video


def tune(
    pipe: Any,
    prompts: Sequence[str],
    *,
    quality: str,
    call: Mapping[str, Any] | None = None,
    small: Any | None = None,
    trials: int = 20,
) -> Policy:
    """Search, prove and store a policy for a live pipeline, in this process.

    The policy goes into `$DITUNE_DB` or the user's data folder, where `accelerate` finds it. A
    generation that hangs here hangs the search.

    Args:
        pipe: A diffusers pipeline on its device.
        prompts: Every other one is held out for the proof.
        quality: Floors, for example "psnr>=30,psnr_worst>=22".
        call: The pipeline's arguments besides the prompt.
        small: The small model of the family, for hand-offs.
        trials: How many policies to try.

    Raises:
        NoFeasiblePolicy: Nothing held the floors; the message says how close it came.
        UsageFault: The floors or prompts are not usable.
    """
    source = FolderSource(
        name=type(pipe).__name__,
        pipe=pipe,
        small=small,
        call=dict(call or {}),
        calibration=tuple(prompts[0::2]),
        held_out=tuple(prompts[1::2]),
        quality=quality,
    )
    url = str(default_database())
    with Store.open(url) as store:
        session = Session(source, store, Options(quality=quality, trials=trials))
        result = session.run(study_storage_url(url))
    if result.policy_file is None:
        raise NoFeasiblePolicy(f"no policy holds {quality}: {result.best_seen()}")
    return result.policy_file.policy
