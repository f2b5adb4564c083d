"""Masks on the edge between speed and quality, as everything measured so far predicts it.

A search learns on a few prompts what its masks give; the proof is on others. So a mask is wanted
that is fast and probably passes the proof. How probable that is follows from the surrogate's own
doubts, from how much prompts differ, and from what the proof asks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import get_args

import numpy as np
from scipy import stats

from ditune.db.policy import Action, Form, MaskCache, Payload, Policy
from ditune.db.records import Quality, Score, Trial
from ditune.profiler.statistics import mean_below, worst_below
from ditune.tuner.pace import whole_mask
from ditune.tuner.quality import UNSEEN, in_decibels
from ditune.tuner.sequential import pattern
from ditune.tuner.space import Proposal, Space
from ditune.tuner.surrogate import Seen, Surrogate
from ditune.tuner.verdict import undecided

_SPREAD_DB, _SPREAD_WEIGHT = 2.0, 4.0  # between prompts before any is seen; worth so many
_SAME_SD = 0.5  # dB: what the surrogate cannot know of a mask on given prompts
_OWN_SHARE, _TRIED_SD = 0.7, 0.25  # of a surprise that is the mask's own; dB that stay unknown
_FAR = 0.1  # of the distance to the floor, by which the surrogate may be off there
_GROWTH = 1.4  # of the computed steps, while several are tried at once
_ORDERS = (1, 2, 0)


@dataclass(frozen=True)
class Glimpse:
    """The quality that a policy gave on some prompts, by constraint."""

    policy: Policy
    quality: Mapping[str, Quality]
    spreads: Mapping[str, float] | None = None  # of metrics between prompts, in decibels
    elsewhere: bool = False  # whether the prompts were not those of the search
    scores: Sequence[Score] = ()  # of each prompt


@dataclass(frozen=True)
class Choice:
    """A mask with what is expected of it: the speedup, and the chance that it passes the proof."""

    policy: Policy
    speedup: float
    chance: float

    def promise(self, known: float) -> float:
        """Return by how much it can be expected to raise the log of a known speedup."""
        return self.chance * max(math.log(self.speedup / known), 0.0)

    def reserve(self, cost: float) -> float:
        """Return the log of the known speedup over which a look would promise just what it costs.

        Of candidates that say nothing of each other, the one with the greatest is best looked at
        next (Weitzman 1979, Optimal search for the best alternative).

        Args:
            cost: Of a look, as a share of the speedup. The chance is above zero.
        """
        return math.log(self.speedup) - cost / self.chance


class Frontier:
    """What can be expected of the masks of a space after some trials and, maybe, proofs."""

    def __init__(
        self, space: Space, trials: Sequence[Trial], proofs: Sequence[Glimpse], proof_prompts: int
    ) -> None:
        """Fit the surrogates of all metrics.

        Args:
            space: With trajectories.
            trials: Of a search in it; one or more have masks.
            proofs: What candidates gave in the proof so far.
            proof_prompts: How many prompts the proof takes in all.
        """
        assert space.schedules is not None
        self._schedules = space.schedules
        self._space = space
        trials = [trial for trial in trials if trial.quality]  # not those that failed
        self._pace = space.pace(trials)
        seen = [Glimpse(t.policy, t.quality, _spreads_in(t), scores=t.scores) for t in trials]
        self._others = [
            t
            for t in trials
            if t.state == "complete" and t.policy.cache and not whole_mask(t.policy)
        ]
        self._glimpses = [g for g in (*seen, *proofs) if whole_mask(g.policy)]
        self._proof_prompts = proof_prompts
        self._search_prompts = max(q.n for t in trials for q in t.quality.values())
        names = {name for trial in trials for name in trial.quality}
        self._floors = {name: self._floor(name, trials) for name in names}
        self._spreads = {m: self._spread(m) for m in {_metric(name) for name in names}}
        self._seeds = sorted({score.seed for trial in trials for score in trial.scores})
        self._patterns = {m: pattern(m, trials, self._seeds) for m in self._spreads}
        self._surrogates = {m: self._surrogate(m) for m in self._spreads}

    def choices(self, *, elsewhere: bool) -> list[Choice]:
        """Return what was tried, and the masks that some surrogate finds best.

        Args:
            elsewhere: Whether the chance is wanted on other prompts than those of the search.
        """
        tried = [g.policy.cache for g in self._glimpses if isinstance(g.policy.cache, MaskCache)]
        masks = dict.fromkeys(tried) | dict.fromkeys(
            mask
            for surrogate in self._surrogates.values()
            for mask in best_masks(self._space, surrogate)
        )
        return self._of_masks(list(masks), elsewhere) + self._of_others(elsewhere)

    def _of_masks(self, masks: Sequence[MaskCache], elsewhere: bool) -> list[Choice]:
        chances = np.ones(len(masks))
        for name, floor in self._floors.items():
            values, sds = self._predicted(_metric(name), masks, elsewhere)
            needed = self._needed(name, floor)
            chances = np.minimum(chances, stats.norm.cdf((values - needed) / sds))
        found = []
        for mask, chance in zip(masks, chances, strict=True):
            policy = Policy(cache=mask)
            work_ratio = len(mask.actions) / mask.actions.count("full")
            speedup = self._pace.expected(policy, work_ratio) or work_ratio
            found.append(Choice(policy, speedup, float(chance)))
        return found

    def _of_others(self, elsewhere: bool) -> list[Choice]:
        """Return the trials that are no masks: what they gave is all that is known of them."""
        found = []
        for trial in self._others:
            chance = 1.0
            for name, floor in self._floors.items():
                metric = _metric(name)
                shift, sd = self._surrogates[metric].elsewhere if elsewhere else (0.0, 0.0)
                value = _decibels(metric, trial.quality[name].mean) + shift
                above = (value - self._needed(name, floor)) / math.hypot(sd, _TRIED_SD)
                chance = min(chance, float(stats.norm.cdf(above)))
            found.append(Choice(trial.policy, self._pace.speedup(trial), chance))
        return found

    def _predicted(
        self, metric: str, masks: Sequence[MaskCache], elsewhere: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return expected levels and standard deviations; what a mask showed itself counts too."""
        surrogate = self._surrogates[metric]
        values, sds = surrogate.predict(masks, elsewhere=elsewhere)
        own = {}
        for glimpse in self._glimpses:
            quality = _of(glimpse.quality, metric)
            if quality.n == self._search_prompts and not glimpse.elsewhere:
                own[glimpse.policy.cache] = _decibels(metric, quality.mean)
        tried = [n for n, mask in enumerate(masks) if mask in own]
        if tried:
            known = [masks[n] for n in tried]
            there, _ = surrogate.predict(known, elsewhere=False)
            values[tried] += _OWN_SHARE * (np.array([own[mask] for mask in known]) - there)
            sds[tried] = np.sqrt(
                np.maximum(sds[tried] ** 2 - _OWN_SHARE * _SAME_SD**2, _TRIED_SD**2)
            )
        return values, sds

    def _floor(self, name: str, trials: Sequence[Trial]) -> float:
        found = next(trial.quality[name].floor for trial in trials if name in trial.quality)
        assert found is not None  # of a constraint
        return found

    def _needed(self, name: str, floor: float) -> float:
        """Return the mean in decibels with which the proof of a constraint just passes."""
        metric = _metric(name)
        spread = self._spreads[metric]
        if name != metric:
            return _decibels(metric, floor) + worst_below(self._proof_prompts, UNSEEN) * spread
        return _decibels(metric, floor) + mean_below(self._proof_prompts) * spread

    def _surrogate(self, metric: str) -> Surrogate:
        apart = math.sqrt(1.0 / self._search_prompts + 1.0 / self._proof_prompts)
        apart *= self._spreads[metric]
        return Surrogate(self._schedules, [self._seen(metric, g) for g in self._glimpses], apart)

    def _seen(self, metric: str, glimpse: Glimpse) -> Seen:
        """Return the level that a glimpse shows, as all of its prompts would.

        Where some are missing, how hard the others are is known once other trials had them all.
        """
        assert isinstance(glimpse.policy.cache, MaskCache)
        quality = _of(glimpse.quality, metric)
        whole = self._proof_prompts if glimpse.elsewhere else self._search_prompts
        level, spread = _decibels(metric, quality.mean), self._spreads[metric]
        missing = quality.n < whole and not glimpse.elsewhere
        usual = self._patterns[metric] if missing and glimpse.scores else None
        if usual is not None:
            easier = dict(zip(self._seeds, usual.differences, strict=True))
            level -= float(np.mean([easier[score.seed] for score in glimpse.scores]))
            spread = usual.sd
        partly = max(1.0 / quality.n - 1.0 / whole, 0.0) * spread**2
        floor = self._floors.get(metric)
        far = 0.0 if floor is None else level - _decibels(metric, floor)
        sd = math.sqrt(_SAME_SD**2 + partly + (_FAR * far) ** 2)
        return Seen(glimpse.policy.cache, level, sd, glimpse.elsewhere)

    def _spread(self, metric: str) -> float:
        """Return the standard deviation between prompts in decibels.

        Trials share their prompts, and so do proofs: however many, each are one sample.
        """
        variances, weights = [_SPREAD_DB**2], [_SPREAD_WEIGHT]
        for elsewhere in (False, True):
            found = [g for g in self._glimpses if g.elsewhere == elsewhere]
            most = max((_of(g.quality, metric).n for g in found), default=0)
            if most > 1:
                full = [g for g in found if _of(g.quality, metric).n == most]
                variances.append(float(np.mean([_spread_of(g, metric) for g in full])) ** 2)
                weights.append(most - 1.0)
        return math.sqrt(float(np.average(variances, weights=weights)))


