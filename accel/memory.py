"""What a policy's caches will hold, known before it runs."""

from __future__ import annotations

from ditune.db.policy import CachePolicy, MaskCache
from ditune.db.records import ForwardBytes


def planned_bytes(cache: CachePolicy, sizes: ForwardBytes) -> int:
    """Return the memory that the caches of one denoiser hold once they are full.

    Args:
        cache: What is cached, and how many values of each.
        sizes: Of one forward of the plain pipeline, and how many branches there are.
    """
    compares = False
    if isinstance(cache, MaskCache):
        actions = set(cache.actions)
    else:  # a rule without an indicator, or with a choice, compares outputs
        actions = set(cache.granularities)
        compares = cache.indicator is None or len(actions) > 1
    hidden = "step" in actions and cache.payload.form == "hidden"
    outputs = compares or ("step" in actions and not hidden)
    each_branch = outputs * sizes.output + (hidden + ("block" in actions)) * sizes.hidden
    guidance = ("cfg" in actions and sizes.branches > 1) * sizes.output
    return (cache.payload.order + 1) * (sizes.branches * each_branch + guidance)
