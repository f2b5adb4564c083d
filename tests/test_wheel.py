"""The built wheel, installed outside the checkout, is complete and runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("src", "accel", "db", "kernels", "profiler", "reports", "tuner")
TEXTS = ("pyproject.toml", "MANIFEST.in", "LICENSE", "README.md")

pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path, **env: str) -> str:
    """Run a command and return what it printed; a failure shows all that it said."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy: a build folder left in the checkout would leak old files in."""
    copy = tmp_path_factory.mktemp("copy")
    for name in SOURCES:
        shutil.copytree(
            ROOT / name,
            copy / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
        )
    for name in TEXTS:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    built = tmp_path_factory.mktemp("dist")
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", str(built), str(copy))
    run(sys.executable, *build, cwd=copy)
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a folder of its own; its dependencies are those of the tests."""
    target = tmp_path_factory.mktemp("target")
    options = ("--no-deps", "--no-index", "--disable-pip-version-check", "--target", str(target))
    run(sys.executable, "-m", "pip", "install", *options, str(wheel), cwd=target)
    return target


def test_wheel_holds_every_file_that_runs(wheel: Path) -> None:
    package = ROOT / "src" / "ditune"
    rooms = [entry for entry in package.iterdir() if entry.is_dir()]
    kept = ("*.py", "*.safetensors", "*.json", "*.html", "*.css", "*.js", "*.mako")
    expected = {"ditune/__init__.py", "ditune/py.typed"} | {
        f"ditune/{room.name}/{path.relative_to(room.resolve())}"
        for room in rooms
        for pattern in kept
        for path in room.resolve().rglob(pattern)
    }
    missing = expected - set(zipfile.ZipFile(wheel).namelist())
    assert not missing, f"name these in pyproject.toml, packages or package-data: {sorted(missing)}"


def test_installed_wheel_is_what_gets_imported(installed: Path, tmp_path: Path) -> None:
    code = "import ditune.kernels.task_map as room; print(room.__file__)"
    seen = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(seen.strip()).is_relative_to(installed)


TUNED = """
import sys
from ditune.db.engine import study_storage_url
from ditune.db.store import Store
from ditune.tuner.result import Options
from ditune.tuner.session import Session
from ditune.tuner.source import registered

source = registered("miniature")
source.call["num_inference_steps"] = 6  # a whole run, and a short one
options = Options(
    quality="psnr>=1", trials=3, profile_prompts=1, search_prompts=1, confirm_prompts=4
)
url = sys.argv[1]
with Store.open(url) as store:
    found = Session(source, store, options).run(study_storage_url(url))
    print(found.policy_file.policy_id, len(store.policies()))
"""


def test_installed_wheel_tunes_the_miniature(installed: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'wheel.db'}"
    seen = run(sys.executable, "-c", TUNED, url, cwd=tmp_path, PYTHONPATH=str(installed))
    assert re.fullmatch(r"sha256:[0-9a-f]{64} 1", seen.splitlines()[-1])
    command = (str(installed / "bin" / "tune"), "policy", "list", "--json", "--db", url)
    listed = json.loads(run(*command, cwd=tmp_path, PYTHONPATH=str(installed)))
    assert len(listed["policies"]) == 1
