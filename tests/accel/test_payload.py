from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditune.accel.payload import (
    History,
    amplified,
    positions,
    relative_l1,
    taylor_weights,
)

NUMBERS = positions(None, 64)


def only(history: History, step: int) -> torch.Tensor:
    predicted = history.predict(step)
    assert predicted is not None
    (value,) = predicted
    return value


def test_nothing_is_predicted_from_nothing() -> None:
    assert History(1, NUMBERS).predict(3) is None


def test_order_zero_reuses_the_last_value() -> None:
    history = History(0, NUMBERS)
    history.add(0, torch.tensor([1.0]))
    history.add(2, torch.tensor([5.0]))
    assert torch.equal(torch.tensor([5.0]), only(history, 9))
    assert history.byte_count == 4


@given(
    coefficients=st.lists(st.floats(-3, 3), min_size=1, max_size=3),
    gap=st.integers(1, 6),
)
def test_an_order_is_exact_on_polynomials_of_its_degree(
    coefficients: list[float], gap: int
) -> None:
    def polynomial(step: int) -> torch.Tensor:
        return torch.tensor([sum(c * step**power for power, c in enumerate(coefficients))])

    history = History(len(coefficients) - 1, NUMBERS)
    for step in (0, 2, 3, 5):
        history.add(step, polynomial(step))
    predicted = only(history, 5 + gap)
    torch.testing.assert_close(predicted, polynomial(5 + gap), atol=2e-3, rtol=1e-4)


def test_a_line_runs_over_the_positions() -> None:
    history = History(1, [0.0, 1.0, 5.0, 9.0])
    history.add(0, torch.tensor([0.0]))
    history.add(1, torch.tensor([2.0]))
    torch.testing.assert_close(only(history, 3), torch.tensor([18.0]))


def test_positions_of_another_number_of_steps_lie_between() -> None:
    arc = (0.0, 1.0, 4.0)
    assert positions(arc, 3) == [0.0, 1.0, 4.0]
    assert positions(arc, 5) == [0.0, 0.5, 1.0, 2.5, 4.0]
    assert positions(arc, 1) == [0.0]
    assert positions(None, 3) == [0.0, 1.0, 2.0]


@given(
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=4, unique=True), at=st.integers(0, 60)
)
def test_taylor_weights_keep_constants(steps: list[int], at: int) -> None:
    assert pytest.approx(1.0, rel=1e-6, abs=1e-4) == sum(taylor_weights(steps, at))
    assert pytest.approx([1.0 if s == steps[0] else 0.0 for s in steps]) == taylor_weights(
        steps, steps[0]
    )


def test_relative_l1_is_the_share_that_changed() -> None:
    then = torch.full((4,), 2.0)
    assert pytest.approx(0.25) == float(relative_l1(then * 1.25, then))
    assert torch.isfinite(relative_l1(then, torch.zeros(4)))


def test_low_and_high_frequencies_are_scaled_apart() -> None:
    flat = torch.ones(1, 2, 10, 10)
    checkered = torch.ones(10, 10)
    checkered[::2, 1::2] = checkered[1::2, ::2] = -1.0
    torch.testing.assert_close(amplified(flat, 2.0, 3.0), flat * 2.0)
    torch.testing.assert_close(amplified(checkered, 2.0, 3.0), checkered * 3.0)
    mixed = flat + checkered
    torch.testing.assert_close(amplified(mixed, 1.0, 1.0), mixed)
