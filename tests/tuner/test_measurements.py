from __future__ import annotations

from pathlib import Path

import pytest

from ditune.db.errors import CorruptData
from ditune.tuner.evaluate import Case
from ditune.tuner.measurements import Measurement, Measurements

CASE = Case("a red 3", 7)


def taken(flops: int, case: Case = CASE) -> Measurement:
    return Measurement("counted", "peer", "fast", case.prompt, case.seed, {"psnr": 40.0}, flops)


def unwanted() -> Measurement:
    raise AssertionError("this was measured before")


def test_nothing_is_measured_twice_not_even_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    first = Measurements(path).get("counted", "peer", "fast", CASE, lambda: taken(5))
    assert first == Measurements(path).get("counted", "peer", "fast", CASE, unwanted)


def test_what_was_taken_elsewhere_is_kept_and_found(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = Measurements(path)
    assert log.find("counted", "peer", "fast", CASE) is None
    log.keep(taken(5))
    assert Measurements(path).find("counted", "peer", "fast", CASE) == taken(5)


def test_a_line_that_a_crash_cut_off_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    Measurements(path).get("counted", "peer", "fast", CASE, lambda: taken(5))
    path.write_text(path.read_text() + '{"kind": "cou')
    log = Measurements(path)
    other = Case("a red 4", 7)
    log.get("counted", "peer", "fast", other, lambda: taken(6, other))
    assert log.get("counted", "peer", "fast", CASE, unwanted).flops == 5
    assert len(path.read_text().splitlines()) == 2


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("hello\n")
    with pytest.raises(CorruptData, match="line 1 of"):
        Measurements(path)
