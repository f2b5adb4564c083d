"""Texts that cannot drift: the command-line page is generated, the README's snippet is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers import WanPipeline

from ditune import miniature

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RENEW = "DITUNE_RENEW_GOLDEN"


def test_the_command_line_page_is_the_help_of_the_commands(tmp_path: Path) -> None:
    fresh = tmp_path / "cli.md"
    command = [sys.executable, "-m", "typer", "ditune.cli.main", "utils", "docs", "--name", "tune"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "100"}
    subprocess.run([*command, "--output", str(fresh)], check=True, capture_output=True, env=env)
    page = ROOT / "docs" / "cli.md"
    if os.environ.get(RENEW) == "1":
        page.write_bytes(fresh.read_bytes())
    assert fresh.read_text() == page.read_text(), f"run make docs, or the test with {RENEW}=1"


class Short(WanPipeline):  # type: ignore[misc]  # diffusers' names count as Any
    """The miniature's pipeline with its own sizes as defaults, as a user's model has them."""

    def __call__(self, prompt: str, **asked: Any) -> Any:
        return super().__call__(prompt, **(dict(miniature.CALL) | asked))


def test_the_readmes_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DITUNE_DB", str(tmp_path / "none.db"))
    found = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(found) == 1
    pipe = Short(**miniature.load("small").components)
    pipe.set_progress_bar_config(disable=True)
    names: dict[str, Any] = {"pipe": pipe, "prompt": "a red 3 moving left"}
    exec(compile(found[0], "README.md", "exec"), names)
    assert names["video"].shape[1] == 13
    assert "no policy" in capsys.readouterr().out


def test_the_readme_names_two_commands_and_both_exist() -> None:
    commands = re.findall(r"^(make \w+)", README, re.MULTILINE)
    assert commands == ["make tune", "make test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"{name.split()[1]}:" in makefile for name in commands)


def test_links_in_texts_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
