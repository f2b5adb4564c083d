"""diffusers' SeaCache: filtered latents decide, residuals are extrapolated in a line."""

from __future__ import annotations

from functools import partial
from itertools import product

from diffusers.hooks import SeaCacheConfig

from ditune.tuner.peers.contract import Setting, cached
from ditune.tuner.source import Source

_THRESHOLDS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.55, 0.8, 1.2)
_LONGEST = (2, 3, 5, 7)


def settings(source: Source) -> list[Setting]:
    """Return its threshold and its longest run of reused steps, swept around the defaults."""
    return [
        Setting(
            f"threshold {t:g}, at most {longest} in a row",
            partial(cached, config=SeaCacheConfig(threshold=t, max_consecutive_cached=longest)),
        )
        for longest, t in product(_LONGEST, _THRESHOLDS)
    ]
