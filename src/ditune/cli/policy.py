"""`tune policy`: list, show, verify, export and import stored policies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ditune.cli import sources
from ditune.db.records import PolicyFile

app = typer.Typer(no_args_is_help=True, help="List, show, verify, export and import policies.")
Id = Annotated[str, typer.Argument(help="A policy's id or the beginning of it.")]
File = Annotated[Path, typer.Argument(help="A policy file.")]


@app.command("list")
def list_policies(db: sources.Database = None, json_output: sources.Json = False) -> None:
    """List the stored policies, the newest first."""
    from ditune.db.store import Store
    from ditune.reports.words import moment

    with Store.open(sources.database_url(db)) as store:
        found = store.policies()
        rows = [{**_row(each), "tiers": store.tiers_in_use(each)} for each in found]
    if json_output:
        sources.print_json({"schema": "ditune/policies-1", "policies": rows})
        return
    table = Table()
    for column in (
        "policy",
        "speedup",
        "steps",
        "size",
        "pipeline",
        "hardware",
        "proved",
        "status",
        "in use as",
    ):
        table.add_column(column)
    for each, row in zip(found, rows, strict=True):
        table.add_row(
            row["policy_id"][:19],
            f"{row['speedup']:.2f}x",
            str(each.workload.steps),
            f"{each.workload.width}x{each.workload.height}x{each.workload.frames}",
            escape(each.workload.pipeline_class),
            escape(each.hardware.device_name),
            moment(row["created_at"]),
            row["status"],
            escape(", ".join(row["tiers"])),
        )
    Console().print(table if found else "no policies yet: tune one with tune run")


@app.command("show")
def show(policy_id: Id, db: sources.Database = None) -> None:
    """Print one policy with its evidence, as the JSON of a policy file.

    What its search saw of it is said on standard error, so that nobody takes it for proved.
    """
    from ditune.db.store import Store
    from ditune.reports.words import search_in_words

    with Store.open(sources.database_url(db)) as store:
        found = store.policy(policy_id)
    sources.print_json(found.model_dump(mode="json"))
    if found.evidence.search is not None:
        said = f"evidence.search is no proof. {search_in_words(found.evidence.search)}"
        Console(stderr=True, soft_wrap=True, highlight=False).print(escape(said))


@app.command("verify")
def verify(file: File, json_output: sources.Json = False) -> None:
    """Check a policy file: its form, its ranges and its digest (exit 6 if it is damaged)."""
    from ditune.db import policy_file

    found = policy_file.read(file)
    if json_output:
        sources.print_json({"schema": "ditune/verify-1", "ok": True, **_row(found)})
    else:
        Console().print(f"{escape(str(file))} is intact: {found.policy_id}")


@app.command("export")
def export(
    policy_id: Id,
    file: File,
    to: Annotated[
        Literal["ditune", "cache-dit", "diffusers"],
        typer.Option("--to", help="For ditune itself, cache-dit (YAML) or diffusers (Python)."),
    ] = "ditune",
    db: sources.Database = None,
) -> None:
    """Write one stored policy to a file; another tool gets it only if it can do the same."""
    from ditune.accel.export import WRITERS
    from ditune.db import policy_file
    from ditune.db.files import write_atomically
    from ditune.db.store import Store

    with Store.open(sources.database_url(db)) as store:
        found = store.policy(policy_id)
    if to == "ditune":
        policy_file.write(found, file)
    else:
        write_atomically(file, WRITERS[to](found.policy).encode())
    Console().print(f"wrote {escape(str(file))}")


@app.command("import")
def import_policy(
    file: File,
    tier: Annotated[
        str, typer.Option("--tier", help="Under which of several trade-offs it is found.")
    ] = "default",
    db: sources.Database = None,
) -> None:
    """Store a policy file and make it the active one for its hardware and workload."""
    from ditune.db import policy_file
    from ditune.db.store import Store
    from ditune.tuner.tiers import require_name

    require_name(tier)
    found = policy_file.read(file)
    with Store.open(sources.database_url(db)) as store:
        store.save_and_activate(found, [tier])
    Console().print(f"active for its hardware and workload: {found.policy_id}")


def _row(found: PolicyFile) -> dict[str, Any]:
    return {
        "policy_id": found.policy_id,
        "speedup": found.evidence.speedup.median,
        "status": found.evidence.status,
        "created_at": found.evidence.created_at,
        "hardware": found.hardware.device_name,
        "pipeline": found.workload.pipeline_class,
    }
