"""How many steps to compute: bisection with the profile's own masks, before the sampler takes over.

A video costs seconds to minutes, and the number of computed steps decides most of both speed and
quality. A handful of trials finds where the floors begin to break; the sampler starts there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ditune.db.policy import MaskCache
from ditune.db.records import Trial


@dataclass(frozen=True)
class Bracket:
    """The fewest computed steps that held so far, and the most below them that did not."""

    held: int
    missed: int


def bracket(trials: Sequence[Trial], fewest: int, steps: int) -> Bracket:
    """Return what is known: computing all steps holds, computing fewer than `fewest` cannot be.

    Args:
        trials: Those of the study so far; only the ones marked "prior" count.
        fewest: The least that a mask can compute.
        steps: Of the workload.
    """
    held, missed = {steps}, {fewest - 1}
    for trial in trials:
        cache = trial.policy.cache
        if trial.source == "prior" and isinstance(cache, MaskCache):
            (held if trial.feasible else missed).add(cache.actions.count("full"))
    least = min(held)
    return Bracket(least, max((count for count in missed if count < least), default=least - 1))


def next_budget(trials: Sequence[Trial], fewest: int, steps: int) -> int | None:
    """Return how many steps the next mask should compute, None when the bracket is closed.

    Quality is taken to fall with every computed step that is left out; see `bracket` for the
    arguments.
    """
    known = bracket(trials, fewest, steps)
    if known.held - known.missed <= 1:
        return None
    middle = round(math.sqrt(known.held * max(known.missed, 1)))
    return min(max(middle, known.missed + 1), known.held - 1)
