"""`tune doctor`: what ditune sees on this machine, and what may disturb a measurement."""

from __future__ import annotations

import os
import sqlite3
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ditune.accel.lookup import default_database
from ditune.cli import sources

_SQLITE_WAL_FIX = (3, 51, 3)
_SQLITE_WAL_BACKPORTS = ((3, 44, 6), (3, 50, 7))


Pair = Annotated[
    tuple[Path, Path] | None,
    typer.Option(
        "--pair",
        metavar="LARGE SMALL",
        help="Folders of two pipelines: say what keeps the small model from taking over.",
    ),
]


def doctor(pair: Pair = None, json_output: sources.Json = False) -> None:
    """Show the fingerprint of this machine and list findings (exit 5 if there are any)."""
    from ditune.accel import fingerprint

    findings = _misfits(*pair) if pair is not None else []  # bad folders first
    hardware, software, _ = fingerprint.detect()
    findings += _findings()
    if json_output:
        seen: dict[str, Any] = {
            "schema": "ditune/doctor-1",
            "hardware": hardware.model_dump(mode="json"),
            "software": software.model_dump(mode="json"),
            "db": str(default_database()),
            "findings": findings,
        }
        sources.print_json(seen)
    else:
        console = Console(highlight=False, soft_wrap=True)
        for name, value in {**hardware.model_dump(), **software.model_dump()}.items():
            if value is not None:
                console.print(f"{name:<16} {escape(str(value))}")
        console.print(f"{'database':<16} {escape(str(default_database()))}")
        for finding in findings:
            console.print(f"[yellow]finding[/] {escape(finding)}")
    if findings:
        raise typer.Exit(5)


def _misfits(large: Path, small: Path) -> list[str]:
    """Return what two pipelines differ in, one sentence each."""
    from ditune.accel.pairs import configs_in, differences

    found = differences(configs_in(large), configs_in(small))
    return [f"{small} cannot take over from {large}: {difference}" for difference in found]


def _findings() -> list[str]:
    """Return what a user should know before trusting a measurement, one sentence each."""
    found = []
    version = sqlite3.sqlite_version_info
    backported = any(version[:2] == fix[:2] and version >= fix for fix in _SQLITE_WAL_BACKPORTS)
    if version < _SQLITE_WAL_FIX and not backported:
        found.append(
            f"SQLite {sqlite3.sqlite_version} may lose commits when several processes write one "
            "database (fixed in 3.51.3): tune from one process at a time, or use PostgreSQL"
        )
    if "pynvml" in {
        d.metadata["Name"].lower() for d in metadata.distributions() if d.metadata["Name"]
    }:
        found.append(
            "the deprecated package pynvml is installed and warns on every import: "
            "run pip uninstall pynvml (nvidia-ml-py has the module)"
        )
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores:
        found.append(
            f"the load average is {load:.1f} on {cores} cores: timings will be noisy, "
            "stop other work or expect wide intervals"
        )
    return found
