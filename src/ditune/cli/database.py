"""`tune db`: upgrade, check and back up the database."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ditune.cli import sources

app = typer.Typer(no_args_is_help=True, help="Upgrade, check and back up the database.")


@app.command("upgrade")
def upgrade(db: sources.Database = None) -> None:
    """Bring the database to this version's schema; a copy is kept beside it."""
    from ditune.db import migrate

    url = sources.database_url(db)
    migrate.upgrade(url)
    Console().print(f"up to date: {escape(url)}")


@app.command("check")
def check(db: sources.Database = None, json_output: sources.Json = False) -> None:
    """Check that the database is intact and say what it holds (exit 6 if it is damaged)."""
    from ditune.db.store import Store

    url = sources.database_url(db)
    with Store.open(url) as store:
        counts = {"policies": len(store.policies()), "studies": len(store.studies())}
    if json_output:
        sources.print_json({"schema": "ditune/db-check-1", "ok": True, "db": url, **counts})
    else:
        held = ", ".join(f"{count} {name}" for name, count in counts.items())
        Console().print(f"intact: {escape(url)} holds {held}")


@app.command("backup")
def backup(
    file: Annotated[Path, typer.Argument(help="Where to write the copy.")],
    db: sources.Database = None,
) -> None:
    """Write a consistent copy of a SQLite database, while others may use it."""
    from ditune.db.store import Store

    with Store.open(sources.database_url(db)) as store:
        store.backup(file)
    Console().print(f"wrote {escape(str(file))}")
