"""The nouns of a trade-off curve: what was tried, and what of it was proved without any floor."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ditune.db.cost import Cost
from ditune.db.policy import Policy
from ditune.db.record import Count, Digest, Name, Positive, Record, Status, Timestamp
from ditune.db.records import Evidence, Hardware, Software, Trial, Workload

Also = Literal["memory", "energy"]  # what a curve may weigh besides speed and quality


class CurvePoint(Record):
    """A policy of a curve on held-out prompts.

    Its quality has no floor: `bound` is what its mean exceeds with a confidence of 95 %.
    """

    trial: Count  # the number of the trial that found it
    policy_id: Digest
    policy: Policy
    evidence: Evidence
    bound: float
    peak_bytes: Count | None = None
    energy_j: Annotated[float, Field(ge=0)] | None = None
    dominated: bool  # by another point or the plain pipeline, as they were proved


class Curve(Record):
    """A whole curve of one pipeline: the search, and its proved points from slow to fast.

    The trial of the plain pipeline is the first one; it stands for 1.0 on the curve.
    """

    schema_version: Literal[1] = 1
    hardware: Hardware
    software: Software
    workload: Workload
    metric: Name
    also: Also | None
    study: Name
    plain_ms: Annotated[float, Field(gt=0)]  # median of one whole call, in the profile
    search_videos: Positive  # that each trial was measured on
    proof_videos: Positive  # that each point was measured on; others than those of the search
    trials: tuple[Trial, ...]
    points: tuple[CurvePoint, ...]
    cost: Cost
    created_at: Timestamp
    status: Status = "measured"


def taken(found: Trial | CurvePoint, also: Also | None) -> float | None:
    """Return what a policy takes of the third objective, None where there is none."""
    if also is None:
        return None
    return found.peak_bytes if also == "memory" else found.energy_j
