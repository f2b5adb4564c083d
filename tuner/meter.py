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
        """Measure a stage; what it took before is added."""
        earlier = self.spent(stage)
        began, before = self.seconds, self._videos()
        yield
        self._spent[stage] = Spent(
            seconds=earlier.seconds + self.seconds - began,
            videos=earlier.videos + self._videos() - before,
        )

    def spent(self, stage: Stage) -> Spent:
        """Return what a stage took so far."""
        return self._spent.get(stage, Spent(seconds=0.0, videos=0.0))

    def cost(self, forwards_per_video: int) -> Cost:
        """Return what all three stages took."""
        return Cost(
            profile=self.spent("profile"),
            search=self.spent("search"),
            proof=self.spent("confirm"),
            forwards_per_video=forwards_per_video,
        )
