"""What a tuning session took, in time and in compute."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ditune.db.record import Positive, Record


class Spent(Record):
    """What one stage took."""

    seconds: Annotated[float, Field(ge=0)]  # of wall-clock
    videos: Annotated[float, Field(ge=0)]  # plain ones' worth of compute


class Cost(Record):
    """What a session took, whichever processes worked for it.

    A video is worth the forwards of one plain call. One that is left out costs nothing, one of
    which some blocks run the share of these; a forward of the small model counts as one.
    """

    profile: Spent
    search: Spent
    proof: Spent  # and what the report shows beside it
    forwards_per_video: Positive

    @property
    def seconds(self) -> float:
        """The wall-clock time of all stages."""
        return self.profile.seconds + self.search.seconds + self.proof.seconds

    @property
    def videos(self) -> float:
        """The compute of all stages, in plain videos."""
        return self.profile.videos + self.search.videos + self.proof.videos

    @property
    def forwards(self) -> int:
        """The same in forwards."""
        return round(self.videos * self.forwards_per_video)