def best_masks(space: Space, surrogate: Surrogate) -> Iterator[MaskCache]:
    """Yield the masks that a surrogate finds best.

    For every payload and every number of computed steps there is one, or a few.

    Args:
        space: With trajectories.
        surrogate: Fitted to what masks of the space gave.
    """
    for computed in surrogate.schedules():
        if space.fewest <= len(computed) < space.steps:
            for payload in _payloads(space.arc_length):
                yield MaskCache(actions=_actions(computed, space.steps), payload=payload)


def proposed(space: Space, trials: Sequence[Trial], proof_prompts: int) -> Proposal | None:
    """Return the mask that promises the most on the prompts of the search, None if none does.

    Args:
        space: Of the search, with trajectories.
        trials: So far.
        proof_prompts: How many prompts the proof will take.
    """
    tried = {trial.policy for trial in trials if not undecided(trial)}
    if not any(whole_mask(trial.policy) and trial.quality for trial in trials):
        firsts = (space.prior(budget) for budget in _first_budgets(space, trials))
        return next((p for p in firsts if space.policy(p.parameters) not in tried), None)
    choices = Frontier(space, trials, (), proof_prompts).choices(elsewhere=False)
    known = max((c.speedup for c in choices if c.policy in tried and c.chance >= 0.5), default=1)
    fresh = [choice for choice in choices if choice.policy not in tried]
    best = max(fresh, key=lambda choice: choice.promise(known), default=None)
    if best is None or not isinstance(best.policy.cache, MaskCache) or not best.promise(known):
        return None
    return space.explicit(best.policy.cache)


