"""MixCache's actions: what a full, step-, cfg- or block-cached forward does with tensors.

Rules that keep granularities from interfering (each has a test): one granularity per step; caches
are written at full steps only; both branches always have the same age; a model without a second
branch has no cfg granularity; the scheduler gets an output at every step.
Source: MixCache (arXiv 2508.12691), completed where the paper is silent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ditune.accel.payload import History, Values, amplified, positions, relative_l1
from ditune.accel.spans import BlockStack, Span
from ditune.db.policy import Action, CachePolicy, Granularity, MaskCache, RuleCache

COND, UNCOND, BATCHED = "cond", "uncond", "cond_uncond"
_AMPLIFY = 1.1  # FasterCache's factor
_LOW_UNTIL, _HIGH_FROM = 0.8, 0.6  # where, in shares of the steps, it acts on which frequencies
_WHOLE: Span = (0, 0)
Ask = Callable[[Tensor | None], Action]  # told what the front blocks added, None if nobody knows


class Compute(Protocol):
    """Runs the model's own forward and returns its sample."""

    def __call__(self, *, conditional_half: bool = False) -> Tensor:
        """Run it, on the second half of the batch only if asked to."""


@dataclass(frozen=True)
class Place:
    """Where one forward is: its step, the steps of the call, its branch, and its latents."""

    step: int
    steps: int
    branch: str
    latents: Tensor


@dataclass
class Tally:
    """What one pipeline call did, counted while it runs."""

    actions: Counter[str] = field(default_factory=Counter)  # steps by action
    forwards: int = 0  # asked for by the pipeline
    computed: int = 0  # reached the model, in full or in part
    small_forwards: int = 0  # of those, done by the small model
    blocks_run: float = 0.0  # a block on half a batch counts half
    blocks_asked: float = 0.0  # what the plain pipeline would have run
    cache_bytes: int = 0
    trips: list[str] = field(default_factory=list)


@dataclass
class _Branch:
    """Everything remembered of one branch of one model; written at full steps only."""

    output: History
    stack: History
    span: History


