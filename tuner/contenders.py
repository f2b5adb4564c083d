"""Which policies a search sends to the proof, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ditune.db.policy import Policy
from ditune.db.records import Constraint, Trial
from ditune.tuner.confirm import Candidates, Listed, Looked
from ditune.tuner.frontier import Choice, Frontier, Glimpse, foreseeable, spreads
from ditune.tuner.handoffs import large_window, switched
from ditune.tuner.pace import candidates
from ditune.tuner.quality import counts
from ditune.tuner.space import Space

_WORTH = 0.01  # of the speedup: what a look at a candidate costs, and so has to promise
_MORE_OF_COUNTS = 3  # times as many candidates: a few videos say little of what counts


class Narrowed:
    """Some policies, the fastest first, then the hand-offs between what held and what did not.

    A ladder leaves steps of a fifth between its levels, because a few dozen videos cannot tell
    closer ones apart; the proof can.
    """

    def __init__(self, policies: Sequence[Policy], sigmas: Sequence[float]) -> None:
        """Take the policies.

        Args:
            policies: The fastest first.
            sigmas: Noise level of each step.
        """
        self._listed = Listed(policies)
        self._sigmas = sigmas

    def next(self, looked: Sequence[Looked]) -> Policy | None:
        """Return the next one; once one held, half of the way to the nearest that did not."""
        held = [each.policy for each in looked if not each.reason]
        if not held:
            return self._listed.next(looked)
        best = large_window(held[-1], self._sigmas)
        windows = (large_window(e.policy, self._sigmas) for e in looked if e.reason)
        missed = [window for window in windows if window is not None]
        if best is None:
            return None
        ends = max((len(w) for w in missed if w.stop == best.stop), default=0)
        starts = max((len(w) for w in missed if w.start == best.start), default=0)
        for fewer, at_end in ((ends, True), (starts, False)):
            middle = (len(best) + fewer) // 2
            if 0 < fewer < middle < len(best):
                head_steps = best.stop - middle if at_end else best.start
                return Policy(handoff=switched(self._sigmas, middle, head_steps=head_steps))
        return None


class Foreseen:
    """Candidates for the proof: what is fastest and probably passes, by all that was measured."""

    def __init__(
        self, space: Space, trials: Sequence[Trial], proof_prompts: int, most: int
    ) -> None:
        """Take what the search measured.

        Args:
            space: Of the search.
            trials: Of the search.
            proof_prompts: How many prompts a candidate is measured on.
            most: How many candidates to look at.
        """
        self._space = space
        self._trials = trials
        self._proof_prompts = proof_prompts
        self._most = most

    def next(self, looked: Sequence[Looked]) -> Policy | None:
        """Return the one to look at next; None where none promises much over the best that held.

        A look that misses is short. One that holds takes all prompts, and so does every look
        after it that holds as well. So the fast come first, even those that will hardly hold.
        """
        if len(looked) == self._most:
            return None
        glimpses = [_glimpse(each) for each in looked]
        frontier = Frontier(self._space, self._trials, glimpses, self._proof_prompts)
        choices = frontier.choices(elsewhere=True)
        seen = {each.policy: each for each in looked}
        held = [c.speedup for c in choices if c.policy in seen and not seen[c.policy].reason]
        missed = [c.speedup for c in choices if c.policy in seen and seen[c.policy].reason]
        known, little = max(held, default=1.0), _WORTH if held else 0.0
        fresh = [_doubted(choice, missed) for choice in choices if choice.policy not in seen]
        worth = [choice for choice in fresh if choice.promise(known) > little]
        best = max(worth, key=lambda choice: choice.reserve(_WORTH), default=None)
        return None if best is None else best.policy


def _doubted(choice: Choice, missed: Sequence[float]) -> Choice:
    """Return a choice whose chance is halved by every miss of what is no faster.

    What is foreseen is the level of all prompts. Where one of them falls alone, masks like the one
    that missed look certain to pass, one after the other.

    Args:
        choice: By what is foreseen.
        missed: Speedups of the candidates that missed.
    """
    slower = sum(speedup <= choice.speedup * (1.0 + _WORTH) for speedup in missed)
    return replace(choice, chance=choice.chance * 0.5**slower)


def _glimpse(looked: Looked) -> Glimpse:
    known = spreads(looked.quality, looked.values) if len(looked.values) > 1 else None
    return Glimpse(looked.policy, looked.quality, known, elsewhere=True)


def to_prove(
    trials: Sequence[Trial],
    space: Space,
    constraints: Sequence[Constraint],
    proof_prompts: int,
    most: int,
) -> Candidates:
    """Return the candidates of a search.

    Args:
        trials: Of the search.
        space: Of the search.
        constraints: The floors.
        proof_prompts: How many prompts a candidate is measured on.
        most: How many candidates to look at; three times as many where a metric counts.
    """
    if foreseeable(space, trials):
        return Foreseen(space, trials, proof_prompts, most)
    if any(map(counts, constraints)):
        most *= _MORE_OF_COUNTS
    policies = [trial.policy for trial in candidates(trials, most, space.pace(trials))]
    return Narrowed(policies, space.sigmas)
