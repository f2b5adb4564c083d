"""Which of some candidates is the fastest: timed in turn, in heats; the default has every doubt.

Source: successive halving (Jamieson and Talwalkar, arXiv 1502.07943); the run-off of the best two
is what mistral.rs does when it loads (its pull request 2413).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ditune.db.records import Interval
from ditune.profiler.statistics import paired_speedup

T = TypeVar("T", bound=Hashable)

Heats = Sequence[tuple[int, int]]  # of each: rounds, and how many go on
_HEATS: Heats = ((3, 8), (9, 2))
_RUN_OFF = 30  # rounds


@dataclass(frozen=True)
class Raced(Generic[T]):
    """How a race ended.

    Args:
        winner: The fastest, or the default where that cannot be told from it.
        speedup: Of the winner over the default; exactly 1 where the default won.
    """

    winner: T
    speedup: Interval


def race(
    candidates: Iterable[T],
    default: T,
    timed: Callable[[T], float],
    heats: Heats = _HEATS,
    run_off: int = _RUN_OFF,
) -> Raced[T]:
    """Return the fastest candidate, if it is faster than the default beyond doubt.

    Every round times all that are still in it, one after the other, and begins with another one, so
    that drift and what ran before strike all alike.

    Args:
        candidates: What else there is; the default may be among them.
        default: Takes part to the end.
        timed: Runs one once and returns what it took, > 0, in any unit.
        heats: What thins the candidates out.
        run_off: Rounds of those that are left and the default.
    """
    field = heat([each for each in candidates if each != default], timed, heats)
    times = _rounds([default, *field], timed, run_off)
    best = min(times, key=lambda each: statistics.median(times[each]))
    speedup = paired_speedup(times[default], times[best])
    if speedup.ci95[0] > 1.0:
        return Raced(best, speedup)
    return Raced(default, Interval(median=1.0, ci95=(1.0, 1.0), n=run_off))


def heat(candidates: Iterable[T], timed: Callable[[T], float], heats: Heats) -> list[T]:
    """Return the candidates that go on after all heats; the fastest of a heat that ran comes first.

    Args:
        candidates: In any order; what is named twice runs once.
        timed: As for `race`.
        heats: One that would leave nobody out is not run.
    """
    field = list(dict.fromkeys(candidates))
    for rounds, places in heats:
        if len(field) > places:
            times = _rounds(field, timed, rounds)
            field = sorted(field, key=lambda each: statistics.median(times[each]))[:places]
    return field


def _rounds(field: Sequence[T], timed: Callable[[T], float], rounds: int) -> dict[T, list[float]]:
    times: dict[T, list[float]] = {each: [] for each in field}
    for number in range(rounds):
        first = number % len(field)
        for each in (*field[first:], *field[:first]):
            times[each].append(timed(each))
    return times
