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
        help="Folders of two pipelines: say whether the small model can take over from the large "
        "one, what is converted for it, and what their weights take.",
    ),
]


def doctor(pair: Pair = None, json_output: sources.Json = False) -> None:
    """Show the fingerprint of this machine and list findings (exit 5 if there are any)."""
    from ditune.accel import fingerprint

    findings, paired = _paired(*pair) if pair is not None else ([], None)  # bad folders first
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
        if paired is not None:
            seen["pair"] = paired
        sources.print_json(seen)
    else:
        console = Console(highlight=False, soft_wrap=True)
        for name, value in {**hardware.model_dump(), **software.model_dump()}.items():
            if value is not None:
                console.print(f"{name:<16} {escape(str(value))}")
        console.print(f"{'database':<16} {escape(str(default_database()))}")
        if paired is not None:
            _show_pair(console, paired)
        for finding in findings:
            console.print(f"[yellow]finding[/] {escape(finding)}")
    if findings:
        raise typer.Exit(5)


def _paired(large: Path, small: Path) -> tuple[list[str], dict[str, Any]]:
    """Return what keeps two pipelines from pairing, one sentence each, and what is known of them.

    Nothing but configurations is read; the size of weights is that of their files.
    """
    from ditune.accel.pairs import configs_in, converted, differences, unknown
    from ditune.accel.residence import OFFLOADS, peak_weight_bytes

    configs = configs_in(large), configs_in(small)
    found = differences(*configs)
    sizes = [
        sum(f.stat().st_size for f in (folder / "transformer").glob("*.safetensors"))
        for folder in (large, small)
    ]
    peaks = {mode: peak_weight_bytes(sizes[0], sizes[1], mode) for mode in OFFLOADS}
    known = {
        "fits": not found,
        "not_compared": unknown(*configs),
        "converted": [str(each) for each in converted(*configs)],
        "weight_bytes": {m: {"before": p[0], "after": p[1]} for m, p in peaks.items()}
        if all(sizes)
        else None,
    }
    return [f"{small} cannot take over from {large}: {each}" for each in found], known


def _show_pair(console: Console, paired: dict[str, Any]) -> None:
    console.print(f"{'pair':<16} {'fits' if paired['fits'] else 'does not fit'}")
    if paired["not_compared"]:
        parts = " and ".join(paired["not_compared"])
        console.print(f"{'':<16} not compared: {parts}, which is not in both folders")
    for difference in paired["converted"]:
        console.print(f"{'':<16} converted at every forward: {escape(difference)}")
    for offload, weights in (paired["weight_bytes"] or {}).items():
        before, after = (size / 2**30 for size in weights.values())
        console.print(
            f'{"":<16} offload="{offload}": weights {before:.2f} GiB, {after:.2f} GiB from the '
            "switch on"
        )


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
