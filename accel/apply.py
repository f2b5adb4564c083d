"""Put a policy to work in a pipeline, and take it off again without a trace.

One hook stands around each denoiser's forward. When the first forward of a pipeline call arrives,
the call's steps and size are known: only then is the policy looked up and an `Episode` begun.
Nothing outlives an episode, so an interrupted call cannot spoil the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ditune.accel import fingerprint
from ditune.accel.anatomy import denoisers
from ditune.accel.episode import Episode, Inputs
from ditune.accel.internals import (
    ForwardHook,
    Output,
    attach,
    detach,
    latents_of,
    second_half,
)
from ditune.accel.location import Locator, Where
from ditune.accel.lookup import lookup
from ditune.accel.request import Request, observed
from ditune.accel.residence import Offload, Residence, require_movable, weight_bytes
from ditune.accel.sibling import Sibling
from ditune.accel.spans import BlockStack
from ditune.db.errors import DituneError, UsageFault
from ditune.db.kill_switch import disabled
from ditune.db.policy import Policy
from ditune.db.records import Match

_log = logging.getLogger("ditune")


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
    peak_weight_bytes: int  # of the large and the small model, on the device together
    trips: tuple[str, ...]

    @property
    def work_share(self) -> float:
        """The share of the plain call's blocks that ran: all of them where no policy did."""
        return 1.0 / self.work_ratio if self.policy_id is not None else 1.0

    def __str__(self) -> str:
        """Say it in two lines."""
        steps = ", ".join(f"{count} {action}" for action, count in sorted(self.steps.items()))
        policy = self.policy_id or "no policy"
        lines = [
            f"ditune: {policy} ({self.reason})",
            f"  steps: {steps or 'none'}; forwards: {self.computed} of {self.forwards} computed, "
            f"{self.small_forwards} by the small model; work {self.work_ratio:.2f}x less; "
            f"caches {self.cache_bytes / 2**20:.1f} MiB, weights "
            f"{self.peak_weight_bytes / 2**20:.1f} MiB",
        ]
        return "\n".join(lines + [f"  guard: {trip}" for trip in self.trips])


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
        small: Any = None,
        offload: Offload = "none",
        db: str | Path | None = None,
        tier: str = "default",
    ) -> None:
        """Attach to every denoiser of a pipeline; see `accelerate`."""
        self._pipe = pipe
        self._policy = policy
        self._small = Sibling.of(pipe, small) if small is not None else None
        self._offload = offload
        self._residence: Residence | None = None
        self._db = db
        self._tier = tier
        self._episode: Episode | None = None
        self._locator = Locator(pipe)
        self._stacks: dict[int, BlockStack] = {}
        self._rebuild: dict[int, Callable[[Tensor], Any]] = {}  # how each model returns
        self._matches: dict[tuple[str, Request], Match] = {}
        self._warned: set[str] = set()
        self._models: list[nn.Module] = []
        small_model = None if self._small is None else self._small.model
        require_movable(denoisers(pipe), small_model, offload)
        for model in denoisers(pipe):
            self._stack(model)  # refuses models without one before anything is attached
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
        self._bring_back()

    @contextmanager
    def using(self, tier: str) -> Iterator[Self]:
        """Take the policies of another tier for the calls that begin in the block.

        A call that runs already keeps the policy that it began with.

        Args:
            tier: Where nothing is stored under it the calls run as they are; the reason names the
                tiers that there are.

        Raises:
            UsageFault: The policy was given and is not looked up.
        """
        if self._policy is not None:
            raise UsageFault(
                f"there is no tier {tier!r} to choose: the policy was given by the caller; call "
                "accelerate(pipe) without one to have it looked up"
            )
        before, self._tier = self._tier, tier
        try:
            yield self
        finally:
            self._tier = before

    def finish(self) -> None:
        """Begin anew with the next forward, whatever its step; counters stay for `summary`."""
        if self._episode is not None:
            self._episode.close()
        self._bring_back()
        self._locator.reset()

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
            cache_bytes=episode.cache_bytes,
            peak_weight_bytes=self._peak_weight_bytes(),
            trips=tuple(tally.trips),
        )

    # --- one forward ---------------------------------------------------------------------------

    def forward(
        self, hook: ForwardHook, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Do one forward of a denoiser: computed, reused, or done by the small model."""
        if disabled():
            self._bring_back()
            return hook.whole(module, *args, **kwargs)
        latents = latents_of(args, kwargs)
        where = self._locator.locate(hook.context(), kwargs)
        if where is None:
            self._warn("this pipeline does not say which guidance branch runs: it stays as it is")
            return hook.whole(module, *args, **kwargs)
        if self._locator.begins(where):
            if self._locator.stands_still:
                self._warn("the pipeline never steps its own scheduler: no step can be told apart")
            self._episode = self._begin(where, module, latents)
        episode = self._episode
        if episode is None or episode.policy is None:
            return hook.whole(module, *args, **kwargs)
        small = episode.small if episode.hands_over(where) else None
        stack = self._stack(module if small is None else small.model)
        run = self._runner(hook, module, stack) if small is None else small.runner(stack)

        def compute(*, conditional_half: bool = False) -> Tensor:
            if self._residence is not None:
                self._residence.require(small=small is not None)
            if conditional_half:
                count = len(latents)
                output = Output.of(run(*second_half(args, count), **second_half(kwargs, count)))
            else:
                output = Output.of(run(*args, **kwargs))
                self._rebuild[id(stack)] = output.rebuild
            return output.sample if hook.compiled is None else output.sample.clone()

        before = episode.tally.computed
        inputs = Inputs(latents, kwargs.get("timestep"))
        sample = episode.forward(where, stack, inputs, compute)
        if small is not None:
            episode.tally.small_forwards += episode.tally.computed - before
        return self._rebuild[id(stack)](sample)

    def _runner(
        self, hook: ForwardHook, module: nn.Module, stack: BlockStack
    ) -> Callable[..., Any]:
        """Return what runs a model's own forward; compiled code would not see stand-ins in it."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if not stack.replaced:
                return hook.whole(module, *args, **kwargs)
            if hook.compiled is not None:
                self._warn(
                    f"{type(module).__name__} is compiled as a whole and the policy looks at its "
                    "blocks: those forwards run uncompiled, use compile_repeated_blocks() instead"
                )
            return hook.original(*args, **kwargs)

        return run

    def _stack(self, model: nn.Module) -> BlockStack:
        """Return the chain of blocks of a model; what was learnt about it outlives the call."""
        if id(model) not in self._stacks:
            self._stacks[id(model)] = BlockStack(model)
        return self._stacks[id(model)]

    def _begin(self, where: Where, model: nn.Module, latents: Tensor) -> Episode:
        if self._episode is not None:  # pipelines that never say when a call ends
            self._episode.close()
        self._bring_back()  # a call that was interrupted may have left another model there
        match = self._match(where, latents)
        episode = Episode(match, where, model, self._small, self._pipe)
        if episode.policy is None:
            self._warn(f"running without a policy: {episode.reason}")
        elif episode.policy.handoff is not None and self._residence is None:
            self._residence = self._moved(latents.device)
        if self._residence is not None:
            self._residence.begin()
        return episode

    def _moved(self, device: torch.device) -> Residence | None:
        """Return what moves the models, None where all stay."""
        if self._small is None:
            return None
        if self._offload == "none":
            self._small.require_on(device)
            return None
        if device.type == "cpu":
            self._warn(f"offload={self._offload!r} moves nothing: the pipeline runs on the CPU")
            return None
        return Residence(self._models, self._small.model, self._offload, device)

    def _bring_back(self) -> None:
        """See to it that the large model is there, as the pipeline expects."""
        if self._residence is not None:
            self._residence.leave()

    def _peak_weight_bytes(self) -> int:
        if self._residence is not None:
            return self._residence.peak_bytes
        models = [*self._models, *([self._small.model] if self._small is not None else [])]
        return sum(map(weight_bytes, models))

    def _match(self, where: Where, latents: Tensor) -> Match:
        if self._policy is not None:
            return Match(
                kind="exact",
                reason="given by the caller",
                policy_id=self._policy.id,
                policy=self._policy,
            )
        try:
            request = observed(self._pipe, latents, where.steps)
        except UsageFault as fault:
            return Match(kind="baseline", reason=str(fault))
        key = (self._tier, request)
        if key not in self._matches:
            self._matches[key] = self._look_up(request, latents)
        return self._matches[key]

    def _look_up(self, request: Request, latents: Tensor) -> Match:
        """Return the policy of a request: one that hands over if there is a small model, else any.

        Policies without a hand-off are stored without a small model, so that they serve both.
        """
        hardware = fingerprint.hardware(latents.device)
        match = Match(kind="baseline", reason="not looked up")
        model = self._small.model if self._small is not None else None
        for small in dict.fromkeys((model, None)):
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
    small: Any = None,
    offload: Offload = "none",
    db: str | Path | None = None,
    tier: str = "default",
) -> Applied:
    """Make a diffusers pipeline faster with a tuned policy.

    The policy is looked up at the start of every pipeline call, because only then steps, size and
    guidance are known; without a match the call runs as it is and the reason is logged once.

    Args:
        pipe: A diffusers pipeline with a transformer.
        policy: Use this policy instead of looking one up.
        small: The small model of the family, or its pipeline, for policies that hand over to it.
            CogVideoX needs the pipeline: forwards are converted to its schedule and latent scale.
        offload: Where its weights are. "none": where you put them, which has to be the pipeline's
            device. "lazy": on the host until a call hands over. "swap": the large model leaves as
            it comes, which breaks CUDA graphs. Neither sees weights that change later: fuse
            LoRAs before.
        db: The policy database; `$DITUNE_DB` or the user's data folder by default.
        tier: Which of several stored trade-offs; the handle's `using(tier)` chooses another one for
            some calls.

    Returns:
        A handle: use it in `with`, or call `remove()`; `summary()` tells what the last call did.

    Raises:
        UsageFault: The pipeline has no transformer with repeated blocks, or already carries ditune,
            or the small model cannot take over; each field in which they differ is named.
    """
    return Applied(pipe, policy, small=small, offload=offload, db=db, tier=tier)
