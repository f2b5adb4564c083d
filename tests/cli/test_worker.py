"""`tune worker` beside `tune run --workers`, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.tuner.test_search import STUDY, study

from ditune import miniature
from ditune.cli.main import main
from ditune.db.errors import UsageFault
from ditune.db.store import Store
from ditune.tuner.cluster import submit
from ditune.tuner.elsewhere import require_same_machine

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["tune", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
            raise SystemExit(0)
        seen = capsys.readouterr()
        return int(stopped.value.code or 0), seen.out, seen.err

    return call


def test_a_file_is_no_place_for_workers(tune: Any, tmp_path: Path) -> None:
    db = str(tmp_path / "policies.db")
    for arguments in (("worker",), ("run", "--miniature", "--workers", "--out", str(tmp_path))):
        code, _, err = tune(*arguments, "--db", db)
        assert code == 2
        assert "is a SQLite file, which serves one process" in err
    code, _, err = tune("run", "--miniature", "--workers", "--in-process", "--db", db)
    assert code == 2
    assert "exclude each other" in err


def test_a_study_that_is_not_there_is_refused(tune: Any, server_database: str) -> None:
    code, _, err = tune("worker", "study-0", "--db", server_database)
    assert code == 2
    assert "holds no study study-0" in err


def test_settings_of_a_cluster_are_pairs(tune: Any, server_database: str) -> None:
    given = ("worker", "--submit", "2", "--slurm", "partition", "--db", server_database)
    code, _, err = tune(*given)
    assert code == 2
    assert "NAME=VALUE" in err


def test_a_worker_runs_as_a_job_of_a_cluster(server_database: str, tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="needs the extra ditune[slurm]")
    with Store.open(server_database) as store:
        store.save_study(study())
    command = [sys.executable, "-m", "ditune.cli.main", "worker", STUDY, "--db", server_database]
    jobs = submit(command, 2, tmp_path, {}, cluster="local")
    assert [f"{STUDY} has ended; this worker did 0 of its jobs"] * 2 == [
        job.result() for job in jobs
    ]
    if shutil.which("srun") is None:
        with pytest.raises(UsageFault, match="slurm does not take the workers"):
            submit(command, 1, tmp_path, {})


@pytest.mark.slow
def test_a_search_is_shared_and_its_workers_leave(
    tune: Any, server_database: str, tmp_path: Path
) -> None:
    Store.open(server_database).close()  # the first to come makes the tables
    model = tmp_path / "model"
    miniature.load("small").save_pretrained(model)
    (tmp_path / "prompts.txt").write_text("\n".join(miniature.captions("calibration")[:30]))
    command = [sys.executable, "-m", "ditune.cli.main", "worker", "--db", server_database]
    with subprocess.Popen(
        [*command, "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as worker:
        given = [str(model), "--prompts", str(tmp_path / "prompts.txt"), "--steps", "12"]
        given += ["--height", "32", "--width", "32", "--frames", "12", "--guidance", "6"]
        given += ["--trials", "5", "--quality", "psnr>=20", "--out", str(tmp_path / "out")]
        code, text, err = tune("run", *given, "--workers", "--db", server_database, "--json")
        if code:
            worker.terminate()  # its search will never end
        out, said = worker.communicate()
    assert code == 0, err
    assert json.loads(text)["trials"]["total"] == 5
    assert worker.returncode == 0, said
    done = json.loads(out)
    assert (done["schema"], done["jobs"]) == ("ditune/worker-1", 5)
    assert tune("worker", done["study"], "--db", server_database, "--json")[0] == 0  # it has ended
    with Store.open(server_database) as store:
        found = store.study(done["study"])
        assert found is not None
        other = found.settings.hardware.model_copy(update={"cores": 64})
        with pytest.raises(UsageFault, match=r"cores \d+ \(here 64\)"):
            require_same_machine(found.settings, other, found.settings.software)
