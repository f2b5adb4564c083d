"""What stands in for a forward that is left out: the last values, or a line through them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


def relative_l1(now: Tensor, then: Tensor) -> Tensor:
    """Return mean|now - then| / mean|then| as a scalar tensor on the device; no synchronisation."""
    scale = then.float().abs().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (now.float() - then.float()).abs().mean() / scale


@dataclass
class History:
    """The last computed values of one quantity, with the steps they belong to.

    Values are kept as they were computed, never written to; `order` 0 keeps one, 1 keeps two.
    """

    order: int
    steps: list[int] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def add(self, step: int, value: Tensor) -> None:
        """Remember a value computed at a step."""
        self.steps.append(step)
        self.values.append(value)
        if len(self.values) > self.order + 1:
            del self.steps[0], self.values[0]

    def predict(self, step: int) -> Tensor | None:
        """Return the value expected at a later step, None when nothing was computed yet."""
        if not self.values:
            return None
        if len(self.values) == 1:
            return self.values[0]
        (first, last), (older, newer) = self.steps, self.values
        return torch.lerp(older, newer, (step - first) / (last - first))

    @property
    def byte_count(self) -> int:
        """Memory held by the values."""
        return sum(value.numel() * value.element_size() for value in self.values)
