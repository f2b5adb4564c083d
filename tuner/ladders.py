"""What a search tries before its sampler: the profile's own proposals, each where the last one led.

Three families are climbed, one after the other: caches, hand-offs, both together. Each has one
number that decides the most, and is bisected over it. Variants around what held follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from ditune.db.policy import Handoff, MaskCache, Policy
from ditune.db.records import Trial
from ditune.tuner.budgets import Bracket, bracket, next_level
from ditune.tuner.handoffs import first_guess, latest, small_steps
from ditune.tuner.space import EARLY, Proposal, Space

# how many steps more than held, and the place in EARLY
_LONGER = ((0, 2), (1, 0), (1, 2), (2, 0), (2, 2), (3, 0))
_SMALL_SHARES = (0.3, 0.5, 1.0)  # of the small model's steps that are computed beside a cache
_OFFICIAL = (0.01, 0.03)  # SRDiffusion's delta as its authors and others use it
_TAILS = (1, 3)  # steps
_WIDER = 2  # steps more of the large model beside a cache
_FEWER = 3  # numbers of steps that are tried where the two disagree most


class Ladders:
    """The proposals of one space, given what was tried so far."""

    def __init__(self, space: Space) -> None:
        """Take a space; it says whether there are hand-offs."""
        self._space = space

    def next(self, done: Sequence[Trial]) -> Proposal | None:
        """Return the next proposal that was not tried yet, None when enough is known."""
        tried = {trial.policy.id for trial in done}
        for proposal in self._proposals(done):
            if self._space.policy(proposal.parameters).id not in tried:
                return proposal
        return None

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
        """Bisect over where the large model's steps end, then over how many of them it needs.

        Where the two disagree the most at first, the small model gets no first steps, and waiting
        beyond the step at which they agree best is not worth a video. Where no switch holds, the
        large model's steps end with the last one.
        """
        space = self._space
        curve = space.disagreement
        guess = None if curve is None else first_guess(curve)
        never = space.steps
        if curve is not None and guess is not None:
            never = min(latest(curve) + 1, never)
        levels = list(_levels(done, self._switch))
        switch = bracket(levels, 1, never)
        step = next_level(switch)
        if step is not None:
            yield self._at(step if guess is None or levels else min(guess, never - 1))
        end = switch.held if (switch.held, True) in levels else space.steps
        fewest = 1 if guess is None else end
        window = bracket(_levels(done, partial(self._window, end)), fewest, end)
        step = next_level(window)
        if step is not None:
            yield self._at(step, end)
        if window.held < space.steps:
            yield from self._with_cache(done, window.held, end, caches)
            yield from self._around(window.held, end)
        for delta in _OFFICIAL:
            yield space.handed_over(handoff="adaptive", delta=delta)

    def _with_cache(
        self, done: Sequence[Trial], large_steps: int, end: int, caches: Bracket
    ) -> Iterator[Proposal]:
        """Bisect over the steps that are computed: all of them is what holds without a cache.

        Then the small model computes another share, or the large one has more steps.
        """
        space = self._space
        by_policy = {
            space.policy(self._cached(large_steps, end, budget).parameters).id: budget
            for budget in range(caches.held, space.steps)
        }
        levels = _levels(done, lambda policy: by_policy.get(policy.id))
        known = bracket(levels, caches.held, space.steps)
        budget = next_level(known)
        if budget is not None:
            yield self._cached(large_steps, end, budget)
        if known.held < space.steps:
            for share in _SMALL_SHARES:
                yield self._cached(large_steps, end, known.held, share)
        if large_steps + _WIDER <= end:
            yield self._cached(large_steps + _WIDER, end, known.held)

    def _around(self, large_steps: int, end: int) -> Iterator[Proposal]:
        """The steps of greatest disagreement are the large model's, or it comes back at the end."""
        space = self._space
        if space.disagreement is not None:
            for fewer in range(min(_FEWER, large_steps)):
                share = (large_steps - fewer) / space.steps
                yield space.handed_over(handoff="ranked", handoff_frac=share)
        for tail in _TAILS:
            if tail < large_steps - 1:
                yield self._at(large_steps - 1, end - 1 - tail, tail_steps=tail)

    def _cached(
        self, large_steps: int, end: int, budget: int, small_share: float | None = None
    ) -> Proposal:
        """Return a hand-off with a mask; the small model computes twice the share if none is given.

        A step of the small one costs little.
        """
        share = budget / self._space.steps
        own = min(2.0 * share, 1.0) if small_share is None else small_share
        return self._at(large_steps, end, cached=(share, own))

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

    def _switch(self, policy: Policy) -> int | None:
        """Return after how many steps a hand-off without a cache switches for good."""
        if policy.cache is not None or not isinstance(policy.handoff, Handoff):
            return None
        return len(self._large(policy)) if policy.handoff.until is None else None

    def _window(self, end: int, policy: Policy) -> int | None:
        """Return how many steps before an end are the large model's, without a cache."""
        large = self._large(policy)
        if not large or policy.cache or large != list(range(end - len(large), end)):
            return None
        return len(large)

    def _large(self, policy: Policy) -> list[int]:
        """Return the steps of the large model, none where it has all of them."""
        small = set(small_steps(policy.handoff, self._space.sigmas))
        return [step for step in range(self._space.steps) if step not in small] if small else []


def _computed(policy: Policy) -> int | None:
    """Return how many steps a mask without a hand-off computes."""
    if policy.handoff is not None or not isinstance(policy.cache, MaskCache):
        return None
    return policy.cache.actions.count("full")


def _levels(
    trials: Sequence[Trial], level: Callable[[Policy], int | None]
) -> Iterator[tuple[int, bool]]:
    """Yield the levels of those trials that a ladder proposed, and whether they held."""
    for trial in trials:
        found = level(trial.policy) if trial.source == "prior" else None
        if found is not None:
            yield found, trial.feasible
