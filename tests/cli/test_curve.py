"""`tune curve` from end to end on a real pipeline folder, the miniature's small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.cli.test_run import model, run
from typer.testing import CliRunner

import ditune
from ditune.cli.main import app
from ditune.db import policy_file
from ditune.db.curve import Curve
from ditune.db.errors import UsageFault
from ditune.tuner.curve import CurveSession

__all__ = ["model", "run"]  # the fixtures
runner = CliRunner()


def refused(*arguments: str) -> str:
    """Return the sentence that a command is refused with."""
    result = runner.invoke(app, list(arguments))
    assert isinstance(result.exception, UsageFault)
    return str(result.exception)


def test_a_curve_is_drawn_and_one_of_its_points_put_in_use(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for number in range(1, 7):
        (out / f"policy-{number}.json").write_text("older")
    asked = ("--trials", "5", "--prompts-proof", "2", "--also", "memory", "--out", str(out))
    code, text, err = run(*asked, "--json", command="curve")
    assert code == 0, err
    found = json.loads(text)
    assert found.pop("schema") == "ditune/curve-1"
    files = [Path(name) for name in found.pop("policy_files")]
    assert (found.pop("db"), found.pop("report")) == (
        str(tmp_path / "policies.db"),
        str(out / "curve.html"),
    )
    curve = Curve.model_validate_json((out / "curve.json").read_text())
    assert found == curve.model_dump(mode="json")
    assert (len(curve.trials), curve.metric, curve.also) == (5, "psnr", "memory")
    assert 1 <= len(curve.points) == len(files)
    assert sorted(out.glob("policy-*.json")) == sorted(files)
    for point, file in zip(curve.points, files, strict=True):
        saved = policy_file.read(file)
        assert (saved.policy_id, saved.evidence) == (point.policy_id, point.evidence)
        assert (saved.evidence.quality["psnr"].floor, saved.evidence.bound_by) == (None, "psnr")
    html = (out / "curve.html").read_text(encoding="utf-8")
    assert html.count("data-chart=") == 2

    chosen = policy_file.read(files[-1])
    before = ditune.lookup(chosen.hardware, chosen.workload)
    assert before.kind == "baseline"  # nothing was put in use
    assert runner.invoke(app, ["policy", "import", str(files[-1])]).exit_code == 0
    match = ditune.lookup(chosen.hardware, chosen.workload)
    assert (match.kind, match.policy_id) == ("exact", chosen.policy_id)

    # what knows floors only says where a curve goes on
    assert "is a trade-off curve: run tune curve" in refused("report", curve.study)
    assert "holds no study yet" in refused("report")
    assert "run tune curve as it was" in refused("run", "--resume", curve.study)

    code, text, err = run(*asked, command="curve")  # every trial is known; a table this time
    assert code == 0, err
    assert "plain" in text
    assert "curve.html" in text


def test_ctrl_c_says_how_to_go_on(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: CurveSession) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CurveSession, "run", interrupted)
    code, _, err = run("--out", str(tmp_path / "out"), command="curve")
    assert code == 130
    assert "the same command goes on" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--metric", "beauty"), "unknown metric 'beauty': known are"),
        (("--also", "energy"), "the energy of a call cannot be measured on cpu"),
        (("--also", "noise"), "memory"),
    ],
)
def test_what_cannot_be_weighed_exits_2(
    run: Any, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    code, out, err = run(*arguments, "--out", str(tmp_path / "out"), command="curve")
    assert (code, out) == (2, "")
    assert said in err
