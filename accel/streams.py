"""Which tensors flow from block to block: seen in one forward, not known from a registry.

An output of one block that is the very tensor that the next one takes is a stream.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Slot = int | str  # position or name of an argument


@dataclass(frozen=True)
class Streams:
    """For each output of a block, the argument of the next block that it becomes."""

    slots: tuple[Slot | None, ...]  # None: the block returned None there
    single: bool  # one tensor is returned bare instead of in a tuple

    def passed(self, arguments: Mapping[Slot, Any]) -> Any:
        """Return what a block returns that does nothing."""
        values = tuple(None if slot is None else arguments[slot] for slot in self.slots)
        return values[0] if self.single else values

    def entering(self, arguments: Mapping[Slot, Any]) -> list[Tensor]:
        """Return the streams among a block's arguments."""
        return [arguments[slot] for slot in self.slots if slot is not None]

    def leaving(self, output: Any) -> list[Tensor]:
        """Return the streams among what a block returned."""
        outputs = as_tuple(output)
        return [outputs[i] for i, slot in enumerate(self.slots) if slot is not None]

    def returned(self, streams: Sequence[Tensor]) -> Any:
        """Return streams as a block would."""
        left = iter(streams)
        values = tuple(None if slot is None else next(left) for slot in self.slots)
        return values[0] if self.single else values


class Learner:
    """Watches the calls of one list's blocks; it holds no tensor longer than to the next call."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self.trouble = False
        self._previous: tuple[Any, ...] = ()
        self._none: list[bool] = []  # for each output, whether every block returned None there
        self._fallback: list[list[Slot]] = []  # arguments of the first block that are shaped alike
        self._votes: list[Counter[Slot]] = []  # arguments that were the output before
        self._single = False

    def enter(self, arguments: Mapping[Slot, Any]) -> None:
        """See what a block is called with, and which of it the block before returned."""
        for votes, value in zip(self._votes, self._previous, strict=False):
            votes.update(slot for slot, held in arguments.items() if held is value)
        self._previous = ()

    def leave(self, arguments: Mapping[Slot, Any], output: Any) -> None:
        """See what it returned."""
        values = as_tuple(output)
        if not self._votes:
            self._single = not isinstance(output, tuple | list)
            self._none = [True] * len(values)
            self._fallback = [_shaped_like(value, arguments) for value in values]
            self._votes = [Counter() for _ in values]
        self.trouble = self.trouble or len(values) != len(self._votes)
        pairs = zip(self._none, values, strict=False)
        self._none = [before and value is None for before, value in pairs]
        self._previous = values

    def streams(self) -> Streams | None:
        """Return which argument each output becomes, None if that cannot be told."""
        self._previous = ()
        slots: list[Slot | None] = []
        for none, votes, alike in zip(self._none, self._votes, self._fallback, strict=False):
            likely = [slot for slot, _ in votes.most_common()] or alike
            free = [slot for slot in likely if slot not in slots]
            if not none and not free:
                return None
            slots.append(None if none else free[0])
        return None if self.trouble else Streams(tuple(slots), self._single)


def _shaped_like(value: Any, arguments: Mapping[Slot, Any]) -> list[Slot]:
    """Return the arguments with a tensor of a value's shape."""
    if not isinstance(value, Tensor):
        return []
    return [
        slot
        for slot, held in arguments.items()
        if isinstance(held, Tensor) and held.shape == value.shape
    ]


def as_tuple(output: Any) -> tuple[Any, ...]:
    """Return what a block returned as a tuple, whether it was one or a bare tensor."""
    return tuple(output) if isinstance(output, tuple | list) else (output,)
