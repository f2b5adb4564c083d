"""When to reuse and at which granularity: pure decisions from floats and indices.

Nothing here knows tensors, models or pipelines. A trigger is asked once per step and told, after a
step that was computed in full, how wrong its caches would have been.
Source: MixCache (arXiv 2508.12691); the numbers it leaves open are explained in `RuleCache`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from ditune.db.policy import Action, CachePolicy, Granularity, MaskCache, RuleCache

INTERVAL_MIN = 2  # one full step, then at least one cached


@dataclass(frozen=True)
class Measured:
    """What a full step showed.

    Attributes:
        deviation: Relative L1 error that reusing the whole step would have made here, >= 0; None
            where an indicator decides.
        distances: Change per skipped step of what each granularity reuses, relative L1, >= 0.
    """

    deviation: float | None
    distances: Mapping[Granularity, float]


class Trigger(Protocol):
    """Decides each step's action; a trigger lives for one pipeline call."""

    def decide(self, step: int, change: float | None = None) -> Action:
        """Return what to do at a step; called once per step, in order.

        `change` is how much the indicator moved: since the step before where changes are added up,
        else since the last full step; None if nothing measured it.
        """

    def observe(self, step: int, measured: Measured | None) -> None:
        """Take note of a step that was computed in full."""

    def restart(self) -> None:
        """Forget what was measured: another model has come in."""


class MaskTrigger:
    """Follow an explicit list; a granularity that the model lacks becomes a full step."""

    def __init__(self, mask: MaskCache, supported: Collection[Granularity]) -> None:
        """Fix the list for one call."""
        self._actions = [a if a == "full" or a in supported else "full" for a in mask.actions]

    def decide(self, step: int, change: float | None = None) -> Action:
        """Return the listed action."""
        return self._actions[step]

    def observe(self, step: int, measured: Measured | None) -> None:
        """Ignore what was measured: the list is explicit."""

    def restart(self) -> None:
        """Nothing to forget: the list goes on."""


class RuleTrigger:
    """MixCache's context-aware trigger and adaptive hybrid decision.

    A period is one full step and `interval - 1` cached ones. At full steps the deviation moves the
    interval: above delta2 it shrinks, below delta1 it grows. With an indicator a period lasts until
    the indicator has moved by the threshold, and `interval_max` steps at most. At cached steps the
    granularity with the smallest distance x impact x repeat penalty is taken.
    """

    def __init__(self, rule: RuleCache, steps: int, supported: Collection[Granularity]) -> None:
        """Start a call of `steps` steps on a model that supports some granularities."""
        self.rule = rule
        self.steps = steps
        self.allowed = tuple(g for g in rule.granularities if g in supported)
        self.warmup_steps = math.ceil(rule.warmup_frac * steps)
        self.interval = rule.interval_init
        self.last_full = -1
        self.previous: Granularity | None = None
        self.distances: dict[Granularity, float] = {}
        self._impact: dict[Granularity, float] = {
            "step": rule.impact_step,
            "cfg": rule.impact_cfg,
            "block": rule.impact_block,
        }
        self._full_steps = 0
        self._moved = 0.0  # how far the indicator went since the last full step

    def decide(self, step: int, change: float | None = None) -> Action:
        """Return the action for a step."""
        if self._must_compute(step, change):
            self._moved = 0.0
            return "full"
        chosen = min(self.allowed, key=self._penalty)
        self.previous = chosen
        return chosen

    def observe(self, step: int, measured: Measured | None) -> None:
        """Adapt the interval to a full step; `measured` is None until caches existed."""
        self.last_full = step
        self._full_steps += 1
        if measured is None:
            return
        self.distances.update(measured.distances)
        delta2 = self.rule.delta2
        if measured.deviation is None:
            return
        if measured.deviation > delta2:
            self.interval = max(INTERVAL_MIN, self.interval - 1)
        elif measured.deviation < self.rule.delta1_ratio * delta2:
            self.interval = min(self.rule.interval_max, self.interval + 1)

    def restart(self) -> None:
        """Measure two full steps of the new model before anything is reused; the interval stays."""
        self._full_steps = 0
        self.distances.clear()

    def _must_compute(self, step: int, change: float | None) -> bool:
        protected = step < self.warmup_steps or step >= self.steps - self.rule.cooldown_steps
        due = self._moved_enough(change) or step - self.last_full >= self._longest
        return protected or due or self._full_steps < 2 or not self.allowed

    @property
    def _longest(self) -> int:
        return self.interval if self.rule.indicator is None else self.rule.interval_max

    def _moved_enough(self, change: float | None) -> bool:
        if self.rule.indicator is None:
            return False
        if change is None:  # nobody knows: compute
            return True
        self._moved = self._moved + change if self.rule.accumulated else change
        return self._moved >= self.rule.threshold

    def _penalty(self, granularity: Granularity) -> float:
        repeated = self.rule.repeat_penalty if granularity == self.previous else 1.0
        distance = self.distances.get(granularity, 1.0)  # unknown: as bad as a full change
        return distance * self._impact[granularity] * repeated


def trigger_for(cache: CachePolicy, steps: int, supported: Collection[Granularity]) -> Trigger:
    """Return the trigger of a cache policy for one call."""
    if isinstance(cache, MaskCache):
        return MaskTrigger(cache, supported)
    return RuleTrigger(cache, steps, supported)
