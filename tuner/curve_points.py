"""What a trade-off curve weighs, which policies it tries next, and which it puts to the proof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import optuna
from optuna.samplers import BaseSampler, GPSampler, RandomSampler
from optuna.study import StudyDirection

from ditune.db.curve import Also, CurvePoint, taken
from ditune.db.policy import MaskCache, Policy
from ditune.db.records import Constraint, Proposer, Quality, Trial
from ditune.tuner.frontier import best_masks
from ditune.tuner.pace import whole_mask
from ditune.tuner.pareto import Point, budgets, front, spread
from ditune.tuner.quality import in_decibels
from ditune.tuner.space import Space
from ditune.tuner.surrogate import Seen, Surrogate

_EVERY, _EVERY_HANDING = 4, 2  # every so many trials the sampler proposes; masks never hand over
_STARTUP_TRIALS = 5  # that the sampler knows before it is more than chance
_REPEATS = 50  # known policies by chance, after which nothing new is to be found
_UNBOUNDED = -1e9  # a floor that nothing misses


@dataclass(frozen=True)
class Objectives:
    """What a curve weighs besides speed: a quality metric, and maybe memory or energy."""

    metric: str = "psnr"
    also: Also | None = None

    @property
    def scored(self) -> Constraint:
        """The metric as evaluators are asked for it: its mean, without a floor that could bind."""
        return Constraint(metric=self.metric, statistic="mean", floor=_UNBOUNDED)

    def point(self, speedup: float, quality: float, takes: float | None) -> Point:
        """Return numbers of which more is better."""
        return (speedup, quality) if takes is None else (speedup, quality, -takes)


class Proposals:
    """Says what to try next: masks of all budgets, and between them what a sampler asks for.

    It keeps nothing: all follows from the trials so far, so that a curve which was interrupted goes
    on where it stopped.
    """

    def __init__(self, space: Space, objectives: Objectives, seed: int) -> None:
        """Take what may be tried, and what counts."""
        self._space = space
        self._objectives = objectives
        self._seed = seed

    def next(self, done: Sequence[Trial]) -> tuple[Policy, Proposer] | None:
        """Return a policy that no trial had, and who proposes it; None if there is none."""
        if not done:
            return Policy(), "baseline"
        tried = {trial.policy.id for trial in done}
        every = _EVERY_HANDING if self._space.hands_over else _EVERY
        mask = self._mask(done, tried) if len(done) % every else None
        if mask is not None:
            return mask, "prior"
        sampled = self._sampled(done, tried)
        if sampled is not None:
            return sampled, "search"
        mask = self._mask(done, tried)
        return None if mask is None else (mask, "prior")

    def _mask(self, done: Sequence[Trial], tried: set[str]) -> Policy | None:
        """Return the best mask of the budget that is farthest from those tried."""
        space, seen = self._space, self._seen(done)
        masks = [t.policy.cache for t in done if whole_mask(t.policy)]
        known = {m.actions.count("full") for m in masks if isinstance(m, MaskCache)}
        surrogate = Surrogate(space.schedules, seen) if space.schedules and seen else None
        for budget in budgets({*known, space.steps}, space.fewest, space.steps):
            policy = self._best(budget, surrogate)
            if policy is not None and policy.id not in tried:
                return policy
        return None

    def _seen(self, done: Sequence[Trial]) -> list[Seen]:
        """Return what masks gave, in decibels; empty where the metric has none."""
        metric = self._objectives.metric
        level = in_decibels(metric)
        return [
            Seen(trial.policy.cache, level(trial.quality[metric].mean))
            for trial in done
            if level is not None
            and trial.quality
            and whole_mask(trial.policy)
            and isinstance(trial.policy.cache, MaskCache)
        ]

    def _best(self, budget: int, surrogate: Surrogate | None) -> Policy | None:
        """Return the mask of a budget that may be the best, by what is known and what is not."""
        space = self._space
        if surrogate is None:
            return space.policy(space.prior(budget).parameters)
        masks = [m for m in best_masks(space, surrogate) if m.actions.count("full") == budget]
        if not masks:
            return None
        values, sds = surrogate.predict(masks)
        return Policy(cache=masks[int((values + sds).argmax())])

    def _sampled(self, done: Sequence[Trial], tried: set[str]) -> Policy | None:
        """Return what a sampler of several objectives asks for; if that is known, chance."""
        seed = self._seed + len(done)
        chance = RandomSampler(seed=seed)
        sampler = GPSampler(
            seed=seed, deterministic_objective=False, n_startup_trials=_STARTUP_TRIALS
        )
        study = self._study(sampler, done)
        for _ in range(_REPEATS):
            policy = self._space.policy(study.ask(self._space.distributions).params)
            if policy.id not in tried:
                return policy
            study.sampler = chance
        return None

    def _study(self, sampler: BaseSampler, done: Sequence[Trial]) -> optuna.Study:
        """Return a study in memory that knows every complete trial but the plain pipeline's.

        That one equals itself: its quality lies so far out that it would flatten all others.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        least, most = StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE
        directions = [least, most] if self._objectives.also is None else [least, most, least]
        study = optuna.create_study(directions=directions, sampler=sampler)
        for trial in done:
            if trial.state == "complete" and trial.policy != Policy():
                study.add_trial(self._told(trial))
        return study

    def _told(self, trial: Trial) -> optuna.trial.FrozenTrial:
        assert trial.speedup is not None  # of a complete trial
        values: list[Any] = [1.0 / trial.speedup, trial.quality[self._objectives.metric].mean]
        takes = taken(trial, self._objectives.also)
        return optuna.trial.create_trial(
            params=self._space.warm(trial.policy).parameters,
            distributions=self._space.distributions,
            values=values if takes is None else [*values, takes],
        )


