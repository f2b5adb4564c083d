"""What stages take is added up, however often each one comes."""

from __future__ import annotations

import time

import pytest

from ditune.db.cost import Spent
from ditune.tuner.meter import Meter


def test_a_stage_that_comes_again_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, videos = 0.0, 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    meter = Meter(lambda: videos)
    for seconds, count in ((2.0, 3.0), (5.0, 1.0)):
        with meter.stage("search"):
            clock, videos = clock + seconds, videos + count
        clock += 10.0  # in between
    assert meter.seconds == 27.0
    assert meter.spent("search") == Spent(seconds=7.0, videos=4.0)
    cost = meter.cost(forwards_per_video=8)
    assert (cost.search.seconds, cost.videos, cost.forwards) == (7.0, 4.0, 32)
    assert cost.profile == cost.proof == Spent(seconds=0.0, videos=0.0)  # they never came
