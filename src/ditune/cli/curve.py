"""`tune curve`: what speed costs, as a curve of proved policies without any floor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ditune.cli import sources
from ditune.cli.display import RunDisplay
from ditune.cli.run import Interrupted

if TYPE_CHECKING:
    from ditune.db.curve import Curve
    from ditune.tuner.curve import CurveResult


def curve(
    model: sources.Model = None,
    miniature: sources.Miniature = False,
    small_model: sources.SmallModel = None,
    prompts: sources.Prompts = None,
    metric: Annotated[
        str, typer.Option("--metric", help="What quality is: psnr, ssim, a judge or your own.")
    ] = "psnr",
    also: Annotated[
        Literal["memory", "energy"] | None,
        typer.Option("--also", help="A third thing to weigh; energy needs an NVIDIA device."),
    ] = None,
    trials: Annotated[int, typer.Option("--trials", min=2, help="Policies to try.")] = 16,
    prompts_proof: Annotated[
        int,
        typer.Option("--prompts-proof", min=1, help="Held-out videos to prove each point on."),
    ] = 8,
    seed: Annotated[int, typer.Option("--seed", help="Of the search.")] = 0,
    steps: sources.Steps = None,
    height: sources.Height = None,
    width: sources.Width = None,
    frames: sources.Frames = None,
    guidance: sources.Guidance = None,
    device: sources.Device = None,
    db: sources.Database = None,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the page and the policy files.")
    ] = Path("ditune-curve"),
    json_output: sources.Json = False,
) -> None:
    """Search what each speed costs, prove what nothing dominates, and draw the curve.

    There are no floors, and nothing is put in use: tune policy import does that with one of the
    policy files. At most eight policies are proved. The same command goes on with the trials of one
    that was interrupted, and measures the proof anew.

    Exit codes: 0 drawn, 2 something to correct, 5 the device is in use by others, 130 interrupted.
    """
    from ditune.db.store import Store
    from ditune.tuner.curve import CurveSession
    from ditune.tuner.curve_points import Objectives
    from ditune.tuner.quality import require_metric
    from ditune.tuner.result import Options

    require_metric(metric)
    call = sources.call_arguments(steps, height, width, frames, guidance)
    load = sources.source_loader(model, miniature, small_model, prompts, call)
    url = sources.database_url(db)
    with (
        sources.alone_in(out),
        Store.open(url) as store,
        RunDisplay(quiet=json_output) as display,
    ):
        source = sources.moved(load(), device)
        options = Options(trials=trials, confirm_prompts=prompts_proof, seed=seed)
        session = CurveSession(source, store, Objectives(metric, also), options, display)
        try:
            result = session.run()
        except KeyboardInterrupt:
            raise Interrupted(
                "interrupted; every finished trial is saved: the same command goes on from there"
            ) from None
        _write(result, out)
    if json_output:
        sources.print_json(_json(result.curve, out, url))
    else:
        _print(result.curve, out, url)


def _write(result: CurveResult, out: Path) -> None:
    """Write the curve, its page and a policy file for each point; older policy files go."""
    from ditune.db import policy_file
    from ditune.db.files import write_atomically
    from ditune.reports import curve as page

    for number, found in enumerate(result.policy_files, start=1):
        policy_file.write(found, _file(out, number))
    number = len(result.policy_files) + 1
    while _file(out, number).exists():  # of a longer curve that was here
        _file(out, number).unlink()
        number += 1
    write_atomically(out / "curve.json", result.curve.model_dump_json(indent=2).encode() + b"\n")
    page.write(result.curve, out / "curve.html")


def _file(out: Path, number: int) -> Path:
    return out / f"policy-{number}.json"


def _json(found: Curve, out: Path, url: str) -> dict[str, Any]:
    """Return the object of `tune curve --json`, schema ditune/curve-1."""
    files = [str(_file(out, number)) for number in range(1, len(found.points) + 1)]
    return {
        "schema": "ditune/curve-1",
        **found.model_dump(mode="json"),
        "policy_files": files,
        "db": url,
        "report": str(out / "curve.html"),
    }


def _print(found: Curve, out: Path, url: str) -> None:
    from ditune.reports.curve import headline, points_table
    from ditune.reports.words import cost_in_words

    cells = points_table(found)
    table = Table(*cells.head, title=headline(found), title_justify="left")
    for row in cells.rows:
        table.add_row(*map(escape, row))
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    if found.points:
        console.print(f"files    {escape(str(_file(out, 1)))} and so on; none is in use yet")
    console.print(f"cost     {cost_in_words(found.cost)}")
    console.print(f"database {escape(url)}")
    console.print(f"page     {escape(str(out / 'curve.html'))}")
