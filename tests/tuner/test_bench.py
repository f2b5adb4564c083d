"""The comparison with peers, on a small pipeline with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ditune.db.comparison import Comparison
from ditune.db.errors import UsageFault
from ditune.profiler.work import WorkCounter
from ditune.tuner import bench as bench_module
from ditune.tuner.bench import Bench, Options
from ditune.tuner.bench_runs import PLAIN_SETTING
from ditune.tuner.peers import first_block, plain
from ditune.tuner.peers.contract import Setting
from ditune.tuner.quality import parse_constraints
from ditune.tuner.source import FolderSource, Source

FLOORS = [parse_constraints(text) for text in ("psnr>=30", "psnr>=99")]
OPTIONS = Options(
    trials=3, calibration=3, confirmation=2, confirmation_seeds=2, held_out=2, seeds=2
)
PEER_NAMES = ("fewer steps", "FirstBlockCache", "crashing", "idle")


def crashing(source: Source) -> list[Setting]:
    def on(_: Any) -> Any:
        raise RuntimeError("no such layer\nand more")

    return [Setting("only one", on)]


def idle(source: Source) -> list[Setting]:
    return [Setting("nothing", PLAIN_SETTING.on)]


@pytest.fixture
def comparison(tiny: FolderSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    peers = {
        "fewer steps": plain.settings,
        "FirstBlockCache": first_block.settings,
        "crashing": crashing,
        "idle": idle,
    }
    monkeypatch.setattr(bench_module, "PEERS", peers)
    return Bench(tiny, FLOORS, tmp_path, OPTIONS).run(PEER_NAMES)


def test_a_comparison_from_end_to_end(
    comparison: Comparison,
    tiny: FolderSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    low = {s.peer: s for s in comparison.standings if s.floors == FLOORS[0]}
    high = {s.peer: s for s in comparison.standings if s.floors == FLOORS[1]}
    assert set(low) == {"fewer steps", "FirstBlockCache", "crashing", "idle", "ditune"}
    # what crashes or does nothing is a row that says so, and stands at 1.0
    assert low["crashing"].reason == "crashing crashed: RuntimeError: no such layer"
    assert "does nothing here" in low["idle"].reason
    assert low["crashing"].work_ratio.median == low["idle"].speedup.median == 1.0
    found = low["fewer steps"]
    assert found.setting is not None
    assert found.quality["psnr"].n == 4
    assert found.speedup.n == 4
    swept = {c.setting: c for c in comparison.contenders if c.peer == "fewer steps"}
    assert found.work_ratio.median == pytest.approx(swept[found.setting].work_ratio, rel=1e-3)
    assert found.work_ratio.median == max(c.work_ratio for c in swept.values()) > 1.0
    assert high["fewer steps"].setting is None  # no number of steps gives the same video
    assert "no setting holds" in high["fewer steps"].reason
    assert len(comparison.leads) == 2
    assert comparison.leads[1].work.median >= 0.99
    settings = [c for c in comparison.contenders if c.peer == "FirstBlockCache"]
    assert len(settings) == 16

    def unwanted(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured again")

    again = Bench(tiny, FLOORS, tmp_path, OPTIONS)
    monkeypatch.setattr(WorkCounter, "__enter__", unwanted)  # nothing is counted again
    assert again.run(PEER_NAMES).standings == comparison.standings


def test_an_unknown_peer_is_refused(tiny: FolderSource, tmp_path: Path) -> None:
    with pytest.raises(UsageFault, match="unknown peers"):
        Bench(tiny, FLOORS, tmp_path, OPTIONS).run(["TeaCash"])
