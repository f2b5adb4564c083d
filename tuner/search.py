"""The search loop: ask, evaluate, store, tell.

Results go to our database first and to Optuna second, so that nothing that was measured is lost:
a search that begins tells first what an earlier run left untold, exactly once. A trial that ran to
its end, was rejected early or could not run is told as COMPLETE with all its constraints; FAIL is
for faults of the machine.
"""

from __future__ import annotations

import itertools
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import optuna

from ditune.db.errors import StoreLost
from ditune.db.jobs import Jobs
from ditune.db.policy import Policy
from ditune.db.records import Job, Origin, Trial
from ditune.tuner.asking import Asking
from ditune.tuner.crew import Alone, Crew
from ditune.tuner.evaluate import Case, Evaluates
from ditune.tuner.frontier import foreseeable
from ditune.tuner.here import Here
from ditune.tuner.ladders import Ladders
from ditune.tuner.pace import fastest_held
from ditune.tuner.quality import counts
from ditune.tuner.sequential import expectations
from ditune.tuner.space import Proposal, Space
from ditune.tuner.verdict import imagined, undecided, with_known
from ditune.tuner.worker import Worker, patiently

CASES_PER_PAIR = 8  # of a trial, at least one pair; confirmation takes one per prompt
_STARTUP_TRIALS = 8
_AS_FAST = 0.98  # of the fastest trial that held: what a sampler's point has to reach
_REPEATS = 50  # known policies in a row, after which there is nothing new to be found


class TrialStore(Protocol):
    """Where trials and jobs are kept: `db.store.Store`."""

    jobs: Jobs

    def trials(self, study: str) -> list[Trial]:
        """Return the trials of a study by number."""

    def trial(self, uuid: str) -> Trial | None:
        """Return a trial, None if there is none yet."""


@dataclass(frozen=True)
class Budget:
    """How long to search: a number of trials, and seconds on a clock that nobody can set back.

    `least` trials are made however little time there is.
    """

    trials: int
    seconds: float = float("inf")
    least: int = 0


@dataclass(frozen=True)
class _Pending:
    """A job without a result, and every point asked that spells its policy."""

    job: Job
    asked: list[optuna.Trial]


