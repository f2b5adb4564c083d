"""`tune run` from end to end on a real pipeline folder: the miniature's small model, few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ditune
from ditune import miniature
from ditune.accel.fingerprint import detect
from ditune.cli.main import main
from ditune.db import policy_file
from ditune.tuner.evaluate import Evaluator

STEPS = 12
CALL = {
    "height": 32,
    "width": 32,
    "num_frames": 12,
    "num_inference_steps": STEPS,
    "guidance_scale": 6.0,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    miniature.load("small").save_pretrained(folder)
    (folder / "prompts.txt").write_text("\n".join(miniature.captions("calibration")[:30]))
    return folder


@pytest.fixture
def run(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    monkeypatch.setenv("DITUNE_DB", str(tmp_path / "policies.db"))

    def call(*arguments: str, command: str = "run") -> tuple[int, str, str]:
        given = [str(model), "--prompts", str(model / "prompts.txt"), "--steps", str(STEPS)]
        given += ["--height", "32", "--width", "32", "--frames", "12", "--guidance", "6"]
        if "--resume" in arguments:
            given = []
        monkeypatch.setattr("sys.argv", ["tune", command, *given, *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
            raise SystemExit(0)
        seen = capsys.readouterr()
        return int(stopped.value.code or 0), seen.out, seen.err

    return call


def test_a_policy_is_found_saved_reported_and_found_again(
    run: Any, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, text, err = run(
        "--trials",
        "6",
        "--quality",
        "psnr>=20,psnr_worst>=12",
        "--out",
        str(out),
        "--json",
        "--junit",
        str(tmp_path / "junit.xml"),
    )
    assert code == 0, err
    assert 'tests="3" errors="0" failures="0"' in (tmp_path / "junit.xml").read_text()
    assert (out / "trials.csv").read_text().count("\n") == 7  # a head and six trials
    found = json.loads(text)
    assert list(found) == [
        "schema",
        "policy_id",
        "policy_file",
        "db",
        "report",
        "baseline_ms",
        "tuned_ms",
        "speedup",
        "quality",
        "bound_by",
        "trials",
        "cost",
        "hardware",
        "workload",
        "status",
    ]
    assert found["schema"] == "ditune/run-1"
    assert {"median", "ci95", "n"} == set(found["speedup"])
    assert {"floor", "mean", "worst", "n"} == set(found["quality"]["psnr"])
    assert {"total", "feasible", "rejected_early"} == set(found["trials"])
    assert (found["trials"]["total"], found["status"]) == (6, "measured")
    assert found["cost"]["forwards_per_video"] == 2 * STEPS
    assert found["cost"]["search"]["videos"] > 1.0  # done by a child, and counted there
    saved = policy_file.read(out / "policy.json")
    assert saved.evidence.search is not None
    assert saved.evidence.search.trials == 6
    assert found["policy_id"] == saved.policy_id
    page = (out / "report.html").read_text(encoding="utf-8")
    assert saved.policy_id[:12] in page
    assert page.count("data:image/png") >= 2

    pipe = miniature.load("small")
    hardware, _, workload = detect(pipe, CALL)
    assert workload is not None
    assert saved.workload == workload
    match = ditune.lookup(hardware, workload)
    assert ("exact", saved.policy_id) == (match.kind, match.policy_id)
    with ditune.accelerate(pipe) as applied:
        pipe(prompt="a red 3 growing", generator=torch.Generator().manual_seed(0), **CALL)
        assert saved.policy_id == applied.summary().policy_id


def test_an_impossible_floor_exits_4_with_the_best_seen(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, err = run(
        "--trials", "3", "--quality", "psnr>=100,ssim>=1", "--out", str(out), "--json"
    )
    assert code == 4
    assert "closest was trial" in err
    found = json.loads(text)
    assert (found["policy_id"], found["speedup"], found["status"]) == (None, None, "infeasible")
    assert not (out / "policy.json").exists()
    assert "html" in (out / "report.html").read_text(encoding="utf-8")


def test_ctrl_c_saves_and_resuming_goes_on(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    original = Evaluator.measure

    def interrupted(self: Evaluator, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    out = tmp_path / "out"
    monkeypatch.setattr(Evaluator, "measure", interrupted)
    asked = ("--trials", "4", "--quality", "psnr>=20", "--in-process", "--out", str(out))
    code, _, err = run(*asked)
    assert code == 130
    assert "tune run --resume study-" in err
    study = err.split("--resume ")[1].split()[0]
    code, text, err = run("--resume", study, "--json")
    assert code == 0, err
    assert json.loads(text)["trials"]["total"] == 4


def test_profile_prints_and_stores(run: Any) -> None:
    code, text, err = run("--count", "1", "--json", command="profile")
    assert code == 0, err
    found = json.loads(text)
    assert found["schema"] == "ditune/profile-1"
    assert len(found["redundancy"]) == STEPS
    names = [layer["name"] for layer in found["layers"]]
    assert {"text_encoder", "transformer", "vae.decoder"} <= set(names)
    assert run("--count", "1", command="profile")[0] == 0
