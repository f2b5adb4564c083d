"""Which bucket a routing falls into, seen from the host; `count_tiles` does the same on a device.

Whole numbers only, so that host and device agree to the last routing.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ditune.db.moe import RoutingBucket, Skew

SKEWS: tuple[Skew, ...] = ("even", "uneven", "steep")


def most_tokens(tokens: int) -> int:
    """Return the power of two that ends the bucket of `tokens` (>= 0); 1 for none."""
    return 1 << max(tokens - 1, 0).bit_length()


def routing_bucket(counts: Sequence[int] | Tensor, tokens: int) -> RoutingBucket:
    """Return the bucket of a routing.

    Args:
        counts: Rows of each expert, [experts] with experts >= 1, each >= 0. A tensor on a device is
            waited for.
        tokens: Tokens of the layer, >= 0.

    Returns:
        The bucket; without any rows it is that of one row on one expert.
    """
    rows = [int(count) for count in (counts.tolist() if isinstance(counts, Tensor) else counts)]
    active = max(sum(count > 0 for count in rows), 1)
    largest, total = max(rows) * active, max(sum(rows), 1)
    steepness = (largest >= 2 * total) + (largest >= 8 * total)
    return RoutingBucket(
        tokens=most_tokens(tokens),
        skew=SKEWS[steepness],
        active=(len(rows) // active).bit_length() - 1,
    )
