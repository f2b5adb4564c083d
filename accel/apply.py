"""Put a policy to work in a pipeline, and take it off again without a trace.

One hook stands around each denoiser's forward. When the first forward of a pipeline call arrives,
the call's steps and size are known: only then is the policy looked up and an `Episode` begun.
Nothing outlives an episode, so an interrupted call cannot spoil the next one.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from ditune.accel import fingerprint
from ditune.accel.anatomy import BlockStack, denoisers
from ditune.accel.internals import ForwardHook, attach, detach, output_like, sample_of
from ditune.accel.lookup import lookup
from ditune.accel.mixcache import COND, UNCOND, MixCache, StepPlan, Tally
from ditune.accel.trigger import trigger_for
from ditune.db.errors import DituneError, UsageFault
from ditune.db.records import Granularity, MaskCache, Match, Policy

DISABLE_VARIABLE = "DITUNE_DISABLE"
_log = logging.getLogger("ditune")


@dataclass(frozen=True)
class Where:
    """Where in a pipeline call one forward is."""

    branch: str
    step: int
    steps: int
    sigma: float


@dataclass(frozen=True)
class Summary:
    """What the last pipeline call did."""

    policy_id: str | None
    reason: str
    steps: dict[str, int]  # by action
    forwards: int
    computed: int
    small_forwards: int
    work_ratio: float  # blocks asked for / blocks run, of whichever model ran
    cache_bytes: int
    trips: tuple[str, ...]

    def __str__(self) -> str:
        """Say it in two lines."""
        steps = ", ".join(f"{count} {action}" for action, count in sorted(self.steps.items()))
        policy = self.policy_id or "no policy"
        lines = [
            f"ditune: {policy} ({self.reason})",
            f"  steps: {steps or 'none'}; forwards: {self.computed} of {self.forwards} computed, "
            f"{self.small_forwards} by the small model; work {self.work_ratio:.2f}x less; "
            f"caches {self.cache_bytes / 2**20:.1f} MiB",
        ]
        return "\n".join(lines + [f"  guard: {trip}" for trip in self.trips])


class Episode:
    """One pipeline call under one policy."""

    def __init__(self, match: Match, where: Where, small: nn.Module | None, guided: bool) -> None:
        """Check that the policy fits the call; one that does not is left out, with the reason."""
        self.match = match
        self.small = small
        self.tally = Tally()
        self._caches: dict[int, MixCache] = {}
        self.plan: StepPlan | None = None
        policy = match.policy
        self.reason = match.reason if policy is None else _misfit(policy, where, small)
        self.policy = None if self.reason else policy
        self.reason = self.reason or match.reason
        if self.policy is not None and self.policy.cache is not None:
            granularities: set[Granularity] = {"step", "block"}
            if guided and where.branch in (COND, UNCOND):
                granularities.add("cfg")
            trigger = trigger_for(self.policy.cache, where.steps, granularities)
            self.plan = StepPlan(trigger)

    def forward(self, where: Where, model: nn.Module, compute: Any) -> Tensor:
        """Return the output of one forward of `model`; `compute` runs it and gives the sample."""
        assert self.policy is not None
        if self.policy.cache is None or self.plan is None:
            depth = len(BlockStack(model))
            self.tally.forwards += 1
            self.tally.computed += 1
            self.tally.blocks_asked += depth
            self.tally.blocks_run += depth
            sample: Tensor = compute()
            return sample
        cache = self._caches.get(id(model))
        if cache is None:
            cache = MixCache(self.policy.cache, BlockStack(model), self.tally)
            self._caches[id(model)] = cache
        action = self.plan.action(where.step, cache, self.tally)
        sample = cache.forward(action, where.step, where.branch, compute)
        held = sum(each.byte_count for each in self._caches.values())
        self.tally.cache_bytes = max(self.tally.cache_bytes, held)
        return sample

    def hands_over(self, where: Where) -> bool:
        """Whether the small model does this forward."""
        handoff = self.policy.handoff if self.policy is not None else None
        return handoff is not None and where.sigma < handoff.sigma


def _misfit(policy: Policy, where: Where, small: nn.Module | None) -> str:
    """Return why a policy cannot serve a call, empty if it can."""
    cache = policy.cache
    if isinstance(cache, MaskCache) and len(cache.actions) != where.steps:
        return f"the policy lists {len(cache.actions)} steps and this call has {where.steps}"
    if policy.handoff is not None and small is None:
        return "the policy hands over to a small model and none was given (small=...)"
    return ""


class _Hook(ForwardHook):
    """Hands every forward of one denoiser to the session."""

    def __init__(self, session: Applied) -> None:
        super().__init__()
        self._session = session

    def around(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._session.forward(self, module, args, kwargs)

    def finish(self) -> None:
        self._session.finish()


class Applied:
    """A pipeline with ditune on; a context manager that takes it off at the end."""

    def __init__(
        self,
        pipe: Any,
        policy: Policy | None,
        *,
        small: nn.Module | None = None,
        db: str | Path | None = None,
        tier: str = "default",
    ) -> None:
        """Attach to every denoiser of a pipeline; see `accelerate`."""
        self._pipe = pipe
        self._policy = policy
        self._small = small
        self._db = db
        self._tier = tier
        self._episode: Episode | None = None
        self._seen: tuple[int, set[str]] = (-1, set())
        self._matches: dict[fingerprint.Request, Match] = {}
        self._warned: set[str] = set()
        self._models: list[nn.Module] = []
        for model in denoisers(pipe):
            BlockStack(model)  # refuses models without a stack before anything is attached
        for model in denoisers(pipe):
            attach(model, _Hook(self))
            self._models.append(model)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take ditune off."""
        self.remove()

    def remove(self) -> None:
        """Take the hooks off; the pipeline is bit for bit what it was."""
        while self._models:
            detach(self._models.pop())

    def finish(self) -> None:
        """Begin anew with the next forward, whatever its step; counters stay for `summary`."""
        self._seen = (-1, set())

    def summary(self) -> Summary:
        """Return what the last call did.

        Raises:
            UsageFault: The pipeline was not called yet.
        """
        episode = self._episode
        if episode is None:
            raise UsageFault("nothing to sum up: call the pipeline first")
        tally = episode.tally
        return Summary(
            policy_id=episode.policy.id if episode.policy is not None else None,
            reason=episode.reason,
            steps=dict(tally.actions),
            forwards=tally.forwards,
            computed=tally.computed,
            small_forwards=tally.small_forwards,
            work_ratio=tally.blocks_asked / max(tally.blocks_run, 1),
            cache_bytes=tally.cache_bytes,
            trips=tuple(tally.trips),
        )

    # --- one forward ---------------------------------------------------------------------------

    def forward(
        self, hook: ForwardHook, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Do one forward of a denoiser: computed, reused, or done by the small model."""
        latents = args[0] if args else kwargs["hidden_states"]
        where = self._locate(hook, kwargs)
        if where is None or os.environ.get(DISABLE_VARIABLE) == "1":
            return hook.original(*args, **kwargs)
        if self._begins(where):
            self._episode = self._begin(where, latents)
        episode = self._episode
        if episode is None or episode.policy is None:
            return hook.original(*args, **kwargs)
        small = episode.small if episode.hands_over(where) else None
        if small is None:
            sample = episode.forward(
                where, module, lambda: sample_of(hook.original(*args, **kwargs))
            )
        else:
            asked = episode.tally.computed
            sample = episode.forward(where, small, lambda: sample_of(small(*args, **kwargs)))
            episode.tally.small_forwards += episode.tally.computed - asked
        return output_like(sample, kwargs)

    def _locate(self, hook: ForwardHook, kwargs: dict[str, Any]) -> Where | None:
        context = hook.context()
        if context is None:
            self._warn("this pipeline does not say which guidance branch runs: it stays as it is")
            return None
        if context.step is not None and context.steps is not None and context.sigma is not None:
            return Where(context.branch, context.step, context.steps, context.sigma)
        timesteps = self._pipe.scheduler.timesteps
        now = float(kwargs["timestep"].flatten()[0])
        step = int((timesteps.float() - now).abs().argmin())
        return Where(context.branch, step, len(timesteps), float(self._pipe.scheduler.sigmas[step]))

    def _begins(self, where: Where) -> bool:
        """Whether this is the first forward of a call: the step fell, or a branch came again."""
        step, branches = self._seen
        fresh = where.step < step or step < 0 or (where.step == step and where.branch in branches)
        same_step = where.step == step and not fresh
        self._seen = (where.step, (branches if same_step else set()) | {where.branch})
        return fresh

    def _begin(self, where: Where, latents: Tensor) -> Episode:
        match = self._match(where, latents)
        guided = bool(getattr(self._pipe, "do_classifier_free_guidance", False))
        episode = Episode(match, where, self._small, guided)
        if episode.policy is None:
            self._warn(f"running without a policy: {episode.reason}")
        return episode

    def _match(self, where: Where, latents: Tensor) -> Match:
        if self._policy is not None:
            return Match(
                kind="exact",
                reason="given by the caller",
                policy_id=self._policy.id,
                policy=self._policy,
            )
        request = fingerprint.observed(self._pipe, latents, where.steps)
        if request not in self._matches:
            self._matches[request] = self._look_up(request, latents)
        return self._matches[request]

    def _look_up(self, request: fingerprint.Request, latents: Tensor) -> Match:
        """Return the policy of a request: one that hands over if there is a small model, else any.

        Policies without a hand-off are stored without a small model, so that they serve both.
        """
        hardware = fingerprint.hardware(latents.device)
        match = Match(kind="baseline", reason="not looked up")
        for small in dict.fromkeys((self._small, None)):
            workload = fingerprint.workload(self._pipe, request, small)
            try:
                match = lookup(hardware, workload, db=self._db, tier=self._tier)
            except DituneError as fault:  # a damaged store must not stop a generation
                return Match(kind="baseline", reason=str(fault))
            if match.policy is not None:
                break
        return match

    def _warn(self, sentence: str) -> None:
        if sentence not in self._warned:
            self._warned.add(sentence)
            _log.warning("ditune: %s", sentence)


def accelerate(
    pipe: Any,
    policy: Policy | None = None,
    *,
    small: nn.Module | None = None,
    db: str | Path | None = None,
    tier: str = "default",
) -> Applied:
    """Make a diffusers pipeline faster with a tuned policy.

    The policy is looked up at the start of every pipeline call, because only then steps, size and
    guidance are known; without a match the call runs as it is and the reason is logged once.

    Args:
        pipe: A diffusers pipeline with a transformer.
        policy: Use this policy instead of looking one up.
        small: The small model of the family, for policies that hand over to it.
        db: The policy database; `$DITUNE_DB` or the user's data folder by default.
        tier: Which of several stored trade-offs.

    Returns:
        A handle: use it in `with`, or call `remove()`; `summary()` tells what the last call did.

    Raises:
        UsageFault: The pipeline has no transformer with repeated blocks, or already carries ditune.
    """
    return Applied(pipe, policy, small=small, db=db, tier=tier)
