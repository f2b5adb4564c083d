"""The command `tune`: its commands, and the one place where an error becomes a sentence."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ditune import __version__
from ditune.cli import bench, curve, database, doctor, moe, policy, profile, report, run, worker
from ditune.db.errors import DituneError

app = typer.Typer(
    name="tune",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make diffusion transformers faster on your hardware, within a quality floor you set.",
)
app.command("run")(run.run)
app.command("profile")(profile.profile)
app.command("worker")(worker.worker)
app.command("curve")(curve.curve)
app.command("moe")(moe.moe)
app.command("bench")(bench.bench)
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)
app.add_typer(policy.app, name="policy")
app.add_typer(database.app, name="db")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ditune {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Make diffusion transformers faster on your hardware, within a quality floor you set."""


def main() -> None:
    """Run the command line; every error that ditune raises becomes one sentence and a code."""
    try:
        app()
    except DituneError as fault:
        console = Console(stderr=True, soft_wrap=True)
        console.print(f"[bold red]tune:[/] {escape(str(fault))}", highlight=False)
        sys.exit(fault.exit_code)


if __name__ == "__main__":
    main()
