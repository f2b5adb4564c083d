"""How much denoising steps repeat themselves, and where a small model would disagree."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditune.accel.mixcache import BATCHED, COND, UNCOND, guided
from ditune.accel.payload import byte_count, relative_l1
from ditune.accel.tap import Observation
from ditune.db.records import ForwardBytes, StepRedundancy


@dataclass
class _Step:
    """What one step of one call left behind; kept until the next step was compared with it."""

    index: int
    sigma: float | None
    outputs: dict[str, Tensor] = field(default_factory=dict)
    siblings: dict[str, Tensor] = field(default_factory=dict)
    span: Tensor | None = None


class Redundancy:
    """Gathers observations of one or more calls; give its `watch` to `accel.tap.tapped`."""

    def __init__(self, guidance_scale: float) -> None:
        """Start empty; the guidance scale weighs the branches of the hand-off disagreement."""
        self._scale = guidance_scale
        self._now: _Step | None = None
        self._before: _Step | None = None
        self._changes: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._sigmas: dict[int, float | None] = {}
        self._count = 0
        self._sizes: dict[str, tuple[int, int]] = {}  # output and hidden state of each branch

    def watch(self, seen: Observation) -> None:
        """Take one forward; compares it with the same branch one step before."""
        self._sizes[seen.branch] = (byte_count(seen.output), seen.span_bytes)
        first = self._begins_step(seen)
        if first:
            self._close()
            index = seen.step if seen.step is not None else self._count
            self._count = index + 1
            self._now = _Step(index, seen.sigma)
            self._sigmas[index] = seen.sigma
        assert self._now is not None
        self._now.outputs[seen.branch] = seen.output
        if seen.sibling is not None:
            self._now.siblings[seen.branch] = seen.sibling
        if first:
            self._now.span = seen.span

    def _begins_step(self, seen: Observation) -> bool:
        """Whether a forward is the first of its step."""
        now = self._now
        if now is None or seen.branch in now.outputs:
            return True
        return seen.step is not None and seen.step != now.index

    def steps(self) -> tuple[StepRedundancy, ...]:
        """Return the mean change per step over the calls seen."""
        self._close()
        return tuple(
            StepRedundancy(
                step=index,
                sigma=self._sigmas[index],
                step_change=self._mean("step", index),
                cfg_change=self._mean("cfg", index),
                block_change=self._mean("block", index),
            )
            for index in sorted(self._sigmas)
        )

    def forward_bytes(self) -> ForwardBytes | None:
        """Return the sizes of one branch of a forward, None before any was seen."""
        if not self._sizes:
            return None
        output, hidden = next(iter(self._sizes.values()))
        if BATCHED in self._sizes:
            return ForwardBytes(output=output // 2, hidden=hidden // 2, branches=2)
        return ForwardBytes(output=output, hidden=hidden, branches=len(self._sizes))

    def disagreement(self) -> tuple[float, ...] | None:
        """Return q_k: relative L2 distance of the small model's guided output, mean per step."""
        self._close()
        curve = [self._mean("sibling", index) for index in sorted(self._sigmas)]
        known = [value for value in curve if value is not None]
        return tuple(known) if known and len(known) == len(curve) else None

    def _mean(self, kind: str, index: int) -> float | None:
        values = self._changes[kind].get(index)
        return sum(values) / len(values) if values else None

    def _close(self) -> None:
        """Compare the finished step with the one before it, then forget the older."""
        now, before = self._now, self._before
        self._now = None
        if now is None:
            return
        self._before = now
        self._note("sibling", now.index, self._sibling_distance(now))
        if before is None or before.index != now.index - 1:
            return
        branch = next(iter(now.outputs))
        self._note("step", now.index, relative_l1(now.outputs[branch], before.outputs[branch]))
        if now.span is not None and before.span is not None:
            self._note("block", now.index, relative_l1(now.span, before.span))
        if {COND, UNCOND} <= now.outputs.keys() & before.outputs.keys():
            delta_now = now.outputs[UNCOND] - now.outputs[COND]
            delta_before = before.outputs[UNCOND] - before.outputs[COND]
            scale = now.outputs[COND].abs().mean()
            self._note("cfg", now.index, (delta_now - delta_before).abs().mean() / scale)

    def _sibling_distance(self, step: _Step) -> Tensor | None:
        if not step.siblings:
            return None
        large, small = (guided(each, self._scale) for each in (step.outputs, step.siblings))
        distance: Tensor = torch.linalg.vector_norm(small - large)
        scale: Tensor = torch.linalg.vector_norm(large)
        return distance / scale

    def _note(self, kind: str, index: int, value: Tensor | None) -> None:
        if value is not None:
            self._changes[kind][index].append(float(value))
