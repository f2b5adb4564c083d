"""Points that trade one thing for another: which of them are worth a look, pure functions.

A point is a tuple of numbers of which more is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

Point = tuple[float, ...]


def dominates(better: Point, other: Point) -> bool:
    """Whether a point is nowhere worse than another one, and somewhere better."""
    return better != other and all(b >= o for b, o in zip(better, other, strict=True))


def front(points: Sequence[Point]) -> list[int]:
    """Return the places of the points that no other one dominates, in order."""
    return [
        place
        for place, point in enumerate(points)
        if not any(dominates(other, point) for other in points)
    ]


def spread(values: Sequence[float], count: int) -> list[int]:
    """Return the places of some values that lie far from each other, in order.

    The least and the greatest one are among them, where `count` allows; then always the one that is
    farthest from those taken.

    Args:
        values: On a scale on which distances mean the same everywhere.
        count: How many at most.
    """
    if len(values) <= count:
        return list(range(len(values)))
    ends = (values.index(max(values)), values.index(min(values)))
    taken = list(dict.fromkeys(ends))[:count]
    while len(taken) < count:
        left = [place for place in range(len(values)) if place not in taken]
        taken.append(max(left, key=lambda p: min(abs(values[p] - values[t]) for t in taken)))
    return sorted(taken)


def budgets(tried: Iterable[int], fewest: int, most: int) -> Iterator[int]:
    """Yield every number of computed steps that was not tried, first what lies farthest from it.

    Distances are ratios: from 4 to 6 steps is as far as from 20 to 30. So those tried always make
    up a geometric grid, which gets finer; of two equally far ones the greater comes first.

    Args:
        tried: One or more numbers.
        fewest: The least number to yield.
        most: The greatest.
    """
    known = set(tried)
    left = [budget for budget in range(most, fewest - 1, -1) if budget not in known]
    while left:
        farthest = max(left, key=lambda b: min(abs(math.log(b / k)) for k in known))
        yield farthest
        known.add(farthest)
        left.remove(farthest)