class MixCache:
    """The caches of one denoiser during one pipeline call."""

    def __init__(self, cache: CachePolicy, stack: BlockStack, tally: Tally, steps: int) -> None:
        """Prepare empty caches for a call of `steps` steps; its denoisers share the tally."""
        self._cache = cache
        self._positions = positions(cache.payload.arc_length, steps)
        self._stack = stack
        self._tally = tally
        actions = set(cache.actions) if isinstance(cache, MaskCache) else set(cache.granularities)
        self._form = cache.payload.form
        # only what decides is measured: the interval where no indicator does, and which granularity
        self._watches_error = isinstance(cache, RuleCache) and cache.indicator is None
        self._watches_each = isinstance(cache, RuleCache) and len(cache.granularities) > 1
        stepping = "step" in actions and self._form != "hidden"
        self._keeps_output = stepping or self._watches_error or self._watches_each
        self._spans: dict[str, Span] = {}
        if "step" in actions and self._form == "hidden":
            self._spans["stack"] = _WHOLE
        if "block" in actions:
            self._spans["span"] = (cache.fn_blocks, cache.bn_blocks)
        self._keeps_delta = "cfg" in actions
        self.clear()

    def clear(self) -> None:
        """Forget everything, as at the start of a call."""
        self._branches: dict[str, _Branch] = {}
        self._delta = self._new_history()
        self._fresh_cond: Tensor | None = None
        self._distances: dict[Granularity, Tensor] = {}
        self._deviation: Tensor | None = None
        self._gap = 0

    @property
    def empty(self) -> bool:
        """Whether there is nothing to reuse yet."""
        return not self._branches

    def forward(self, action: Action | Ask, place: Place, compute: Compute) -> Tensor:
        """Return the branch's output at a step, computed or reused as the action says.

        An action that is still open is asked for once the blocks at the front have run.
        """
        state = self._branches.setdefault(place.branch, self._new_branch())
        self._tally.forwards += 1
        self._tally.blocks_asked += len(self._stack)
        sample: Tensor | None = None
        if callable(action):
            residual = state.span.predict(place.step)
            if residual is not None and not self._stack.problem:
                return self._asking(action, residual, place, compute)
            action = action(None)
        if action == "step":
            sample = self._step(state, place, compute)
        elif action == "cfg" and place.branch != COND:
            sample = self._cfg(place, compute)
        elif action == "block":
            sample = self._block(state, place, compute)
        return self._full(action, place, compute) if sample is None else sample

    def signals(self) -> dict[str, Tensor]:
        """Return what the last full step showed, as scalars on the device, and forget it.

        "deviation" is the error that reuse would have made; the granularities' names stand for the
        change of each per skipped step. Empty until something could have been reused.
        """
        gap = max(self._gap, 1)
        found: dict[str, Tensor] = {n: distance / gap for n, distance in self._distances.items()}
        if self._deviation is not None:
            found["deviation"] = self._deviation
        self._deviation, self._distances = None, {}
        return found

    def _new_branch(self) -> _Branch:
        return _Branch(self._new_history(), self._new_history(), self._new_history())

    def _new_history(self) -> History:
        return History(self._cache.payload.order, self._positions)

    # --- reuse ---------------------------------------------------------------------------------

    def _step(self, state: _Branch, place: Place, compute: Compute) -> Tensor | None:
        if self._form == "hidden":
            return self._run_around(state.stack.predict(place.step), _WHOLE, compute)
        found = state.output.predict(place.step)
        if found is None:
            return None
        if self._form == "latent":
            return found[0] + input_like(found[0], place)
        return found[0]

    def _cfg(self, place: Place, compute: Compute) -> Tensor | None:
        found = self._delta.predict(place.step)
        if found is None:
            return None
        delta = found[0]
        if self._cache.payload.cfg_form == "fft_delta":
            progress = place.step / place.steps
            low = _AMPLIFY if progress <= _LOW_UNTIL else 1.0
            delta = amplified(delta, low, _AMPLIFY if progress >= _HIGH_FROM else 1.0)
        if place.branch == BATCHED:
            cond = compute(conditional_half=True)
            self._tally.computed += 1
            self._tally.blocks_run += len(self._stack) / 2
            return torch.cat([cond + delta, cond])
        return None if self._fresh_cond is None else self._fresh_cond + delta

    def _block(self, state: _Branch, place: Place, compute: Compute) -> Tensor | None:
        return self._run_around(state.span.predict(place.step), self._spans["span"], compute)

    def _asking(self, ask: Ask, residual: Values, place: Place, compute: Compute) -> Tensor:
        """Run the front blocks, ask, and go on as the answer says."""
        chosen: list[Action] = []

        def reuse(front: Tensor) -> bool:
            chosen.append(ask(front))
            return chosen[0] == "block"

        span, depth = self._spans["span"], len(self._stack)
        with self._stack.deciding(span, residual, reuse) as recording:
            sample = compute()
        self._tally.computed += 1
        self._tally.blocks_run += min(sum(span), depth) if chosen[0] == "block" else depth
        self._keep(chosen[0], place, sample, {"span": recording.residuals[0]})
        return sample

    def _run_around(self, residual: Values | None, span: Span, compute: Compute) -> Tensor | None:
        if self._stack.problem:
            self._note_trip(f"blocks are never left out: {self._stack.problem}")
        if residual is None:
            return None
        self._tally.computed += 1
        self._tally.blocks_run += min(sum(span), len(self._stack))
        with self._stack.replacing(span, residual):
            return compute()

    def _note_trip(self, reason: str) -> None:
        if reason not in self._tally.trips:
            self._tally.trips.append(reason)

    # --- computing -----------------------------------------------------------------------------

    def _full(self, action: Action, place: Place, compute: Compute) -> Tensor:
        """Compute; remember the result only if the whole step is full (rule 2)."""
        residuals: dict[str, Values | None] = {}
        if action == "full" and self._spans:
            with self._stack.recording(list(self._spans.values())) as recording:
                sample = compute()
            residuals = dict(zip(self._spans, recording.residuals, strict=True))
        else:
            sample = compute()
        self._tally.computed += 1
        self._tally.blocks_run += len(self._stack)
        self._keep(action, place, sample, residuals)
        return sample

    def _keep(
        self, action: Action, place: Place, sample: Tensor, residuals: Mapping[str, Values | None]
    ) -> None:
        """Remember what a full step gave, and a conditional output for the other branch."""
        if action == "full":
            state = self._branches[place.branch]
            for name, residual in residuals.items():
                self._remember_residual(name, state, place, residual)
            self._remember(state, place, sample)
        if place.branch == COND:
            self._fresh_cond = sample
        elif self._keeps_delta and action == "full":
            self._remember_delta(place, sample)

    def _remember(self, state: _Branch, place: Place, sample: Tensor) -> None:
        if not self._keeps_output:
            return
        if self._form == "latent" and not _fits(sample, place):
            self._note_trip("outputs are not shaped like latents: they are reused as they are")
            self._form = "output"
        kept = sample - input_like(sample, place) if self._form == "latent" else sample
        first = self._comes_first(place)
        if first and self._watches_each and state.output.values:
            self._gap = place.step - state.output.steps[-1]
            self._distances["step"] = relative_l1(kept, state.output.values[-1][0])
        if first and self._watches_error and (expected := state.output.predict(place.step)):
            self._deviation = relative_l1(expected[0], kept)
        state.output.add(place.step, kept)

    def _remember_residual(
        self, name: str, state: _Branch, place: Place, residual: Values | None
    ) -> None:
        if residual is None:
            return
        history = state.stack if name == "stack" else state.span
        watched = self._watches_each and name == "span" and self._comes_first(place)
        if watched and history.values:
            self._distances["block"] = relative_l1(residual[0], history.values[-1][0])
        history.add(place.step, *residual)

    def _remember_delta(self, place: Place, sample: Tensor) -> None:
        if place.branch == BATCHED:
            uncond, cond = sample.chunk(2)
        elif place.branch == UNCOND and self._fresh_cond is not None:
            uncond, cond = sample, self._fresh_cond
        else:
            return
        delta = uncond - cond
        if self._watches_each and self._delta.values:
            scale = cond.float().abs().mean()
            change = (delta - self._delta.values[-1][0]).float().abs().mean()
            self._distances["cfg"] = change / scale.clamp_min(torch.finfo(torch.float32).tiny)
        self._delta.add(place.step, delta)

    def _comes_first(self, place: Place) -> bool:
        """Whether a branch is the one that is measured: the conditional one, which comes first."""
        return place.branch == next(iter(self._branches))

    @property
    def byte_count(self) -> int:
        """Memory that the caches hold now."""
        histories = [self._delta]
        for branch in self._branches.values():
            histories += [branch.output, branch.stack, branch.span]
        return sum(history.byte_count for history in histories)


def guided(outputs: Mapping[str, Tensor], scale: float) -> Tensor:
    """Return what guidance makes of the outputs of a step's branches, as the pipeline does.

    Args:
        outputs: By branch; one alone is what it is.
        scale: Of guidance; 1 gives the conditional output.
    """
    if BATCHED in outputs:
        uncond, cond = outputs[BATCHED].chunk(2)
        return torch.lerp(uncond, cond, scale)
    if UNCOND in outputs and COND in outputs:
        return torch.lerp(outputs[UNCOND], outputs[COND], scale)
    return next(iter(outputs.values()))


def _fits(sample: Tensor, place: Place) -> bool:
    """Whether the input has a part that is shaped like the output."""
    shape, within = sample.shape, place.latents.shape
    return len(shape) == len(within) and all(a <= b for a, b in zip(shape, within, strict=True))


def input_like(sample: Tensor, place: Place) -> Tensor:
    """Return the part of the model's input that its output is about.

    Channels that hold a condition (image to video), and tokens of a reference image, come after.
    """
    return place.latents[tuple(slice(size) for size in sample.shape)]
