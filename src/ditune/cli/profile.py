"""`tune profile`: what a pipeline costs, layer by layer, and where its steps repeat."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ditune.cli import sources
from ditune.db.records import Profile

_SHOWN_LAYERS = 8


def profile(
    model: sources.Model = None,
    miniature: sources.Miniature = False,
    small_model: sources.SmallModel = None,
    prompts: sources.Prompts = None,
    count: Annotated[int, typer.Option("--count", min=1, help="How many prompts to run.")] = 2,
    steps: sources.Steps = None,
    height: sources.Height = None,
    width: sources.Width = None,
    frames: sources.Frames = None,
    guidance: sources.Guidance = None,
    db: sources.Database = None,
    json_output: sources.Json = False,
) -> None:
    """Measure a pipeline and store the profile: layer latency, redundancy per step."""
    from ditune.db.store import Store
    from ditune.profiler.record import profile as record

    call = sources.call_arguments(steps, height, width, frames, guidance)
    url = sources.database_url(db)
    with Store.open(url) as store:
        source = sources.source_loader(model, miniature, small_model, prompts, call)()
        console = Console(stderr=True, quiet=json_output)
        with console.status("profiling") as status:
            found = record(
                source.pipe,
                source.calibration[:count],
                call=source.call,
                small=source.small,
                progress=lambda words: status.update(f"profiling: {words}"),
            )
        store.save_profile(found)
    if json_output:
        sources.print_json({"schema": "ditune/profile-1", **found.model_dump(mode="json")})
    else:
        _print(found)


def _print(found: Profile) -> None:
    """Print the costliest layers and the redundancy of a few steps."""
    console = Console(highlight=False)
    console.print(
        f"one call takes {found.total_ms:.0f} ms on {found.hardware.device_name} "
        f"({found.status}, median of {found.prompts})"
    )
    layers = Table(title="costliest layers", title_justify="left")
    for column in ("layer", "median ms", "calls", "total ms"):
        layers.add_column(column, justify="left" if column == "layer" else "right")
    costly = sorted(found.layers, key=lambda layer: -layer.median_ms * layer.n)
    for layer in costly[:_SHOWN_LAYERS]:
        total = layer.median_ms * layer.n
        layers.add_row(layer.name, f"{layer.median_ms:.3f}", str(layer.n), f"{total:.0f}")
    console.print(layers)
    steps = Table(title="relative change from the step before", title_justify="left")
    for column in ("step", "output", "guidance gap", "blocks"):
        steps.add_column(column, justify="right")
    stride = max(1, len(found.redundancy) // 10)
    for row in found.redundancy[1::stride]:
        values = (row.step_change, row.cfg_change, row.block_change)
        steps.add_row(str(row.step), *("-" if v is None else f"{v:.3f}" for v in values))
    console.print(steps)
