"""Adds up what the stages of a session take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ditune.db.cost import Cost, Spent
from ditune.tuner.progress import Stage


class Meter:
    """A clock and a count of compute, read at the ends of each stage."""

    def __init__(self, videos: Callable[[], float]) -> None:
        """Begin; `videos` says how many plain ones' worth of compute all of it took so far."""
        self._videos = videos
        self._began = time.monotonic()
        self._spent: dict[Stage, Spent] = {}

    @property
    def seconds(self) -> float:
        """The time since it began."""
        return time.monotonic() - self._began

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Measure a stage; each is measured once."""
        began, before = self.seconds, self._videos()
        yield
        spent = Spent(seconds=self.seconds - began, videos=self._videos() - before)
        self._spent[stage] = spent

    def cost(self, forwards_per_video: int) -> Cost:
        """Return what all three stages took."""
        return Cost(
            profile=self._spent["profile"],
            search=self._spent["search"],
            proof=self._spent["confirm"],
            forwards_per_video=forwards_per_video,
        )
