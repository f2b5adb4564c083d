"""How many steps to compute: bisection with the profile's own masks, before the sampler takes over.

A video costs seconds to minutes, and the number of computed steps decides most of both speed and
quality. A handful of trials finds where the floors begin to break; the sampler starts there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ditune.db.records import MaskCache, Trial


def next_budget(trials: Sequence[Trial], fewest: int, steps: int) -> int | None:
    """Return how many steps the next mask should compute, None when the bracket is closed.

    Quality is taken to fall with every computed step that is left out.

    Args:
        trials: Those of the study so far; only the ones marked "prior" count.
        fewest: The least that a mask can compute.
        steps: Of the workload; computing all of them holds every floor.
    """
    held, missed = steps, fewest - 1
    for trial in trials:
        cache = trial.policy.cache
        if trial.source != "prior" or not isinstance(cache, MaskCache):
            continue
        computed = cache.actions.count("full")
        if trial.feasible:
            held = min(held, computed)
        else:
            missed = max(missed, computed)
    if held - missed <= 1:
        return None
    middle = round(math.sqrt(held * max(missed, 1)))
    return min(max(middle, missed + 1), held - 1)
