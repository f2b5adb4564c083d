"""What `tune run` shows: a progress bar with time left, then a table; progress goes to stderr."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ditune.cli.sources import print_json
from ditune.db.records import PolicyFile, Quality, Trial
from ditune.reports.words import cost_in_words

if TYPE_CHECKING:
    from ditune.db.cost import Cost
    from ditune.tuner.progress import Stage
    from ditune.tuner.result import Result

_STAGES: dict[Stage, str] = {
    "profile": "profiling the pipeline",
    "search": "searching policies",
    "confirm": "proving on unseen prompts",
}


class RunDisplay:
    """Progress on standard error: bars with time left on a terminal, lines elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        """Prepare the bars; nothing is drawn before the first update."""
        console = Console(stderr=True, quiet=quiet, soft_wrap=True)
        self._lines = None if console.is_terminal else console
        self._bars = Progress(
            TextColumn("{task.description:<26}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=self._lines is not None,
        )
        self._tasks: dict[Stage, TaskID] = {}

    def __enter__(self) -> Self:
        """Start drawing."""
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing; the last state stays on the screen."""
        self._bars.stop()

    def update(self, stage: Stage, done: int, total: int, note: str) -> None:
        """Move a stage's bar, or write a line."""
        if self._lines is not None:
            line = f"{_STAGES[stage]}: {done} of {total} {note}"
            self._lines.print(line, markup=False, highlight=False)
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(_STAGES[stage], total=total, note="")
        self._bars.update(self._tasks[stage], completed=done, total=total, note=escape(note))


def print_result(result: Result, out: Path, report: Path, url: str, json_output: bool) -> None:
    """Print what was found, as one JSON object or as a table with where everything lies."""
    if json_output:
        print_json(run_json(result, out, report, url))
        return
    console = Console(soft_wrap=True, highlight=False)
    for note in result.notes:
        console.print(f"[dim]note: {escape(note)}[/]")
    for reason in result.passed_over:
        console.print(f"[dim]passed over in confirmation: {escape(reason)}[/]")
    found = result.policy_file
    if found is not None:
        console.print(_table(result))
        console.print(f"policy   {found.policy_id}")
        console.print(f"file     {escape(str(out / 'policy.json'))}")
    if (tiers := _tiers_table(result)) is not None:
        console.print(tiers)
    console.print(f"cost     {cost_in_words(result.cost)}")
    console.print(f"database {escape(url)}")
    console.print(f"report   {escape(str(report))}")


def _table(result: Result) -> Table:
    """Return the summary of a policy that held."""
    assert result.policy_file is not None
    evidence = result.policy_file.evidence
    prompts = max(quality.n for quality in evidence.quality.values())
    title = f"confirmed on {prompts} unseen prompts and seeds ({evidence.status})"
    table = Table(title=title, title_justify="left")
    for column in ("", "plain", "tuned", "95 % interval / floor"):
        table.add_column(column)
    speed = evidence.speedup
    table.add_row("latency", f"{evidence.baseline_ms:.0f} ms", f"{evidence.tuned_ms:.0f} ms", "")
    interval = f"{speed.ci95[0]:.2f}x to {speed.ci95[1]:.2f}x"
    table.add_row("speedup", "1.00x", f"[bold]{speed.median:.2f}x[/]", interval)
    for name, quality in evidence.quality.items():
        value = quality.worst if name.endswith("_worst") else quality.mean
        bound = "  (binds)" if name == evidence.bound_by else ""
        table.add_row(name, "", f"{value:.2f}", f">= {quality.floor:g}{bound}")
    fewer = result.fewer_steps
    if fewer is not None:
        speedup = f"{fewer.speedup.median:.2f}x" if fewer.speedup else "1.00x"
        table.add_row("fewest steps", "", speedup, f"{fewer.steps} steps hold the same floors")
    counts = _trial_counts(result.trials)
    table.add_row("trials", "", str(counts["total"]), f"{counts['feasible']} held the floors")
    return table


def _tiers_table(result: Result) -> Table | None:
    """Return one row for each tier, None where none was asked for."""
    from ditune.cli.reporting import shown_tiers
    from ditune.reports.charts import tiers_table

    cells = tiers_table(shown_tiers(result))
    if cells is None:
        return None
    table = Table(*cells.head, title="tiers; the first one is the default", title_justify="left")
    for row in cells.rows:
        table.add_row(*map(escape, row))
    return table


def run_json(result: Result, out: Path, report: Path, url: str) -> dict[str, Any]:
    """Return the object of `tune run --json`, schema ditune/run-1; of tiers only if there are."""
    tiers = {
        name: _proved_json(tier.policy_file, out / f"policy-{name}.json")
        for name, tier in result.tiers.items()
    }
    evidence = result.policy_file.evidence if result.policy_file else None
    proved = _proved_json(result.policy_file, out / "policy.json")
    return {
        "schema": "ditune/run-1",
        "policy_id": proved["policy_id"],
        "policy_file": proved["policy_file"],
        "db": url,
        "report": str(report),
        "baseline_ms": evidence.baseline_ms if evidence else None,
        "tuned_ms": evidence.tuned_ms if evidence else None,
        "speedup": proved["speedup"],
        "quality": proved["quality"],
        "bound_by": proved["bound_by"],
        "trials": _trial_counts(result.trials),
        "cost": _cost(result.cost),
        "hardware": result.profile.hardware.model_dump(mode="json"),
        "workload": result.profile.workload.model_dump(mode="json"),
        "status": proved["status"],
        **({"tiers": tiers} if tiers else {}),
    }


def _proved_json(found: PolicyFile | None, file: Path) -> dict[str, Any]:
    """Return what was proved of one tier."""
    evidence = found.evidence if found else None
    return {
        "policy_id": found.policy_id if found else None,
        "policy_file": str(file) if found else None,
        "speedup": evidence.speedup.model_dump(mode="json") if evidence else None,
        "quality": _quality(evidence.quality) if evidence else None,
        "bound_by": evidence.bound_by if evidence else None,
        "status": evidence.status if evidence else "infeasible",
    }


def _cost(cost: Cost) -> dict[str, Any]:
    return {**cost.model_dump(mode="json"), "videos": cost.videos, "forwards": cost.forwards}


def _quality(quality: dict[str, Quality]) -> dict[str, Any]:
    return {name: value.model_dump(mode="json") for name, value in quality.items()}


def _trial_counts(trials: Sequence[Trial]) -> dict[str, int]:
    return {
        "total": len(trials),
        "feasible": sum(trial.feasible for trial in trials),
        "rejected_early": sum(trial.state == "rejected" for trial in trials),
    }