class Search:
    """One study: its space, its evaluator, its two memories."""

    def __init__(
        self,
        name: str,
        space: Space,
        evaluator: Evaluates,
        cases: Sequence[Case],
        seed: int,
        sampler: optuna.samplers.BaseSampler | None = None,
    ) -> None:
        """Prepare a study; `open` connects it to its memories.

        Args:
            name: Of the study.
            space: What may be searched.
            evaluator: Of the source, with the floors.
            cases: The calibration prompts.
            seed: Of the sampler.
            sampler: Proposes what no ladder does; by default Gaussian processes.
        """
        self.name = name
        self.space = space
        self.evaluator = evaluator
        self.cases = list(cases)
        self._ladders = Ladders(space)
        self._sampler = sampler or optuna.samplers.GPSampler(
            seed=seed, deterministic_objective=False, n_startup_trials=_STARTUP_TRIALS
        )
        self._seed = seed
        self._known: tuple[Trial, ...] = ()
        self._pending: dict[str, _Pending] = {}
        self._numbers = itertools.count()

    def start_from(self, warm: Sequence[Proposal]) -> None:
        """Try some policies of other searches right after the plain pipeline."""
        self._ladders = Ladders(self.space, warm=warm)

    def learn_from(self, known: Sequence[Trial]) -> None:
        """Let trials of other searches on the same cases guide this one, without being part of it.

        Args:
            known: Judged under the floors of this one: see `verdict.rejudged`.
        """
        self._known = tuple(known)

    def open(
        self,
        storage_url: str,
        store: TrialStore,
        crew: Crew | None = None,
        origin: Origin | None = None,
        limit_s: float | None = None,
    ) -> None:
        """Create or reopen the study.

        Args:
            storage_url: Optuna's own.
            store: Ours.
            crew: Evaluates; by default this process does, with the evaluator.
            origin: Where others find the pipeline.
            limit_s: What an evaluation may take, where it can be ended.
        """
        self.store = store
        self._storage_url = storage_url
        self._origin = origin
        self._limit_s = limit_s
        self._crew = crew or Alone(Worker(store.jobs, self.name, Here(self.evaluator)))
        self._asking = Asking(self.name, storage_url, self._sampler, self._seed)

    def close(self) -> None:
        """Let go of Optuna's storage."""
        self._asking.close()

    @property
    def study(self) -> optuna.Study:
        """Optuna's study."""
        return self._asking.study

    def run(self, budget: Budget, progress: Callable[[Trial, int], None]) -> list[Trial]:
        """Evaluate until the budget is spent; trials of earlier runs of the study count.

        A database that goes away is waited for; the search then goes on as if it began anew.

        Args:
            budget: Policies in all, and seconds for this run.
            progress: Called after every trial with it and the number of trials so far.

        Raises:
            UsageFault: Another process searches this study.
            StoreLost: The database stayed away.
        """
        ends = time.monotonic() + budget.seconds
        jobs = self.store.jobs
        while True:
            try:
                with jobs.sole_asker(self.name) as require_alone:
                    done = self._go_on(budget, ends, progress, require_alone)
                    jobs.end(self.name)
                    return done
            except StoreLost:
                self._asking.close()
                self._asking = patiently(
                    lambda: Asking(self.name, self._storage_url, self._sampler, self._seed)
                )

    def _decided(self, done: Sequence[Trial]) -> list[Trial]:
        """Return every trial whose policy need not run again."""
        return [trial for trial in with_known(self._known, done) if not undecided(trial)]

    def _go_on(
        self,
        budget: Budget,
        ends: float,
        progress: Callable[[Trial, int], None],
        require_alone: Callable[[], None],
    ) -> list[Trial]:
        """Ask, evaluate, store and tell until there are enough trials or the time `ends`."""
        done = self._recovered()
        repeats = 0
        while True:
            require_alone()
            for trial in self._arrived(done):
                done.append(trial)
                progress(trial, len(done))
                repeats = 0  # what is known has changed
            over = time.monotonic() >= ends and len(done) >= budget.least
            if over:
                self._withdraw()
            while not over and repeats < _REPEATS and self._wants(budget.trials - len(done)):
                known = self._ask(done, by_chance=repeats > 0)
                repeats = repeats + 1 if known else 0
            if not self._pending:
                return done
            self._crew.work()

    def _recovered(self) -> list[Trial]:
        """Take up what earlier runs left; return all trials."""
        jobs = self.store.jobs
        jobs.begin(self.name)
        self._pending = {}
        self._numbers = itertools.count(jobs.next_number(self.name))
        unfinished = jobs.unfinished(self.name)
        done = self.store.trials(self.name)
        known = {trial.uuid: trial for trial in done}
        for key, asked in self._asking.running():
            if key in known:
                self._tell([asked], known[key], done)
            elif key in unfinished:
                self._pending[key] = _Pending(unfinished[key], [asked])
            else:  # it was asked, and nothing was ever begun
                self._asking.give_up(asked)
        for key in unfinished.keys() - self._pending.keys() - known.keys():
            self._pending[key] = _Pending(unfinished[key], [])  # Optuna's storage was lost
        return done

    def _wants(self, room: int) -> bool:
        """Whether another job is to be asked for now."""
        if len(self._pending) >= room:
            return False
        return self._crew.wanted(*self.store.jobs.counts(self.name)) > 0

    def _ask(self, done: Sequence[Trial], *, by_chance: bool) -> bool:
        """Ask for a point and let its policy be evaluated; return whether it was known already.

        Many points spell the same policy. A sampler that asks for a known one is told what is
        known, which costs nothing and is no trial; `by_chance` then keeps it from asking again.
        """
        own = self._own_point(done, by_chance=by_chance)
        if own is not None:
            return self._place(*own, done)
        asked, source = self._asking.ask(self.space.distributions)
        policy = self.space.policy(asked.params)
        known = next((t for t in self._decided(done) if t.policy.id == policy.id), None)
        if known is not None:
            self._tell([asked], known, done)
            return True
        twin = next((p for p in self._pending.values() if p.job.policy.id == policy.id), None)
        if twin is not None:
            twin.asked.append(asked)
            return True
        job = self._job(policy, source, done)
        self._asking.mark(asked, job.uuid)
        self._put(job, asked)
        return False

    def _own_point(
        self, done: Sequence[Trial], *, by_chance: bool
    ) -> tuple[Mapping[str, Any], Policy, str] | None:
        """Return a point that a ladder or chance proposes, its policy and where it comes from.

        None where the sampler has to be asked.
        """
        space, proposal = self.space, self._proposed(done)
        if proposal is not None:
            parameters = proposal.parameters
            return parameters, proposal.policy or space.policy(parameters), proposal.source
        if by_chance or isinstance(self._sampler, optuna.samplers.RandomSampler):
            parameters = self._asking.by_chance(space.distributions)
            return parameters, space.policy(parameters), "search"
        return None

    def _place(
        self, parameters: Mapping[str, Any], policy: Policy, source: str, done: Sequence[Trial]
    ) -> bool:
        """Let a point of our own be evaluated; return whether its policy was known already."""
        taken = [each.job.policy for each in self._pending.values()]
        taken += [trial.policy for trial in self._decided(done)]
        if any(policy.id == each.id for each in taken):
            return True
        job = self._job(policy, source, done)
        space = self.space.distributions
        self._put(job, self._asking.place(parameters, space, source, job.uuid))
        return False

    def _put(self, job: Job, asked: optuna.Trial) -> None:
        self.store.jobs.put(job)
        self._pending[job.uuid] = _Pending(job, [asked])

    def _job(self, policy: Policy, source: str, done: Sequence[Trial]) -> Job:
        done = with_known(self._known, done)
        foreseen = self.space.pace(done).foreseen(policy)
        number = next(self._numbers)
        # each trial takes the prompts in another order: so the first one, after which most is known
        # of a policy that is given up, is not always the same
        cases = random.Random(f"{self.name} {number}").sample(self.cases, len(self.cases))
        constraints, seeds = self.evaluator.constraints, [case.seed for case in cases]
        return Job(
            uuid=uuid.uuid4().hex,
            study=self.name,
            number=number,
            source=source,  # type: ignore[arg-type]  # the model checks it
            policy=policy,
            constraints=constraints,
            prompts=tuple(case.prompt for case in cases),
            seeds=tuple(seeds),
            pairs=0 if foreseen else max(1, len(cases) // CASES_PER_PAIR),
            expected_speedup=foreseen,
            limit_s=self._limit_s,
            origin=self._origin,
            expected={} if self._teaches(source, done) else expectations(constraints, done, seeds),
            faster_than=self._to_beat(policy, source, done),
        )

    def _teaches(self, source: str, done: Sequence[Trial]) -> bool:
        """Whether a trial is more than a yes or no: the surrogate learns from each of its videos.

        What it proposes lies close to the floor, where its bound on a few prompts mostly misses.
        """
        return source in ("prior", "warm") and foreseeable(self.space, done)

    def _to_beat(self, policy: Policy, source: str, done: Sequence[Trial]) -> float | None:
        """Return how fast a policy has to be to be of use, None where that is not certain.

        The steps of a ladder teach something in any case. Work of two models does not add up, and
        where a metric counts, what held on the videos of a trial may soon not hold.
        """
        counted = any(counts(constraint) for constraint in self.evaluator.constraints)
        if counted or policy.handoff is not None or source not in ("default", "search"):
            return None
        fastest = fastest_held(done, self.space.pace(done))
        return None if fastest is None else _AS_FAST * fastest

    def _proposed(self, done: Sequence[Trial]) -> Proposal | None:
        """Return the next proposal of the ladders, None when enough is known."""
        if not with_known(self._known, done) and not self._pending:
            return self.space.baseline()
        found = (
            self._ladders.next(with_known(self._known, known)) for known in self._imagined(done)
        )
        return next((proposal for proposal in found if proposal is not None), None)

    def _imagined(self, done: Sequence[Trial]) -> Iterator[list[Trial]]:
        """Yield what may be known once everything pending has a result: it all holds, or misses.

        So the steps of a ladder are climbed ahead, in both directions in turn.
        """
        pending = [each.job for each in self._pending.values()]
        hopes = (True, False) if len(pending) % 2 else (False, True)
        for holds in hopes if pending else (True,):
            yield [*done, *(imagined(job, holds=holds) for job in pending)]

    def _arrived(self, done: Sequence[Trial]) -> Iterator[Trial]:
        """Yield the trials that have come in, once Optuna was told."""
        finished = self.store.jobs.done(list(self._pending))
        for key in [key for key in self._pending if key in finished]:
            trial = self.store.trial(key)
            assert trial is not None, f"job {key} is done and has no trial"
            self._tell(self._pending.pop(key).asked, trial, [*done, trial])
            yield trial

    def _tell(self, asked: Sequence[optuna.Trial], trial: Trial, done: Sequence[Trial]) -> None:
        """Tell Optuna about a trial that is stored; the one that was stored for it goes last.

        After a crash in between, the others are given up, and this one is told.
        """
        for each in reversed(asked):
            if trial.state == "failed":
                self._asking.give_up(each)
            else:
                pace = self.space.pace(with_known(self._known, done))
                self._asking.tell(each, trial, 1.0 / pace.speedup(trial))

    def _withdraw(self) -> None:
        """Take back what nobody has begun, when the time is over."""
        for key in self.store.jobs.withdraw(self.name):
            for each in self._pending.pop(key).asked:
                self._asking.give_up(each)
