"""One decision per step, and the guard that ends caching when it cannot be trusted."""

from __future__ import annotations

import logging
import math
from typing import get_args

import torch
from torch import Tensor

from ditune.accel.indicator import Measure
from ditune.accel.mixcache import Ask, MixCache, Place, Tally
from ditune.accel.payload import relative_l1
from ditune.accel.trigger import Measured, Trigger
from ditune.db.policy import Action, CachePolicy, Granularity, MaskCache, RuleCache

_CHANGE = "change"
_log = logging.getLogger("ditune")


class StepPlan:
    """One decision per step, shared by both branches and both experts of a call.

    Everything that a decision needs is read from the device at once: a rule synchronises at most
    once per step, a mask never.
    """

    def __init__(
        self, cache: CachePolicy, trigger: Trigger, tally: Tally, measure: Measure | None
    ) -> None:
        """Start before the first step; `measure` is None where the policy has no indicator."""
        self._cache = cache
        self._trigger = trigger
        self._tally = tally
        self._measure = measure
        self._step = -1
        self._action: Action = "full"
        self._used: MixCache | None = None
        self._shape: torch.Size | None = None
        self._adds_up = isinstance(cache, RuleCache) and cache.accumulated
        self._before: Tensor | None = None  # what the indicator is compared with
        self._off = False

    def action(
        self, place: Place, sigma: float | None, timestep: Tensor | None, cache: MixCache
    ) -> Action | Ask:
        """Return the step's action, deciding it when the step is new.

        Where the front blocks are the indicator, the step's first forward gets a question instead.
        A model that comes in after others has nothing to reuse: its first step is full. The one
        that goes forgets what it holds: should it come back, that would be too old.
        """
        if place.step == self._step:
            self._used = cache
            return self._action
        if self._used is not None and cache is not self._used:
            self._used.clear()
        if isinstance(self._cache, RuleCache) and self._cache.indicator == "first_block":
            return lambda front: self._decided(place, front, cache)
        measure = None if self._off else self._measure
        signal = measure(place.latents, sigma, timestep) if measure is not None else None
        return self._decided(place, signal, cache)

    def _decided(self, place: Place, signal: Tensor | None, cache: MixCache) -> Action:
        """Decide a new step; `signal` is the indicator's value at it."""
        if self._shape not in (None, place.latents.shape):
            self._trip(f"the latents changed their shape at step {place.step}")
        self._shape = place.latents.shape
        change, measured = self._read(place.step, signal)
        if self._used is not None and self._action == "full":
            self._trigger.observe(self._step, measured)
        if self._used is not None and cache is not self._used:
            self._trigger.restart()
        self._step, self._used = place.step, cache
        self._action = "full" if self._off else self._trigger.decide(place.step, change)
        if cache.empty:
            self._action = "full"
        if self._action != "full" and self._reused() >= self._most(place.steps):
            self._trip(f"{self._reused()} of {place.steps} steps were reused, more than allowed")
            self._action = "full"
        if self._action == "full" or self._adds_up:
            self._before = signal
        self._tally.actions[self._action] += 1
        return self._action

    def _read(self, step: int, signal: Tensor | None) -> tuple[float | None, Measured | None]:
        """Return the indicator's change and what the last full step showed: one synchronisation."""
        signals: dict[str, Tensor] = {}
        if self._off:
            return None, None
        if self._used is not None and self._action == "full":
            signals |= self._used.signals()
        before = self._before
        if signal is not None and before is not None and signal.shape == before.shape:
            signals[_CHANGE] = relative_l1(signal, before)
        if not signals:
            return None, None
        values = torch.stack([value.float() for value in signals.values()]).tolist()
        found = dict(zip(signals, values, strict=True))
        if not all(map(math.isfinite, values)):
            self._trip(f"what decides step {step} is not finite")
            return None, None
        change = found.pop(_CHANGE, None)
        deviation = found.pop("deviation", None)
        names: tuple[Granularity, ...] = get_args(Granularity)
        distances = {name: found[name] for name in names if name in found}
        if deviation is None and not distances:
            return change, None
        return change, Measured(deviation, distances)

    # --- guard ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Look back at the end of a call: a policy that never reuses only costs."""
        steps = sum(self._tally.actions.values())
        asks = not isinstance(self._cache, MaskCache) or set(self._cache.actions) != {"full"}
        if asks and steps > 1 and not self._reused() and not self._tally.trips:
            self._report(f"the policy is inert: none of {steps} steps was reused")

    def _reused(self) -> int:
        return sum(count for action, count in self._tally.actions.items() if action != "full")

    def _most(self, steps: int) -> float:
        return self._cache.reuse_max * steps if isinstance(self._cache, RuleCache) else steps

    def _trip(self, reason: str) -> None:
        """Compute everything for the rest of the call."""
        self._off = True
        self._report(f"{reason}; caching is off for the rest of this call")

    def _report(self, sentence: str) -> None:
        if sentence not in self._tally.trips:
            self._tally.trips.append(sentence)
            _log.warning("ditune: %s", sentence)
