"""The nouns of a comparison with peers: what each gave, at which floors, under which conditions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ditune.db.policy import Policy
from ditune.db.record import Count, Name, Positive, Record, Status, Timestamp
from ditune.db.records import Constraint, Hardware, Interval, Quality, Software, Workload

Ratio = Annotated[float, Field(gt=0)]


class Contender(Record):
    """One setting of one peer on the calibration prompts."""

    peer: Name
    setting: str
    work_ratio: Ratio  # operations of the plain pipeline / operations under the setting
    quality: dict[str, Quality]
    n: Positive


class Standing(Record):
    """The fastest setting of one peer that was proved to hold some floors, on held-out prompts.

    Without such a setting a peer stands at 1.0, and `reason` says why. What is ours has its policy
    beside the setting's name.
    """

    peer: Name
    floors: tuple[Constraint, ...]
    setting: str | None
    policy: Policy | None = None
    reason: str
    work_ratio: Interval
    speedup: Interval  # plain latency / latency, interleaved
    quality: dict[str, Quality]
    holds: bool  # on the held-out prompts


class Lead(Record):
    """Ours against the best peer at some floors: ratios of the same prompts and seeds."""

    floors: tuple[Constraint, ...]
    best_by_work: Name
    work: Interval
    best_by_speed: Name
    speed: Interval


class Comparison(Record):
    """A whole comparison: what was swept, what stood, and how far ahead ours is."""

    schema_version: Literal[1] = 1
    hardware: Hardware
    software: Software
    workload: Workload
    threads: Positive
    calibration: Count  # prompts that settings were swept on
    confirmation: Count  # further videos that the fastest had to hold their floors on
    held_out: Count  # videos that the figures rest on
    contenders: tuple[Contender, ...]
    standings: tuple[Standing, ...]
    leads: tuple[Lead, ...]
    created_at: Timestamp
    status: Status = "measured"
