"""Rules of our own after TeaCache and EasyCache, which are scripts to copy and not libraries.

Both keep the first fifth of the steps and the last one, reuse what was computed last as it is, and
add an indicator up until it reaches the threshold. After TeaCache: the change of the timestep's
embedding, without the polynomial that its authors fit to each checkpoint; whole-stack residuals are
reused. After EasyCache: the change of the latents; output minus input is reused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from ditune.accel.apply import accelerate
from ditune.db.policy import Indicator, Payload, Policy, RuleCache
from ditune.tuner.peers.contract import Setting
from ditune.tuner.source import Source

_THRESHOLDS = (
    *(0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.13, 0.17),
    *(0.22, 0.3, 0.4, 0.5, 0.7, 0.9, 1.2, 1.6),
)


def timestep(source: Source) -> list[Setting]:
    """Return the rule after TeaCache with its threshold swept."""
    return [_setting("timestep", "hidden", t) for t in _THRESHOLDS]


def latent(source: Source) -> list[Setting]:
    """Return the rule after EasyCache with its threshold swept."""
    return [_setting("latent", "latent", t) for t in _THRESHOLDS]


def _setting(indicator: Indicator, form: Literal["hidden", "latent"], threshold: float) -> Setting:
    cache = RuleCache(
        indicator=indicator,
        threshold=threshold,
        payload=Payload(form=form, order=0),
        allowed=("step",),
        interval_max=8,
    )
    return Setting(f"threshold {threshold:g}", partial(_on, policy=Policy(cache=cache)))


@contextmanager
def _on(pipe: Any, policy: Policy) -> Iterator[Mapping[str, Any]]:
    with accelerate(pipe, policy):
        yield {}