def _first_budgets(space: Space, trials: Sequence[Trial]) -> Iterator[int]:
    """Yield how many steps to compute while nothing is known: the middle, then more and more.

    Instead of the middle, what a mask of another search computes that is still on its way.
    """
    carried = [
        trial.policy.cache.actions.count("full")
        for trial in trials
        if trial.source == "warm" and isinstance(trial.policy.cache, MaskCache)
    ]
    budget = max(carried, default=round(math.sqrt(space.fewest * space.steps)))
    while budget < space.steps:
        yield budget
        budget = max(round(_GROWTH * budget), budget + 1)


def foreseeable(space: Space, trials: Sequence[Trial]) -> bool:
    """Whether what masks give can be predicted: errors are known, and all metrics measure them."""
    names = next((t.quality or t.violation for t in trials if t.quality or t.violation), None)
    if space.schedules is None or space.hands_over or names is None:
        return False
    return all(in_decibels(_metric(name)) is not None for name in names)


def _metric(constraint: str) -> str:
    return constraint.removesuffix("_worst")


def spreads(constraints: Iterable[str], values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the standard deviation of each metric over prompts, in decibels.

    Args:
        constraints: Their names.
        values: Each metric's value, prompt by prompt; two prompts or more.
    """
    found = {}
    for metric in {_metric(name) for name in constraints}:
        found[metric] = float(np.std([_decibels(metric, v[metric]) for v in values], ddof=1))
    return found


def _spreads_in(trial: Trial) -> dict[str, float] | None:
    """Return the spreads of a trial, None if it has too few values or an old one kept none."""
    if len(trial.scores) < 2:
        return None
    return spreads(trial.quality, [score.values for score in trial.scores])


def _decibels(metric: str, score: float) -> float:
    level = in_decibels(metric)
    assert level is not None
    return level(score)


def _of(quality: Mapping[str, Quality], metric: str) -> Quality:
    return next(q for name, q in quality.items() if _metric(name) == metric)


def _spread_of(glimpse: Glimpse, metric: str) -> float:
    if glimpse.spreads is not None:
        return glimpse.spreads[metric]
    quality = _of(glimpse.quality, metric)
    apart = _decibels(metric, quality.mean) - _decibels(metric, quality.worst)
    return apart / _worst_of(quality.n)


def _worst_of(count: int) -> float:
    """Return how many standard deviations the worst of some prompts lies below the mean."""
    return float(-stats.norm.ppf((1.0 - 0.375) / (count + 0.25)))


def _actions(computed: Sequence[int], steps: int) -> tuple[Action, ...]:
    chosen = set(computed)
    return tuple("full" if step in chosen else "step" for step in range(steps))


def _payloads(arc_length: tuple[float, ...] | None) -> Iterator[Payload]:
    """Return every payload that reuses whole steps; a reused output has no axis."""
    for order, form in product(_ORDERS, get_args(Form)):
        axes = dict.fromkeys((arc_length, None)) if order else (None,)
        yield from (Payload(form=form, order=order, arc_length=axis) for axis in axes)
