"""What a session tells while it runs."""

from __future__ import annotations

from typing import Literal, Protocol

Stage = Literal["profile", "search", "confirm"]


class Progress(Protocol):
    """Shown while a session runs; the command line draws it, the default keeps quiet."""

    def update(self, stage: Stage, done: int, total: int, note: str) -> None:
        """Say how far a stage is."""


class Quiet:
    """A progress that shows nothing."""

    def update(self, stage: Stage, done: int, total: int, note: str) -> None:
        """Keep quiet."""
