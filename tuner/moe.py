"""Tiles for a layer of experts, by the routings that it meets: predicted for a GPU, or timed here.

A routing stands for its bucket. Where several fall into one, tiles are chosen that lose least under
all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import NonNegativeInt, TypeAdapter, ValidationError

from ditune.accel.versions import software
from ditune.db.errors import UsageFault
from ditune.db.moe import CpuTiles, MoeChoice, MoeShape, MoeTuning, RoutingBucket, default_tiles
from ditune.db.record import now
from ditune.db.records import Hardware
from ditune.db.tuning_rows import MoeTunings
from ditune.db.tunings import TunedLayer, newest
from ditune.kernels.digest import kernels_digest
from ditune.kernels.histograms import Kind, histogram
from ditune.kernels.routing_bucket import routing_bucket

Progress = Callable[[str], None]
_COUNTS = TypeAdapter(list[NonNegativeInt])


@dataclass(frozen=True)
class Routed:
    """One routing that a layer is tuned for.

    Args:
        name: For the reader.
        tokens: Of the layer.
        counts: Rows of each expert.
    """

    name: str
    tokens: int
    counts: tuple[int, ...]

    @property
    def bucket(self) -> RoutingBucket:
        """The routings that are computed like it."""
        return routing_bucket(self.counts, self.tokens)


@dataclass(frozen=True)
class Tuned:
    """What was found for one bucket, with what a reader wants to know about it.

    Args:
        choice: Bucket, tiles, status and speedup over the default.
        routings: Names of those that stand for the bucket.
        us: What the layer takes under the first of them, in microseconds.
        note: How the choice was made, in words.
    """

    choice: MoeChoice
    routings: tuple[str, ...]
    us: float
    note: str


def kinds_of_routing(
    shape: MoeShape, tokens: Sequence[int], kinds: Sequence[Kind]
) -> tuple[Routed, ...]:
    """Return synthetic routings of a layer, one per number of tokens and kind.

    Raises:
        UsageFault: Tokens cannot have so many different experts.
    """
    return tuple(
        Routed(f"{kind}, {count} tokens", count, histogram(kind, count, shape.experts, shape.top_k))
        for count in tokens
        for kind in kinds
    )


def read_routings(path: Path, shape: MoeShape) -> tuple[Routed, ...]:
    """Return the routings of a JSON file that somebody recorded from a real model.

    Args:
        path: An object of names and counts, such as `{"step 10": [812, 0, 97, ...]}`: rows of each
            expert in one call of the layer.
        shape: Of the layer.

    Raises:
        UsageFault: The file cannot be read, or counts do not fit the layer; the message names them.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageFault(f"cannot read routings from {path}: {error}") from error
    if not isinstance(found, dict) or not found:
        raise UsageFault(f'{path} must hold an object of counts, such as {{"step 10": [5, 0, 3]}}')
    return tuple(_routed(name, counts, shape) for name, counts in found.items())


def _routed(name: str, counts: object, shape: MoeShape) -> Routed:
    try:
        rows = _COUNTS.validate_python(counts, strict=True)
    except ValidationError:
        rows = []
    if len(rows) != shape.experts:
        raise UsageFault(
            f"routing {name!r} must be {shape.experts} whole numbers >= 0, the rows of each expert"
        )
    total = sum(rows)
    if total == 0 or total % shape.top_k or max(rows) > total // shape.top_k:
        raise UsageFault(
            f"routing {name!r} has {total} rows, the most {max(rows)} on one expert: no tokens "
            f"with {shape.top_k} different experts each have these; count all rows of one call"
        )
    return Routed(name, total // shape.top_k, tuple(rows))


def by_bucket(routed: Sequence[Routed]) -> dict[RoutingBucket, tuple[Routed, ...]]:
    """Return the routings of each bucket, in the order in which they came."""
    found: dict[RoutingBucket, list[Routed]] = {}
    for each in routed:
        found.setdefault(each.bucket, []).append(each)
    return {bucket: tuple(group) for bucket, group in found.items()}


def by_tokens(routed: Sequence[Routed]) -> Iterator[dict[RoutingBucket, tuple[Routed, ...]]]:
    """Yield the buckets that have the same number of tokens: one search serves them all."""
    buckets = by_bucket(routed)
    for tokens in dict.fromkeys(bucket.tokens for bucket in buckets):
        yield {bucket: group for bucket, group in buckets.items() if bucket.tokens == tokens}


def keep(tunings: MoeTunings, hardware: Hardware, shape: MoeShape, found: Sequence[Tuned]) -> None:
    """Store what was found for a shape, with what is known of other buckets and still holds.

    Args:
        tunings: Of a database.
        hardware: What it was found for.
        shape: Of the layer.
        found: At least one.
    """
    on_cpu = isinstance(found[0].choice.tiles, CpuTiles)
    tuning = MoeTuning(
        shape=shape,
        default=CpuTiles() if on_cpu else default_tiles(shape.dtype),
        choices=tuple(each.choice for each in found),
    )
    versions, kernels = software(), kernels_digest()
    older, _ = newest(tunings.of(hardware), shape, versions, kernels)
    tunings.save(
        TunedLayer(
            hardware=hardware,
            software=versions,
            kernels=kernels,
            tuning=tuning if older is None else tuning.and_of(older),
            created_at=now(),
        )
    )
