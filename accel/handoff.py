"""Which of two models runs a step: SRDiffusion's hand-off from a large to a small one.

Fixed hand-offs look at the noise level alone. The adaptive one watches a signal of the large model
on guided outputs, once per step.
Source: SRDiffusion (arXiv 2505.19151), its README and two ports; the signal is our choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ditune.accel.location import Where
from ditune.accel.mixcache import Place, guided, input_like
from ditune.accel.noise import Prediction, denoised, prediction_of
from ditune.accel.payload import relative_l1
from ditune.db.policy import AdaptiveHandoff, HandoffPolicy


class Falling:
    """The adaptive rule: a pure decision from one number a step."""

    def __init__(self, rule: AdaptiveHandoff, steps: int) -> None:
        """Start a call of `steps` steps."""
        self._delta = rule.delta
        self._earliest = math.ceil(rule.min_frac * steps)
        self._latest = math.floor(rule.max_frac * steps)
        self._before: float | None = None
        self.switched = False

    def observe(self, step: int, change: float | None) -> None:
        """Take how much the signal changed at a step, None where nobody knows.

        The switch is for good, and counts from the next step on.
        """
        slows = False
        if change is not None and self._before is not None:
            slows = 0.0 < self._before - change < self._delta
        self._before = change
        self.switched |= step >= self._earliest and (slows or step >= self._latest)


@dataclass
class _Seen:
    """What the last step showed."""

    place: Place
    where: Where
    outputs: dict[str, Tensor] = field(default_factory=dict)


class Signal:
    """Follows a signal of guided outputs from step to step."""

    def __init__(
        self, kind: Literal["denoised", "latent", "output"], prediction: Prediction, scale: float
    ) -> None:
        """Start before the first step; `scale` is the guidance that joins the branches."""
        self._kind = kind
        self._prediction = prediction
        self._scale = scale
        self._seen: _Seen | None = None
        self._before: Tensor | None = None

    def note(self, place: Place, where: Where, sample: Tensor) -> None:
        """Take the output of one forward."""
        if self._seen is None or self._seen.place.step != place.step:
            self._seen = _Seen(place, where)
        self._seen.outputs[place.branch] = sample

    def change(self) -> tuple[int, Tensor | None] | None:
        """Return the last step and its change, a scalar on the device in [0, 1); then forget it.

        None before any step; the change is None where there is nothing to compare with.
        """
        seen, self._seen = self._seen, None
        if seen is None:
            return None
        now, before = self._value(seen), self._before
        self._before = now
        if now is None or before is None or now.shape != before.shape:
            return seen.place.step, None
        return seen.place.step, torch.tanh(relative_l1(now, before))

    def _value(self, seen: _Seen) -> Tensor | None:
        output = guided(seen.outputs, self._scale)
        latents = input_like(output, seen.place)
        if self._kind == "output":
            return output
        if self._kind == "latent":
            return latents
        flow = self._prediction == "flow"
        sigma = seen.where.flow_sigma if flow else seen.where.sigma
        if sigma is None or latents.shape != output.shape:
            return None
        return denoised(latents, output, sigma, self._prediction)


class Router:
    """Says for every step of one call whether the small model runs it."""

    def __init__(self, handoff: HandoffPolicy, steps: int, scheduler: Any, scale: float) -> None:
        """Start a call.

        Args:
            handoff: The policy's.
            steps: Of the call.
            scheduler: Of the pipeline; says what outputs are.
            scale: Guidance scale; 1 without guidance.
        """
        self._handoff = handoff
        self._rule: Falling | None = None
        self._signal: Signal | None = None
        self._step, self._small = -1, False
        if isinstance(handoff, AdaptiveHandoff):
            self._rule = Falling(handoff, steps)
            self._signal = Signal(handoff.signal, prediction_of(scheduler), scale)

    def small(self, step: int, sigma: float) -> bool:
        """Return whether the small model runs a step; decided once, at its first forward."""
        if step != self._step:
            self._step = step
            self._small = self._decide(sigma)
        return self._small

    def note(self, place: Place, where: Where, sample: Tensor) -> None:
        """Take the output of one forward."""
        if self._signal is not None and not self._small:
            self._signal.note(place, where, sample)

    def _decide(self, sigma: float) -> bool:
        handoff = self._handoff
        if not isinstance(handoff, AdaptiveHandoff):
            return handoff.takes(sigma)
        assert self._rule is not None
        if self._signal is not None and not self._rule.switched:
            found = self._signal.change()
            if found is not None:
                step, change = found
                self._rule.observe(step, None if change is None else float(change))
            if self._rule.switched:
                self._signal = None  # it held the latents of two steps
        return self._rule.switched and sigma >= (handoff.until or 0.0)
