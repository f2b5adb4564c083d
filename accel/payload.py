"""What stands in for a forward that is left out: the last values, or a forecast from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

Values = tuple[Tensor, ...]
_TINY = 1e-30  # so small that nothing is added, so large that no change becomes infinite


def relative_l1(now: Tensor, then: Tensor) -> Tensor:
    """Return sum|now - then| / sum|then| as a scalar tensor on the device; no synchronisation."""
    before = then.float()
    size: Tensor = torch.linalg.vector_norm(before, 1)
    change: Tensor = torch.dist(now.float(), before, 1)
    return change / size.clamp_min(_TINY)


def byte_count(tensor: Tensor) -> int:
    """Return the memory that a tensor's values take."""
    return tensor.numel() * tensor.element_size()


def positions(arc_length: Sequence[float] | None, steps: int) -> list[float]:
    """Return where each step of a call lies on the axis that forecasts run over.

    Args:
        arc_length: Of a call with any number of steps; a call with another number takes what lies
            between. None: the steps' numbers.
        steps: Of the call.
    """
    if arc_length is None:
        return [float(step) for step in range(steps)]
    known = np.linspace(0.0, 1.0, len(arc_length))
    between: list[float] = np.interp(np.linspace(0.0, 1.0, steps), known, arc_length).tolist()
    return between


def taylor_weights(known: Sequence[float], at: float) -> list[float]:
    """Return the weight of each known value in the polynomial through them, taken elsewhere.

    One value gives plain reuse, two a line, three a parabola: Taylor's expansion with finite
    differences of uneven distance.

    Args:
        known: Distinct positions of known values.
        at: Where the polynomial is evaluated.
    """
    weights = []
    for index, position in enumerate(known):
        others = [other for place, other in enumerate(known) if place != index]
        weight = 1.0
        for other in others:
            weight *= (at - other) / (position - other)
        weights.append(weight)
    return weights


def combined(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """Return the weighted sum of tensors; a single weight of one gives the tensor itself."""
    if len(values) == 1 and weights[0] == 1.0:
        return values[0]
    total = values[0] * weights[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = torch.add(total, value, alpha=weight)
    return total


@dataclass
class History:
    """The last computed values of one quantity, with the steps they belong to.

    Values are kept as they were computed, never written to; an order keeps one more than itself.
    `positions` says where each step of the call lies on the axis that forecasts run over.
    """

    order: int
    positions: Sequence[float]
    steps: list[int] = field(default_factory=list)
    values: list[Values] = field(default_factory=list)

    def add(self, step: int, *value: Tensor) -> None:
        """Remember what was computed at a step."""
        self.steps.append(step)
        self.values.append(value)
        if len(self.values) > self.order + 1:
            del self.steps[0], self.values[0]

    def predict(self, step: int) -> Values | None:
        """Return what is expected at a later step, None when nothing was computed yet."""
        if not self.values:
            return None
        known = [self.positions[each] for each in self.steps]
        weights = taylor_weights(known, self.positions[step])
        return tuple(combined(weights, kept) for kept in zip(*self.values, strict=True))

    @property
    def byte_count(self) -> int:
        """Memory held by the values."""
        return sum(byte_count(tensor) for value in self.values for tensor in value)


def amplified(delta: Tensor, low: float, high: float) -> Tensor:
    """Return a difference of branches with its low and its high frequencies scaled.

    The low frequencies are a disc around zero with a fifth of the shorter side as its radius, over
    the last two dimensions.
    Source: FasterCache (its CogVideoX script), which scales both by 1.1 in turn.

    Args:
        delta: [..., height, width].
        low: Factor on the low frequencies, 1 leaves them.
        high: Factor on all others.
    """
    height, width = delta.shape[-2:]
    rows = torch.fft.fftfreq(height, 1.0 / height, device=delta.device)[:, None]
    columns = torch.fft.fftfreq(width, 1.0 / width, device=delta.device)[None, :]
    disc = rows.square() + columns.square() <= (min(height, width) // 5) ** 2
    spectrum = torch.fft.fft2(delta.float())
    scaled = torch.fft.ifft2(spectrum * torch.where(disc, low, high)).real
    kept: Tensor = scaled.to(delta.dtype)
    return kept