def to_prove(
    trials: Sequence[Trial], space: Space, objectives: Objectives, most: int
) -> list[Trial]:
    """Return the trials that no other one dominates, from slow to fast.

    The plain pipeline's is not among them, and may dominate.

    Args:
        trials: Of the search.
        space: Of the search.
        objectives: What counts.
        most: How many at most; then they lie far from each other on the curve.
    """
    pace = space.pace(trials)
    complete = [trial for trial in trials if trial.state == "complete"]
    speedups = [1.0 if t.policy == Policy() else pace.speedup(t) for t in complete]
    points = [
        objectives.point(speedup, t.quality[objectives.metric].mean, taken(t, objectives.also))
        for t, speedup in zip(complete, speedups, strict=True)
    ]
    best = [place for place in front(points) if complete[place].policy != Policy()]
    best.sort(key=speedups.__getitem__)
    return [complete[best[n]] for n in spread([log(speedups[place]) for place in best], most)]


def marked(
    points: Sequence[CurvePoint], plain: Trial, objectives: Objectives
) -> tuple[CurvePoint, ...]:
    """Return proved points from slow to fast, each with whether another one dominates it.

    Args:
        points: As they were measured.
        plain: The trial of the plain pipeline, which may dominate too.
        objectives: What counts.
    """
    metric, also = objectives.metric, objectives.also
    places = [
        objectives.point(p.evidence.speedup.median, p.evidence.quality[metric].mean, taken(p, also))
        for p in points
    ]
    plain_place = objectives.point(1.0, plain.quality[metric].mean, taken(plain, also))
    best = front([*places, plain_place])
    found = [
        point.model_copy(update={"dominated": number not in best})
        for number, point in enumerate(points)
    ]
    return tuple(sorted(found, key=lambda point: point.evidence.speedup.median))


def unbounded(quality: Mapping[str, Quality]) -> dict[str, Quality]:
    """Return qualities without the floor that nothing could miss."""
    return {n: found.model_copy(update={"floor": None}) for n, found in quality.items()}
