"""What a search tries before its sampler: the profile's own proposals, each where the last one led.

Three families are climbed, one after the other: caches, hand-offs, both together. Each has one
number that decides the most, and is bisected over it. Variants around what held follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ditune.db.policy import BandedHandoff, Handoff, MaskCache, Policy
from ditune.db.records import Trial
from ditune.tuner.budgets import Bracket, bracket, next_level
from ditune.tuner.handoffs import first_guess, latest, small_steps
from ditune.tuner.space import EARLY, Proposal, Space

# how many steps more than held, and the place in EARLY
_LONGER = ((0, 2), (1, 0), (1, 2), (2, 0), (2, 2), (3, 0))
_SMALL_SHARES = (0.3, 0.5, 1.0)  # of the small model's steps that are computed beside a cache
_OFFICIAL = (0.01, 0.03)  # SRDiffusion's delta as its authors and others use it
_TAILS = (1, 3)  # steps


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
        """Bisect over the large model's steps, without a cache and with one.

        Waiting beyond the step at which the two agree best is not worth a video. Where they agree
        well from the start, the steps at which they do not come first, wherever those are.
        """
        space = self._space
        curve = space.disagreement
        never = space.steps if curve is None else min(latest(curve) + 1, space.steps)
        if curve is not None and first_guess(curve) is None:
            yield from self._by_disagreement(done, caches)
        levels = list(_levels(done, self._switch))
        alone = bracket(levels, 1, never)
        step = next_level(alone)
        if step is not None:
            guess = None if curve is None or levels else first_guess(curve)
            yield self._at(step if guess is None else min(guess, never - 1))
        both = bracket(_levels(done, self._switch_with_cache), 1, never)
        step = next_level(both)
        if step is not None:
            yield self._at(step, caches)
        if both.held < never:
            yield from self._around_both(both.held, caches)
        if alone.held < never:
            yield from self._around_alone(alone.held)
        for delta in _OFFICIAL:
            yield space.handed_over(handoff="adaptive", delta=delta)

    def _by_disagreement(self, done: Sequence[Trial], caches: Bracket) -> Iterator[Proposal]:
        """The small model takes the steps that agree best, however they lie.

        Of a curve that falls from the start these are the last ones, as of a switch. Bisected over
        the large model's steps; then with a cache beside.
        """
        space = self._space
        known = bracket(_levels(done, self._ranked), 1, space.steps)
        step = next_level(known)
        if step is not None:
            yield space.handed_over(handoff="ranked", handoff_frac=step / space.steps)
        if known.held < space.steps:
            for share in _SMALL_SHARES:
                yield space.handed_over(
                    handoff="ranked",
                    handoff_frac=known.held / space.steps,
                    compute_frac=caches.held / space.steps,
                    small_compute_frac=share,
                )

    def _around_both(self, held: int, caches: Bracket) -> Iterator[Proposal]:
        """More or less is computed, the large model comes back, the switch comes a step earlier."""
        for large_steps in dict.fromkeys((held, max(held - 1, 1))):
            for share in _SMALL_SHARES:
                yield self._at(large_steps, caches, small_share=share)
        for tail in _TAILS:
            yield self._at(max(held - 1, 1) + tail, caches, tail_steps=tail)

    def _around_alone(self, held: int) -> Iterator[Proposal]:
        """The steps of greatest disagreement are the large model's, or it comes back at the end."""
        space = self._space
        if space.disagreement is not None:
            for large_steps in dict.fromkeys((held, max(held - 1, 1), max(held - 2, 1))):
                share = large_steps / space.steps
                yield space.handed_over(handoff="ranked", handoff_frac=share)
        for tail in _TAILS:
            if held - 1 > tail:
                yield self._at(held - 1, tail_steps=tail)

    def _at(
        self,
        large_steps: int,
        caches: Bracket | None = None,
        *,
        small_share: float | None = None,
        tail_steps: int = 0,
    ) -> Proposal:
        """Return a hand-off to the small model for all but some steps.

        With a cache the large model computes its part of what held; the small one, whose steps cost
        little, a share of its own, twice as much if none is given.
        """
        space = self._space
        chosen: dict[str, float | int | str] = {
            "handoff_frac": large_steps / space.steps,
            "tail_steps": tail_steps,
        }
        if caches is not None:
            share = caches.held / space.steps
            own = 2.0 * share if small_share is None else small_share
            chosen |= {"compute_frac": share, "small_compute_frac": min(own, 1.0)}
        return space.handed_over(**chosen)

    def _switch(self, policy: Policy) -> int | None:
        """Return after how many steps a hand-off without a cache switches for good."""
        return self._steps_before(policy) if policy.cache is None else None

    def _switch_with_cache(self, policy: Policy) -> int | None:
        """Return after how many steps a hand-off with a mask switches for good."""
        return self._steps_before(policy) if isinstance(policy.cache, MaskCache) else None

    def _ranked(self, policy: Policy) -> int | None:
        """Return how many steps a hand-off by disagreement without a cache leaves to the large."""
        if policy.cache is not None or not isinstance(policy.handoff, BandedHandoff):
            return None
        return self._space.steps - len(small_steps(policy.handoff, self._space.sigmas))

    def _steps_before(self, policy: Policy) -> int | None:
        handoff = policy.handoff
        if not isinstance(handoff, Handoff) or handoff.until is not None:
            return None
        return self._space.steps - len(small_steps(handoff, self._space.sigmas))


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
