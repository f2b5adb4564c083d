"""What a child is told first, by the process that starts it."""

from __future__ import annotations

from ditune.db.record import Positive, Record
from ditune.db.records import Location, Origin


class Plain(Record):
    """A plain video that is known already, as an array in a file."""

    prompt: str
    seed: int
    file: Location


class Load(Record):
    """What to load, where to, how much of a GPU it may take, and what need not be made again."""

    origin: Origin
    device: str | None = None  # as torch names it; None: where loading puts it
    device_bytes: Positive | None = None  # what needs more is out of memory
    plain: tuple[Plain, ...] = ()
