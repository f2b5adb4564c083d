"""What a search tries before its sampler: the profile's own proposals, each where the last one led.

What was proved in other searches comes first of all. Where a metric measures errors, what masks
give is predicted from the trials so far, and the most promising one is next. Elsewhere three
families are climbed, one after the other: caches, hand-offs, both together. Each has one number
that decides the most. Caches are bisected over it; hand-offs, whose floors are seldom those that a
few videos decide, go down it level by level. Variants around what held follow.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import TypeVar

from ditune.db.policy import MaskCache, Policy
from ditune.db.records import Trial
from ditune.tuner.budgets import Bracket, bracket, next_level
from ditune.tuner.frontier import foreseeable, proposed
from ditune.tuner.handoffs import first_guess, large_window, latest
from ditune.tuner.pace import whole_mask
from ditune.tuner.quality import PROOF_PROMPTS
from ditune.tuner.space import EARLY, Proposal, Space
from ditune.tuner.verdict import undecided

# how many steps more than held, and the place in EARLY
_LONGER = ((0, 2), (1, 0), (1, 2), (2, 0), (2, 2), (3, 0))
_SMALL_SHARES = (0.3, 0.5, 1.0)  # of the small model's steps that are computed beside a cache
_OFFICIAL = (0.01, 0.03)  # SRDiffusion's delta as its authors and others use it
_TAILS = (1, 3)  # steps
_Level = TypeVar("_Level")
_GROWTH, _FASTER = 1.25, 1.5  # from one level to the next: of large steps, of computed ones
_SURE = 2  # levels in a row that miss for sure, after which fewer steps are not tried
_ENOUGH = 2  # levels that held, for the proof to choose from
_RULES_TURN = 5  # the trial that is MixCache's own rule
_SAMPLERS_TURN = 10  # every so many trials: rules have a chance, masks are found without it
_FEWER = 3  # numbers of steps that are tried where the two disagree most


class Ladders:
    """The proposals of one space, given what was tried so far."""

    def __init__(
        self, space: Space, proof_prompts: int = PROOF_PROMPTS, warm: Sequence[Proposal] = ()
    ) -> None:
        """Take a space; it says whether there are hand-offs.

        Args:
            space: Of the search.
            proof_prompts: How many prompts the proof will take.
            warm: Policies of other searches, which come first.
        """
        self._space = space
        self._warm = warm
        self._proof_prompts = proof_prompts

    def next(self, done: Sequence[Trial]) -> Proposal | None:
        """Return the next proposal that was not tried yet, None when enough is known."""
        tried = {trial.policy.id for trial in done if not undecided(trial)}
        for proposal in self._warm:
            if proposal.policy is not None and proposal.policy.id not in tried:
                return proposal
        if foreseeable(self._space, done):
            return self._foreseen(done, tried)
        for proposal in self._proposals(done):
            if self._space.policy(proposal.parameters).id not in tried:
                return proposal
        return None

    def _foreseen(self, done: Sequence[Trial], tried: Collection[str]) -> Proposal | None:
        """Return what is predicted to be best; now and then the rules have their turn."""
        default = self._space.default()
        if len(done) == _RULES_TURN and self._space.policy(default.parameters).id not in tried:
            return default
        if len(done) % _SAMPLERS_TURN == _SAMPLERS_TURN - 1:
            return None
        return proposed(self._space, done, self._proof_prompts)

    def _proposals(self, done: Sequence[Trial]) -> Iterator[Proposal]:
        space = self._space
        caches = bracket(_levels(done, _computed), space.fewest, space.steps)
        budget = next_level(caches)
        if budget is not None:
            yield space.prior(budget)
        if space.hands_over:
            yield from self._hand_offs(done, caches)
        yield from self._other_masks(caches)
        yield space.default()

    def _other_masks(self, caches: Bracket) -> Iterator[Proposal]:
        """One step less may still hold with its steps placed otherwise.

        A few more steps follow, also placed for prompts whose early errors grow more: the proof may
        not bear out what held on a few prompts.
        """
        space, held = self._space, caches.held
        if held > space.fewest:
            yield from (space.prior(held - 1, early) for early in EARLY)
        for more, place in _LONGER:
            if held + more < space.steps:
                yield space.prior(held + more, EARLY[place])

    def _hand_offs(self, done: Sequence[Trial], caches: Bracket) -> Iterator[Proposal]:
        """Give the large model fewer and fewer steps: the first ones, the last ones, some between.

        Where the two disagree the most at first, the small model never begins.
        """
        space = self._space
        curve = space.disagreement
        guess = None if curve is None else first_guess(curve)
        yield from self._switches(done, guess)
        if guess is None:
            last = partial(self._window, slice(None, space.steps))
            yield from (self._at(n, space.steps) for n in _downwards(done, last, space.steps))
            start = space.steps - min(_certain(done, last), default=space.steps)
            middle = partial(self._window, slice(start, None))
            for large_steps in _downwards(done, middle, space.steps - start):
                yield self._at(large_steps, start + large_steps)
        if held := self._held(done):
            for window in dict.fromkeys(held[len(held) * third // 3] for third in range(3)):
                yield from self._with_cache(done, window, caches)
            yield from self._around(held[0])
        for delta in _OFFICIAL:
            yield space.handed_over(handoff="adaptive", delta=delta)

    def _switches(self, done: Sequence[Trial], guess: int | None) -> Iterator[Proposal]:
        """Switch earlier and earlier, first where the disagreement has settled.

        Waiting beyond the step at which the two agree best is not worth a video.
        """
        space = self._space
        first = partial(self._window, slice(0, None))
        most = space.steps
        if guess is not None and space.disagreement is not None:
            most = min(latest(space.disagreement) + 1, most)
            yield self._at(min(guess, most - 1))
            if min(_certain(done, first), default=most) <= guess:
                most = guess
        yield from (self._at(large_steps) for large_steps in _downwards(done, first, most))

    def _held(self, done: Sequence[Trial]) -> list[range]:
        """Return the large model's steps in every hand-off without a cache that held, few first."""
        found = {w for w in _certain(done, self._alone) if len(w) < self._space.steps}
        return sorted(found, key=lambda window: (len(window), window.start))

    def _with_cache(
        self, done: Sequence[Trial], window: range, caches: Bracket
    ) -> Iterator[Proposal]:
        """What holds without a cache gets one, of more and more computed steps until some held.

        With all of them it is what holds already. Then the small model computes another share.
        """
        space = self._space
        by_policy = {
            space.policy(self._cached(window, budget).parameters).id: budget
            for budget in range(caches.held, space.steps)
        }
        held = _certain(done, lambda policy: by_policy.get(policy.id))
        budgets = (*_upwards(caches.held, space.steps),) if len(held) < _ENOUGH else ()
        yield from (self._cached(window, budget) for budget in budgets)
        for share in _SMALL_SHARES if held else ():
            yield self._cached(window, min(held), share)

    def _around(self, window: range) -> Iterator[Proposal]:
        """The steps of greatest disagreement are the large model's, or it comes back at the end."""
        space = self._space
        if space.disagreement is not None:
            for fewer in range(min(_FEWER, len(window))):
                share = (len(window) - fewer) / space.steps
                yield space.handed_over(handoff="ranked", handoff_frac=share)
        for tail in _TAILS if window.stop < space.steps else ():
            if tail < len(window) - 1:
                yield self._at(len(window) - 1, window.stop - 1 - tail, tail_steps=tail)

    def _cached(self, window: range, budget: int, small_share: float | None = None) -> Proposal:
        """Return a hand-off with a mask; the small model computes twice the share if none is given.

        A step of the small one costs little.
        """
        share = budget / self._space.steps
        own = min(2.0 * share, 1.0) if small_share is None else small_share
        return self._at(len(window), window.stop, cached=(share, own))

    def _at(
        self,
        large_steps: int,
        end: int | None = None,
        *,
        cached: tuple[float, float] | None = None,
        tail_steps: int = 0,
    ) -> Proposal:
        """Return a hand-off that leaves some steps to the large model, before `end` and as a tail.

        Without an end they are the first ones.

        Args:
            large_steps: The tail among them.
            end: Of those that are no tail.
            cached: The share of its steps that each model computes; without, there is no cache.
            tail_steps: At the very end.
        """
        steps = self._space.steps
        head_steps = 0 if end is None else end - (large_steps - tail_steps)
        chosen: dict[str, float | int | str] = {
            "handoff_frac": large_steps / steps,
            "head_frac": head_steps / steps,
            "tail_steps": tail_steps,
        }
        if cached is not None:
            chosen["compute_frac"], chosen["small_compute_frac"] = cached
        return self._space.handed_over(**chosen)

    def _window(self, bounds: slice, policy: Policy) -> int | None:
        """Return how many steps are the large model's, where they begin or stop as asked."""
        window = self._alone(policy)
        if window is None or bounds.start not in (None, window.start):
            return None
        return len(window) if bounds.stop in (None, window.stop) else None

    def _alone(self, policy: Policy) -> range | None:
        return large_window(policy, self._space.sigmas)


