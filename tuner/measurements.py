"""What a benchmark of many hours has measured so far, in a file that a restart goes on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ditune.db.errors import CorruptData
from ditune.tuner.evaluate import Case

Kind = Literal["counted", "timed", "judged"]


@dataclass(frozen=True)
class Measurement:
    """One generation under one setting; "counted" ones have `flops`, "timed" ones `ms`.

    "judged" ones have neither: they were made many at once, or on another machine.
    """

    kind: Kind
    peer: str
    setting: str
    prompt: str
    seed: int
    values: Mapping[str, float]
    flops: int | None = None
    ms: float | None = None

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What makes two measurements the same one."""
        return (self.kind, self.peer, self.setting, self.prompt, self.seed)


class Measurements:
    """Measurements by key; each is on the disk before the next is taken."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a last line that a crash cut off is dropped.

        Raises:
            CorruptData: The file holds something else.
        """
        self._path = path
        self._known: dict[tuple[str, str, str, str, int], Measurement] = {}
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                found = Measurement(**json.loads(line))
            except (ValueError, TypeError) as fault:
                raise CorruptData(
                    f"line {number} of {path} is no measurement ({fault}): name another folder"
                ) from fault
            self._known[found.key] = found
        if whole != text:
            path.write_text(whole, encoding="utf-8")

    def get(
        self, kind: Kind, peer: str, setting: str, case: Case, take: Callable[[], Measurement]
    ) -> Measurement:
        """Return a measurement, taking and keeping it if it is not there yet."""
        known = self.find(kind, peer, setting, case)
        if known is not None:
            return known
        found = take()
        self.keep(found)
        return found

    def find(self, kind: Kind, peer: str, setting: str, case: Case) -> Measurement | None:
        """Return a measurement, None if it was not taken yet."""
        return self._known.get((kind, peer, setting, case.prompt, case.seed))

    def keep(self, found: Measurement) -> None:
        """Add a measurement that is not there yet."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(found)) + "\n")
        self._known[found.key] = found
