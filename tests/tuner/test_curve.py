"""A whole curve in this process, on a small pipeline with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ditune.db import policy_file
from ditune.db.errors import UsageFault
from ditune.db.policy import Policy
from ditune.db.store import Store
from ditune.tuner.curve import CurveResult, CurveSession
from ditune.tuner.curve_points import Objectives
from ditune.tuner.evaluate import Evaluator
from ditune.tuner.goals import CONFIRM_SEED
from ditune.tuner.result import Options
from ditune.tuner.source import FolderSource

OPTIONS = Options(trials=6, profile_prompts=1, search_prompts=2, confirm_prompts=3)
MEMORY = Objectives(also="memory")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(str(tmp_path / "ours.db")) as opened:
        yield opened


def drawn(
    tiny: FolderSource,
    store: Store,
    objectives: Objectives = MEMORY,
    options: Options = OPTIONS,
) -> CurveResult:
    return CurveSession(tiny, store, objectives, options).run()


def test_a_curve_is_searched_proved_and_kept(
    tiny: FolderSource, store: Store, tmp_path: Path
) -> None:
    result = drawn(tiny, store)
    curve = result.curve
    assert len(curve.trials) == OPTIONS.trials
    assert curve.trials[0].policy == Policy()
    assert curve.trials[0].peak_bytes == min(t.peak_bytes or 0 for t in curve.trials)
    assert all(t.quality["psnr"].floor is None and not t.violation for t in curve.trials)
    assert list(curve.trials) == store.trials(curve.study)
    (study,) = store.studies()
    assert (study.name, study.settings.constraints) == (curve.study, ())
    assert store.policies() == []  # nothing is put in use
    assert curve.points
    assert not all(point.dominated for point in curve.points)
    for point, found in zip(curve.points, result.policy_files, strict=True):
        evidence = point.evidence
        assert (evidence.quality["psnr"].n, evidence.speedup.n) == (3, 3)
        assert point.bound <= evidence.quality["psnr"].mean
        assert point.peak_bytes is not None
        assert evidence.candidates == len(curve.points)
        assert evidence.search is not None
        assert evidence.search.trials == OPTIONS.trials
        policy_file.write(found, tmp_path / "policy.json")
        assert policy_file.read(tmp_path / "policy.json").policy == point.policy
    speedups = [point.evidence.speedup.median for point in curve.points]
    assert speedups == sorted(speedups)
    spent = sum(trial.videos or 0.0 for trial in curve.trials)
    assert curve.cost.search.videos == pytest.approx(spent)


def test_an_interrupted_curve_goes_on_where_it_stopped(
    tiny: FolderSource, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Evaluator.measure, 0

    def interrupted(self: Evaluator, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:  # the second video of the third policy
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Evaluator, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drawn(tiny, store)
    (study,) = store.studies()
    before = store.trials(study.name)
    assert len(before) == 3
    result = drawn(tiny, store)
    assert result.curve.study == study.name
    assert list(result.curve.trials[:3]) == before
    assert len(result.curve.trials) == OPTIONS.trials
    again = drawn(tiny, store)
    assert again.curve.trials == result.curve.trials  # nothing is left to search


def test_what_is_weighed_makes_a_curve_of_its_own(tiny: FolderSource, store: Store) -> None:
    least = replace(OPTIONS, trials=2, confirm_prompts=1)
    studies = {
        drawn(tiny, store, objectives, least).curve.study
        for objectives in (Objectives(), MEMORY, Objectives(metric="ssim"))
    }
    assert len(studies) == 3


def test_proof_and_search_share_no_video(tiny: FolderSource, store: Store) -> None:
    session = CurveSession(tiny, store, Objectives(), OPTIONS)
    assert {case.seed for case in session.cases}.isdisjoint(c.seed for c in session.held_out)
    assert {case.prompt for case in session.held_out} <= set(tiny.held_out)
    assert session.held_out[0].seed == CONFIRM_SEED


def test_what_cannot_be_weighed_is_refused_before_anything_runs(
    tiny: FolderSource, store: Store
) -> None:
    with pytest.raises(UsageFault, match="unknown metric 'beauty': known are"):
        CurveSession(tiny, store, Objectives(metric="beauty"), OPTIONS)
    with pytest.raises(UsageFault, match="cannot be measured on cpu"):
        CurveSession(tiny, store, Objectives(also="energy"), OPTIONS)


def test_one_process_draws_a_curve(tiny: FolderSource, store: Store) -> None:
    found = drawn(tiny, store, options=replace(OPTIONS, trials=2, confirm_prompts=1))
    with (
        store.jobs.sole_asker(found.curve.study),
        pytest.raises(UsageFault, match="another process searches"),
    ):
        drawn(tiny, store)
