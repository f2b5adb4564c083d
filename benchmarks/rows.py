"""What every benchmark prints and writes: rows with unit, target, interval and status."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ditune.accel.fingerprint import detect
from ditune.db.record import Status


@dataclass(frozen=True)
class Row:
    """One figure; `held` is None where there is no target."""

    figure: str
    value: float
    unit: str
    target: str = ""
    held: bool | None = None
    ci95: tuple[float, float] | None = None
    n: int = 1
    status: Status = "measured"


@dataclass
class Benchmark:
    """A benchmark while it runs: collects rows, then prints and writes them."""

    name: str
    rows: list[Row] = field(default_factory=list)
    conditions: dict[str, str] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """Take a row and show it at once, so that a long run can be followed."""
        self.rows.append(row)
        held = {True: "  held", False: "  MISSED", None: ""}[row.held]
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"{row.figure}: {row.value:.4g} {row.unit}  {row.target}{held}"
        )

    def finish(self, path: Path | None) -> None:
        """Print the table and write the JSON."""
        table = Table(title=self.name, title_justify="left")
        for column in ("figure", "value", "unit", "95 % interval", "n", "target", "held", "status"):
            table.add_column(column)
        for row in self.rows:
            interval = f"{row.ci95[0]:.4g} to {row.ci95[1]:.4g}" if row.ci95 else ""
            held = "" if row.held is None else ("yes" if row.held else "NO")
            table.add_row(
                row.figure,
                f"{row.value:.4g}",
                row.unit,
                interval,
                str(row.n),
                row.target,
                held,
                row.status,
            )
        console = Console(width=150, highlight=False)
        console.print(table)
        for name, value in self.conditions.items():
            console.print(f"{name}: {value}")
        if path is not None:
            path.write_text(json.dumps(self._json(), indent=2) + "\n", encoding="utf-8")

    def _json(self) -> dict[str, object]:
        return {
            "benchmark": self.name,
            "commit": commit(),
            "conditions": self.conditions,
            "rows": [asdict(row) for row in self.rows],
        }


def commit() -> str:
    """Return the commit that is measured, marked when the tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def conditions() -> dict[str, str]:
    """Return the conditions that every benchmark states."""
    hardware, software, _ = detect()
    return {
        "hardware": f"{hardware.device_name}, {hardware.capability}, {hardware.cores} cores",
        "threads": str(torch.get_num_threads()),
        "software": ", ".join(f"{k} {v}" for k, v in software.model_dump().items()),
        "python": platform.python_version(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main(
    name: str,
    measure: Callable[[Benchmark, argparse.Namespace], None],
    about: str,
    options: Callable[[argparse.ArgumentParser], None] = lambda _: None,
) -> None:
    """Parse the two options that all benchmarks have and those of its own, run one, and report."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="a smaller run: figures are rough")
    options(parser)
    arguments = parser.parse_args()
    benchmark = Benchmark(name, conditions=conditions())
    measure(benchmark, arguments)
    benchmark.finish(arguments.json)
