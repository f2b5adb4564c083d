"""`tune run --tiers` from end to end: several trade-offs of one pipeline, one after another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.test_run import CALL, model, run
from typer.testing import CliRunner

import ditune
from ditune import miniature
from ditune.accel.apply import Summary
from ditune.accel.fingerprint import detect
from ditune.accel.lookup import default_database
from ditune.cli.main import app
from ditune.db import policy_file
from ditune.db.errors import UsageFault
from ditune.db.store import Store
from ditune.tuner.live import tune_tiers
from ditune.tuner.search import Search

__all__ = ["model", "run"]  # the fixtures
runner = CliRunner()
TIERS = "mine:psnr>=26,psnr_worst>=16;draft:psnr>=14,psnr_worst>=8"


def test_each_tier_is_proved_saved_reported_and_found_again(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, err = run("--trials", "3", "--tiers", TIERS, "--out", str(out), "--json")
    assert code == 0, err
    found = json.loads(text)
    assert list(found["tiers"]) == ["mine", "draft"]
    mine, draft = found["tiers"].values()
    assert (found["policy_id"], found["speedup"]) == (mine["policy_id"], mine["speedup"])
    assert draft["quality"]["psnr"]["floor"] == 14.0
    saved = {p.name: policy_file.read(p).policy_id for p in out.glob("*.json")}
    assert saved == {
        "policy.json": mine["policy_id"],
        "policy-mine.json": mine["policy_id"],
        "policy-draft.json": draft["policy_id"],
    }
    for name in ("trials", "trials-mine", "trials-draft"):
        assert (out / f"{name}.csv").read_text().count("\n") == 4  # a head and three trials
    assert "baseline" in (out / "trials-mine.csv").read_text()
    assert "baseline" not in (out / "trials-draft.csv").read_text()  # what is known is not run
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(part in page for part in ("psnr_worst&gt;=8", "All else on this page is about mine"))

    listed = json.loads(runner.invoke(app, ["policy", "list", "--json"]).stdout)
    assert [(each["policy_id"], each["tiers"]) for each in listed["policies"]] == [
        (draft["policy_id"], ["draft"]),
        (mine["policy_id"], ["default", "mine"]),
    ]
    pipe = miniature.load("small")

    with ditune.accelerate(pipe) as applied:

        def used(tier: str) -> Summary:
            with applied.using(tier):
                pipe(prompt="a red 3 growing", generator=torch.Generator().manual_seed(0), **CALL)
            return applied.summary()

        assert used("default").policy_id == used("mine").policy_id == mine["policy_id"]
        assert used("draft").policy_id == draft["policy_id"]
        assert used("never").reason.endswith("only default, draft, mine")


def test_an_interrupted_run_goes_on_with_the_tiers_that_are_missing(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, searches = Search.run, 0

    def interrupted(self: Search, *given: Any) -> Any:
        nonlocal searches
        searches += 1
        if searches == 2:
            raise KeyboardInterrupt
        return original(self, *given)

    monkeypatch.setattr(Search, "run", interrupted)
    out = tmp_path / "out"
    tiers = "mine:psnr>=20;draft:psnr>=12"
    code, _, err = run("--trials", "3", "--tiers", tiers, "--in-process", "--out", str(out))
    assert code == 130
    resumed = err.split("--resume ")[1].split()[0]
    with Store.open(str(default_database())) as store:
        studies = {study.tier: study for study in store.studies()}
        (proved,) = store.policies()
        assert proved.evidence.study == studies["mine"].name
        assert store.tiers_in_use(proved) == ["default", "mine"]
    assert resumed == studies["draft"].name

    code, text, err = run("--resume", resumed, "--json")
    assert code == 0, err
    found = json.loads(text)
    assert searches == 3  # the first tier was not searched anew
    assert found["tiers"]["mine"]["policy_id"] == proved.policy_id
    with Store.open(str(default_database())) as store:
        by_study = [each.evidence.study for each in store.policies()]
        assert by_study == [studies["draft"].name, studies["mine"].name]
        assert len(store.trials(studies["draft"].name)) == 3
        assert policy_file.read(out / "policy-mine.json") == proved

    assert runner.invoke(app, ["report", "--out", str(tmp_path / "again.html")]).exit_code == 0
    page = (tmp_path / "again.html").read_text(encoding="utf-8")
    assert proved.policy_id[:19] in page
    assert "about draft" in page


def test_where_no_tier_holds_nothing_ships(run: Any, tmp_path: Path) -> None:
    tiers = "a:psnr_worst>=100,ssim>=1;b:psnr_worst>=99.9"
    asked = ("--trials", "2", "--tiers", tiers, "--in-process", "--out", str(tmp_path))
    code, text, err = run(*asked)
    assert code == 4
    assert f"no policy holds {tiers}: closest was trial" in err
    assert "tiers; the first one is the default" in text
    assert "note: the tier a has no policy: closest was trial" in text
    assert "without a tier stays as it was" in text
    assert not list(tmp_path.glob("policy*.json"))


def test_a_program_gets_the_tiers_that_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DITUNE_DB", str(tmp_path / "policies.db"))
    pipe, call = miniature.load("small"), dict(miniature.CALL) | {"num_inference_steps": 8}
    prompts = miniature.captions("calibration")[:24]
    tiers = "never:psnr_worst>=100;draft:psnr>=10"
    found = ditune.tune_tiers(pipe, prompts, tiers=tiers, call=call, trials=3)
    assert list(found) == ["draft"]
    hardware, _, workload = detect(pipe, call)
    assert workload is not None
    assert ditune.lookup(hardware, workload, tier="draft").policy == found["draft"]
    assert ditune.lookup(hardware, workload).reason.endswith("only draft")  # no default was found


def test_floors_that_cannot_be_read_are_refused_before_anything_runs() -> None:
    with pytest.raises(UsageFault, match="the tier 'mine' needs floors"):
        tune_tiers(miniature.load("small"), ["a"] * 8, tiers="mine")