def _computed(policy: Policy) -> int | None:
    """Return how many steps a mask of whole steps without a hand-off computes."""
    if not whole_mask(policy) or not isinstance(policy.cache, MaskCache):
        return None
    return policy.cache.actions.count("full")


def _tells(trial: Trial) -> bool:
    """Whether a trial tells of a level: a ladder proposed it, or it came from elsewhere and held.

    Where the latter missed, its steps or its payload may only be wrong for this model.
    """
    if undecided(trial):
        return False
    return trial.source == "prior" or (trial.source == "warm" and trial.feasible)


def _levels(
    trials: Sequence[Trial], level: Callable[[Policy], int | None]
) -> Iterator[tuple[int, bool]]:
    """Yield the levels of those trials that tell of one, and whether they may hold."""
    for trial in trials:
        found = level(trial.policy) if _tells(trial) else None
        if found is not None:
            yield found, trial.state == "complete" and trial.reason is None


def _certain(trials: Sequence[Trial], level: Callable[[Policy], _Level | None]) -> list[_Level]:
    """Return the levels that held, and did not just escape a floor by their bound."""
    found = (level(t.policy) for t in trials if _tells(t) and t.feasible)
    return [each for each in found if each is not None]


def _downwards(
    trials: Sequence[Trial], level: Callable[[Policy], int | None], most: int
) -> Iterator[int]:
    """Yield levels below the greatest until some in a row miss for sure, then those between.

    Where a metric counts, a trial is right about three times in four. A bisection would follow its
    first stroke of luck; here each level stands for itself, and the proof has some to choose from.
    """
    known = dict(_levels(trials, level))
    missed, below = 0, most
    while missed < _SURE and (below := min(round(below / _GROWTH), below - 1)) > 0:
        yield below
        missed = 0 if known.get(below, True) else missed + 1
    between = next_level(bracket(known.items(), 1, most))
    if between is not None and any(known.values()):
        yield between


def _upwards(level: int, most: int) -> Iterator[int]:
    """Yield a level and those above it that grow evenly, below the greatest."""
    while level < most:
        yield level
        level = max(round(_FASTER * level), level + 1)
