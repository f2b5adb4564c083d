"""One pipeline call under one policy: which model runs a step, and what of it is computed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ditune.accel.handoff import Router
from ditune.accel.indicator import indicator_for
from ditune.accel.location import Where
from ditune.accel.mixcache import BATCHED, COND, UNCOND, Compute, MixCache, Place, Tally
from ditune.accel.plan import StepPlan
from ditune.accel.request import guides
from ditune.accel.sibling import Sibling
from ditune.accel.spans import BlockStack
from ditune.accel.trigger import trigger_for
from ditune.db.policy import (
    CachePolicy,
    Granularity,
    Handoff,
    HandoffPolicy,
    MaskCache,
    Policy,
    RuleCache,
)
from ditune.db.records import Match

_log = logging.getLogger("ditune")


@dataclass(frozen=True)
class Inputs:
    """What a denoiser was called with, as far as decisions look at it."""

    latents: Tensor
    timestep: Tensor | None


class Episode:
    """Everything that is decided and remembered during one call; nothing outlives it."""

    def __init__(
        self, match: Match, where: Where, model: nn.Module, small: Sibling | None, pipe: Any
    ) -> None:
        """Check that the policy fits the call; one that does not is left out, with the reason.

        Args:
            match: The policy, or why there is none.
            where: The first forward of the call.
            model: The denoiser that it is of.
            small: Takes over where the policy says so.
            pipe: The pipeline that is running.
        """
        self.match = match
        self.small = small
        self.tally = Tally()
        self._caches: dict[int, MixCache] = {}
        self._plan: StepPlan | None = None
        self._router: Router | None = None
        self._last: Where | None = None
        self._ran: set[bool] = set()  # whether the small model (True) and the large one ran a step
        policy = match.policy
        self.reason = match.reason if policy is None else _misfit(policy, where, small)
        self.policy = None if self.reason else policy
        self.reason = self.reason or match.reason
        guided = guides(pipe) is True
        if self.policy is not None and self.policy.cache is not None:
            self._plan = self._planned(self.policy.cache, where, model, guided)
        if self.policy is not None and self.policy.handoff is not None:
            self._router = _routed(self.policy.handoff, where, pipe, guided)

    def _planned(
        self, cache: CachePolicy, where: Where, model: nn.Module, guided: bool
    ) -> StepPlan:
        kind = cache.indicator if isinstance(cache, RuleCache) else None
        branches = {COND, UNCOND} if kind == "first_block" else {COND, UNCOND, BATCHED}
        granularities: set[Granularity] = {"step", "block"}
        if guided and where.branch in branches:
            granularities.add("cfg")
        trigger = trigger_for(cache, where.steps, granularities)
        measure = indicator_for(kind, model) if kind is not None else None
        return StepPlan(cache, trigger, self.tally, measure)

    def forward(self, where: Where, stack: BlockStack, inputs: Inputs, compute: Compute) -> Tensor:
        """Return the output of one forward of a model; `compute` runs it and gives the sample."""
        self._last = where
        place = Place(where.step, where.steps, where.branch, inputs.latents)
        sample = self._sample(where, place, stack, inputs.timestep, compute)
        if self._router is not None:
            self._router.note(place, where, sample)
        return sample

    def _sample(
        self,
        where: Where,
        place: Place,
        stack: BlockStack,
        timestep: Tensor | None,
        compute: Compute,
    ) -> Tensor:
        assert self.policy is not None
        if self.policy.cache is None or self._plan is None:
            depth = len(stack)
            self.tally.forwards += 1
            self.tally.computed += 1
            self.tally.blocks_asked += depth
            self.tally.blocks_run += depth
            return compute()
        cache = self._caches.get(id(stack))
        if cache is None:
            cache = MixCache(self.policy.cache, stack, self.tally, where.steps)
            self._caches[id(stack)] = cache
        action = self._plan.action(place, where.flow_sigma, timestep, cache)
        return cache.forward(action, place, compute)

    @property
    def cache_bytes(self) -> int:
        """What the caches hold now, or held when the call ended."""
        held = sum(cache.byte_count for cache in self._caches.values())
        return max(held, self.tally.cache_bytes)

    def close(self) -> None:
        """End the call and free its caches."""
        self.tally.cache_bytes = self.cache_bytes
        self._caches.clear()
        if self._router is not None:
            self._notice_inert()
        self._router = None
        if self._plan is not None:
            self._plan.close()

    def _notice_inert(self) -> None:
        """Report a call that came to its end with all steps done by one of the two models."""
        last = self._last
        if last is None or last.step < last.steps - 1 or len(self._ran) == 2:
            return
        model, others = ("large", "small") if True in self._ran else ("small", "large")
        said = f"the policy hands over and the {model} model ran none of {last.steps} steps"
        self.tally.trips.append(f"{said}: all are the {others} one's")
        _log.warning("ditune: %s", self.tally.trips[-1])

    def hands_over(self, where: Where) -> bool:
        """Whether the small model does this forward."""
        if self._router is None or where.sigma is None:
            return False
        small = self._router.small(where.step, where.sigma)
        self._ran.add(small)
        return small


def _routed(handoff: HandoffPolicy, where: Where, pipe: Any, guided: bool) -> Router:
    scale = float(getattr(pipe, "guidance_scale", None) or 1.0) if guided else 1.0
    return Router(handoff, where.steps, pipe.scheduler, scale)


def _misfit(policy: Policy, where: Where, small: Sibling | None) -> str:
    """Return why a policy cannot serve a call, empty if it can."""
    cache = policy.cache
    if isinstance(cache, MaskCache) and len(cache.actions) != where.steps:
        return f"the policy lists {len(cache.actions)} steps and this call has {where.steps}"
    if policy.handoff is None:
        return ""
    if small is None:
        return "the policy hands over to a small model and none was given (small=...)"
    if where.sigma is None:
        return "the policy hands over at a noise level and the scheduler tells none"
    handoff = policy.handoff
    if isinstance(handoff, Handoff) and handoff.takes(where.sigma):
        return (
            f"the policy hands over from sigma {handoff.sigma:.4g} on and this call starts at "
            f"{where.sigma:.4g}: the large model would run no step of its sketch"
        )
    return ""
