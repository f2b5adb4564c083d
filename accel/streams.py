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


@dataclass
class Seen:
    """One block's call while streams are learnt."""

    name: str
    index: int
    arguments: dict[Slot, Any]
    output: Any


def streams_of(calls: Sequence[Seen]) -> Streams | None:
    """Return which argument each output becomes, None if that cannot be told."""
    outputs = [as_tuple(call.output) for call in calls]
    if len({len(output) for output in outputs}) != 1:
        return None
    slots: list[Slot | None] = []
    for position in range(len(outputs[0])):
        if all(output[position] is None for output in outputs):
            slots.append(None)
            continue
        slot = _next_slot(calls, outputs, position, taken=slots)
        if slot is None:
            return None
        slots.append(slot)
    return Streams(tuple(slots), single=not isinstance(calls[0].output, tuple | list))


def _next_slot(
    calls: Sequence[Seen],
    outputs: Sequence[tuple[Any, ...]],
    position: int,
    taken: Sequence[Slot | None],
) -> Slot | None:
    """Return the argument that holds one output: the same tensor, else the first of its shape."""
    votes: Counter[Slot] = Counter()
    for call, output in zip(calls[1:], outputs, strict=False):
        value = output[position]
        votes.update(s for s, held in call.arguments.items() if held is value and s not in taken)
    if votes:
        return votes.most_common(1)[0][0]
    value = outputs[0][position]
    if not isinstance(value, Tensor):
        return None
    for slot, held in calls[0].arguments.items():
        if isinstance(held, Tensor) and held.shape == value.shape and slot not in taken:
            return slot
    return None


def as_tuple(output: Any) -> tuple[Any, ...]:
    """Return what a block returned as a tuple, whether it was one or a bare tensor."""
    return tuple(output) if isinstance(output, tuple | list) else (output,)
