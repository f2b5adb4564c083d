from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditune.accel.payload import History, relative_l1


def test_nothing_is_predicted_from_nothing() -> None:
    assert History(order=1).predict(3) is None


def test_order_zero_reuses_the_last_value() -> None:
    history = History(order=0)
    history.add(0, torch.tensor([1.0]))
    history.add(2, torch.tensor([5.0]))
    assert torch.equal(torch.tensor([5.0]), history.predict(9))  # type: ignore[arg-type]
    assert history.byte_count == 4


@given(slope=st.floats(-3, 3), offset=st.floats(-3, 3), gap=st.integers(1, 9))
def test_order_one_is_exact_on_a_line(slope: float, offset: float, gap: int) -> None:
    history = History(order=1)
    for step in (0, 2, 3):
        history.add(step, torch.tensor([offset + slope * step]))
    expected = torch.tensor([offset + slope * (3 + gap)])
    torch.testing.assert_close(history.predict(3 + gap), expected, atol=1e-4, rtol=1e-4)


def test_relative_l1_is_the_share_that_changed() -> None:
    then = torch.full((4,), 2.0)
    assert pytest.approx(0.25) == float(relative_l1(then * 1.25, then))
    assert torch.isfinite(relative_l1(then, torch.zeros(4)))
