"""`tune bench`: ditune beside what a user would take instead, on the user's own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ditune.cli import sources

if TYPE_CHECKING:
    from ditune.db.comparison import Comparison


def bench(
    model: sources.Model = None,
    miniature: sources.Miniature = False,
    prompts: sources.Prompts = None,
    quality: Annotated[
        list[str] | None,
        typer.Option("--quality", help="Floors to compare at; give it once for each set."),
    ] = None,
    peers: Annotated[
        str | None, typer.Option("--peers", help="Some of the peers, with commas (default: all).")
    ] = None,
    trials: Annotated[
        int, typer.Option("--trials", min=2, help="Of our search, for each set of floors.")
    ] = 16,
    held_out: Annotated[
        int, typer.Option("--held-out", min=1, help="Prompts that the figures rest on.")
    ] = 20,
    steps: sources.Steps = None,
    height: sources.Height = None,
    width: sources.Width = None,
    frames: sources.Frames = None,
    guidance: sources.Guidance = None,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the measurements and the page.")
    ] = Path("ditune-bench"),
    json_output: sources.Json = False,
) -> None:
    """Compare ditune with other caches and with fewer steps, each tuned on the same prompts.

    It runs for hours. Every measurement is kept in the folder: the same command goes on from there.
    """
    from ditune.db.files import write_atomically
    from ditune.reports import rivals
    from ditune.tuner.bench import Bench, Options, require_known
    from ditune.tuner.peers.catalogue import PEERS
    from ditune.tuner.quality import parse_constraints

    call = sources.call_arguments(steps, height, width, frames, guidance)
    load = sources.source_loader(model, miniature, None, prompts, call)
    floors = [parse_constraints(text) for text in quality or ()]
    names = [name.strip() for name in peers.split(",")] if peers is not None else list(PEERS)
    require_known(names)
    sources.require_writable(out, "the measurements")
    console = Console(stderr=True, quiet=json_output, highlight=False, soft_wrap=True)
    source = load()
    runner = Bench(
        source,
        floors or [parse_constraints(source.quality)],
        out,
        Options(trials=trials, held_out=held_out),
        lambda words: console.print(escape(words)),
    )
    comparison = runner.run(names)
    write_atomically(out / "comparison.json", comparison.model_dump_json(indent=2).encode() + b"\n")
    rivals.write(comparison, out / "comparison.html")
    if json_output:
        sources.print_json({"schema": "ditune/bench-1", **comparison.model_dump(mode="json")})
    else:
        _print(comparison, out)


def _print(comparison: Comparison, out: Path) -> None:
    table = Table()
    for name in ("floors", "peer", "setting", "work", "speedup", "floors held"):
        table.add_column(name)
    for standing in comparison.standings:
        floors = ", ".join(f"{c.name}>={c.floor:g}" for c in standing.floors)
        found = standing.setting is not None
        table.add_row(
            floors,
            escape(standing.peer),
            escape(standing.setting or standing.reason),
            f"{standing.work_ratio.median:.2f}x",
            f"{standing.speedup.median:.2f}x",
            ("yes" if standing.holds else "no") if found else "",
        )
    console = Console()
    console.print(table)
    console.print(f"wrote {escape(str(out / 'comparison.html'))}")
