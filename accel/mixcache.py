"""MixCache's actions: what a full, step-, cfg- or block-cached forward does with tensors.

Rules that keep granularities from interfering (each has a test): one granularity per step; caches
are written at full steps only; both branches always have the same age; a model without a second
branch has no cfg granularity; the scheduler gets an output at every step.
Source: MixCache (arXiv 2508.12691), completed where the paper is silent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditune.accel.anatomy import BlockStack, SpanRunner
from ditune.accel.payload import History, relative_l1
from ditune.accel.trigger import Measured, Trigger
from ditune.db.records import Action, CachePolicy, Granularity, MaskCache

COND, UNCOND = "cond", "uncond"
Compute = Callable[[], Tensor]  # runs the model's own forward and returns its sample


@dataclass
class Tally:
    """What one pipeline call did, counted while it runs."""

    actions: Counter[str] = field(default_factory=Counter)  # steps by action
    forwards: int = 0  # asked for by the pipeline
    computed: int = 0  # reached the model, in full or in part
    small_forwards: int = 0  # of those, done by the small model
    blocks_run: int = 0
    blocks_asked: int = 0  # what the plain pipeline would have run
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

    def __init__(self, cache: CachePolicy, stack: BlockStack, tally: Tally) -> None:
        """Prepare empty caches; `tally` is shared by all denoisers of the call."""
        self._cache = cache
        self._stack = stack
        self._tally = tally
        actions = set(cache.actions) if isinstance(cache, MaskCache) else {"full", *cache.allowed}
        hidden = cache.payload.form == "hidden"
        self._keeps_stack = hidden and "step" in actions
        self._keeps_span = "block" in actions
        self._branches: dict[str, _Branch] = {}
        self._delta = History(cache.payload.order)
        self._fresh_cond: Tensor | None = None
        self._distances: dict[Granularity, Tensor] = {}
        self._deviation: Tensor | None = None
        self._gap = 0

    def forward(self, action: Action, step: int, branch: str, compute: Compute) -> Tensor:
        """Return the branch's output at a step, computed or reused as the action says."""
        state = self._branches.setdefault(branch, self._new_branch())
        depth = len(self._stack)
        self._tally.forwards += 1
        self._tally.blocks_asked += depth
        sample: Tensor | None = None
        if action == "step":
            sample = self._step(state, step, compute)
        elif action == "cfg" and branch == UNCOND:
            sample = self._cfg(step)
        elif action == "block":
            sample = self._block(state, step, compute)
        if sample is None:
            sample = self._full(action, state, step, branch, compute)
            self._tally.computed += 1
            self._tally.blocks_run += depth
        return sample

    def measured(self) -> Measured | None:
        """Return what the last full step showed; synchronises the device once.

        None until something could have been reused. Call it once per full step, after the last
        branch.
        """
        if self._deviation is None:
            return None
        names = list(self._distances)
        tensors = [self._deviation, *(self._distances[name] for name in names)]
        values = torch.stack([t.float() for t in tensors]).tolist()
        gap = max(self._gap, 1)
        self._deviation, self._distances = None, {}
        return Measured(values[0], {n: v / gap for n, v in zip(names, values[1:], strict=True)})

    def _new_branch(self) -> _Branch:
        order = self._cache.payload.order
        return _Branch(History(order), History(order), History(order))

    # --- reuse ---------------------------------------------------------------------------------

    def _step(self, state: _Branch, step: int, compute: Compute) -> Tensor | None:
        if not self._keeps_stack:
            return state.output.predict(step)
        residual = state.stack.predict(step)
        return None if residual is None else self._run_around(residual, 0, 0, compute)

    def _cfg(self, step: int) -> Tensor | None:
        delta = self._delta.predict(step)
        if delta is None or self._fresh_cond is None:
            return None
        return self._fresh_cond + delta

    def _block(self, state: _Branch, step: int, compute: Compute) -> Tensor | None:
        residual = state.span.predict(step)
        if residual is None:
            return None
        fn, bn = self._cache.fn_blocks, self._cache.bn_blocks
        self._tally.blocks_run += min(fn + bn, len(self._stack))
        return self._run_around(residual, fn, bn, compute)

    def _run_around(self, residual: Tensor, fn: int, bn: int, compute: Compute) -> Tensor:
        self._tally.computed += 1
        with self._stack.replaced(SpanRunner(self._stack.blocks, fn, bn, residual)):
            return compute()

    # --- computing -----------------------------------------------------------------------------

    def _full(
        self, action: Action, state: _Branch, step: int, branch: str, compute: Compute
    ) -> Tensor:
        """Compute; remember the result only if the whole step is full (rule 2)."""
        if action != "full":
            sample = compute()
        elif self._keeps_stack or self._keeps_span:
            cache = self._cache
            runner = SpanRunner(self._stack.blocks, cache.fn_blocks, cache.bn_blocks)
            with self._stack.replaced(runner):
                sample = compute()
            self._remember(state, step, sample, runner)
        else:
            sample = compute()
            self._remember(state, step, sample, None)
        if branch == COND:
            self._fresh_cond = sample
        elif branch == UNCOND and action == "full" and self._fresh_cond is not None:
            self._remember_delta(step, sample - self._fresh_cond)
        return sample

    def _remember(
        self, state: _Branch, step: int, sample: Tensor, runner: SpanRunner | None
    ) -> None:
        expected = state.output.predict(step)
        if expected is not None:
            self._gap = step - state.output.steps[-1]
            self._note("step", relative_l1(sample, state.output.values[-1]))
            deviation = relative_l1(expected, sample)
            known = self._deviation
            self._deviation = deviation if known is None else torch.maximum(known, deviation)
        state.output.add(step, sample)
        if runner is None:
            return
        if self._keeps_stack and runner.stack is not None:
            state.stack.add(step, runner.stack)
        if self._keeps_span and runner.span is not None:
            if state.span.values:
                self._note("block", relative_l1(runner.span, state.span.values[-1]))
            state.span.add(step, runner.span)

    def _remember_delta(self, step: int, delta: Tensor) -> None:
        if self._delta.values:
            assert self._fresh_cond is not None
            scale = self._fresh_cond.float().abs().mean()
            change = (delta - self._delta.values[-1]).float().abs().mean()
            self._note("cfg", change / scale.clamp_min(torch.finfo(torch.float32).tiny))
        self._delta.add(step, delta)

    def _note(self, granularity: Granularity, distance: Tensor) -> None:
        known = self._distances.get(granularity)
        self._distances[granularity] = distance if known is None else torch.maximum(known, distance)

    @property
    def byte_count(self) -> int:
        """Memory that the caches hold now."""
        histories = [self._delta]
        for branch in self._branches.values():
            histories += [branch.output, branch.stack, branch.span]
        return sum(history.byte_count for history in histories)


class StepPlan:
    """One decision per step, shared by both branches and both experts of a call."""

    def __init__(self, trigger: Trigger) -> None:
        """Start before the first step."""
        self._trigger = trigger
        self._step = -1
        self._action: Action = "full"
        self._used: MixCache | None = None

    def action(self, step: int, cache: MixCache, tally: Tally) -> Action:
        """Return the step's action, deciding it when the step is new."""
        if step != self._step:
            if self._used is not None and self._action == "full":
                self._trigger.observe(self._step, self._used.measured())
            self._step = step
            self._action = self._trigger.decide(step)
            tally.actions[self._action] += 1
        self._used = cache
        return self._action
