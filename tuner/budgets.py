"""Bisection over one number that decides most of both speed and quality.

A video costs seconds to minutes. How many steps are computed, or after how many the small model
takes over, decides the most: a handful of trials finds where the floors begin to break.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Bracket:
    """The least level that held so far, and the greatest below it that did not."""

    held: int
    missed: int

    @property
    def closed(self) -> bool:
        """Whether no level is left between them."""
        return self.held - self.missed <= 1


def bracket(tried: Iterable[tuple[int, bool]], fewest: int, most: int) -> Bracket:
    """Return what is known of the levels from `fewest` to `most`, of which the last one holds.

    Args:
        tried: Levels and whether they held; a level that held once has not missed.
        fewest: The least level that there is.
        most: The greatest.
    """
    held, missed = {most}, {fewest - 1}
    for level, holds in tried:
        (held if holds else missed).add(level)
    least = min(held)
    return Bracket(least, max((level for level in missed if level < least), default=least - 1))


def next_level(known: Bracket) -> int | None:
    """Return what to try next, None when the bracket is closed.

    Quality is taken to fall with every level that is given up.
    """
    if known.closed:
        return None
    middle = round(math.sqrt(known.held * max(known.missed, 1)))
    return min(max(middle, known.missed + 1), known.held - 1)
