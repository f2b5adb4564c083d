"""What every record shares: exact types, no unknown fields, no change after creation."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Status = Literal["measured", "predicted", "compiled", "simulated"]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Timestamp = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$")]


class Record(BaseModel):
    """A strict, frozen value without NaN; content addresses are taken of these."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


def now() -> str:
    """Return the time as a `Timestamp`, in UTC; all have the same digits, so their texts sort."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
