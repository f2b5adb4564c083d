"""diffusers' FirstBlockCache: the first block's residual decides over all others."""

from __future__ import annotations

from functools import partial

from diffusers import FirstBlockCacheConfig

from ditune.tuner.peers.contract import Setting, cached
from ditune.tuner.source import Source

_THRESHOLDS = (
    *(0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07),
    *(0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.4),
)


def settings(source: Source) -> list[Setting]:
    """Return its only knob swept from cautious to far beyond the advice of its authors (0.2)."""
    return [
        Setting(f"threshold {t:g}", partial(cached, config=FirstBlockCacheConfig(threshold=t)))
        for t in _THRESHOLDS
    ]
