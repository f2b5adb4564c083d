"""A race finds the fastest, and leaves the default where nothing is faster beyond doubt."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from ditune.tuner.race import heat, race

NAMES = tuple(range(40))


def noisy(true: dict[int, float], seed: int, noise: float = 0.05) -> tuple[list[int], object]:
    """Return a log of runs, and a function that times with log-normal noise and a slow drift."""
    chance, log = random.Random(seed), list[int]()

    def timed(each: int) -> float:
        log.append(each)
        return true[each] * (1.0 + 0.001 * len(log)) * chance.lognormvariate(0.0, noise)

    return log, timed


def test_a_clearly_faster_candidate_wins() -> None:
    found = []
    for seed in range(30):
        true = dict.fromkeys(NAMES, 1.0) | {17: 0.8, 23: 0.83}
        log, timed = noisy(true, seed)
        raced = race(NAMES, 0, timed)  # type: ignore[arg-type]
        found.append(raced.winner)
        assert raced.winner in (17, 23)
        assert raced.speedup.ci95[0] > 1.0
        assert abs(raced.speedup.median - 1.0 / true[raced.winner]) < 0.1
        assert len(log) < 320
    assert found.count(17) >= 20


def test_nothing_is_shipped_that_is_not_faster() -> None:
    wrong = 0
    for seed in range(60):
        _, timed = noisy(dict.fromkeys(NAMES, 1.0), seed)
        wrong += race(NAMES, 0, timed).winner != 0  # type: ignore[arg-type]
    assert wrong <= 9  # the better of two, at 2.5 % each, and luck


@given(st.integers(0, 6), st.integers(0, 6))
def test_the_default_takes_part_whatever_the_field_is(others: int, slower: int) -> None:
    field = list(range(1, others + 1))
    raced = race(field, 0, lambda each: 1.0 if each == 0 else 2.0 + slower, run_off=3)
    assert (raced.winner, raced.speedup.median) == (0, 1.0)
    raced = race(field, 0, lambda each: 3.0 - each / 10, run_off=3)
    assert raced.winner == others


def test_a_candidate_that_is_named_twice_or_is_the_default_runs_once_a_round() -> None:
    log: list[int] = []
    race((1, 1, 0), 0, lambda each: log.append(each) or 1.0, run_off=5)  # type: ignore[func-returns-value]
    assert sorted(log) == [0] * 5 + [1] * 5


def test_heats_thin_the_field_out_and_spend_little_on_the_slow() -> None:
    log, timed = noisy({each: 1.0 + each / 10 for each in range(10)}, seed=0, noise=0.01)
    left = heat((*range(9, -1, -1), 3), timed, ((2, 4), (3, 2)))  # type: ignore[arg-type]
    assert left == [0, 1]
    assert (log.count(9), log.count(0), len(log)) == (2, 5, 2 * 10 + 3 * 4)
    assert heat((5, 4), timed, ((2, 4), (3, 2))) == [5, 4]  # type: ignore[arg-type]
    assert len(log) == 32
