"""`tune moe`: tiles for layers of experts, by hardware, shape and routing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ditune.cli import sources
from ditune.db.errors import UsageFault
from ditune.db.moe import CpuTiles, Dtype, LayerTiles, MoeShape, TileConfig, Tiles
from ditune.db.records import Hardware

if TYPE_CHECKING:
    import torch

    from ditune.kernels.hardware import Gpu
    from ditune.kernels.histograms import Kind
    from ditune.tuner.moe import Progress, Routed, Tuned

_DTYPES: dict[str, Dtype] = {name: name for name in get_args(Dtype)}
_WANTED = "a MODEL, or --shape EXPERTS,HIDDEN,INNER,TOP_K"


def moe(
    model: Annotated[
        str | None, typer.Argument(help="A folder with a model that has experts, or a hub id.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", metavar="E,H,I,K", help="Experts, hidden, inner, top k instead."),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option("--tokens", min=1, help="Tokens of a call (default: 1024); may be repeated."),
    ] = None,
    routing: Annotated[
        list[str] | None,
        typer.Option(
            "--routing",
            help="How tokens spread: balanced, zipf, best, worst or hole (default: the first two); "
            "may be repeated.",
        ),
    ] = None,
    routings: Annotated[
        Path | None,
        typer.Option("--routings", help=r'A JSON file of real ones: {"name": \[rows, ...]}.'),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="bfloat16, float16 or float32 (default: bfloat16 on GPUs)."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--for", metavar="GPU", help="A GPU that is elsewhere, such as h100."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", help="Where to time: cpu, or cuda:1 (default: a GPU if one is here)."
        ),
    ] = None,
    db: sources.Database = None,
    json_output: sources.Json = False,
) -> None:
    """Find tiles for layers of experts, for the routings that they meet, and store them.

    On a device that is here they are timed; with --for they are predicted and compiled, and any
    device of that model will use them until it is tuned itself. A bucket of routings that was not
    tuned has the default tiles. ditune.accelerate_experts(model) puts them to use.
    """
    from ditune.db.store import Store
    from ditune.tuner.moe import keep

    place = _place(target, device)
    layers = _shapes(model, shape, _dtype(dtype, place))
    wanted = {each: _routed(each, tokens, routing, routings) for each in layers}
    console = Console(stderr=True, quiet=json_output)
    found: dict[MoeShape, tuple[Tuned, ...]] = {}
    with Store.open(sources.database_url(db)) as store:
        hardware = _hardware(place)
        for each, routed in wanted.items():
            with console.status("tuning") as status:
                found[each] = _tuned(each, routed, place, lambda w: status.update(f"tuning: {w}"))
            keep(store.moe, hardware, each, found[each])
    if json_output:
        sources.print_json(_as_json(hardware, layers, found))
        return
    for each, rows in found.items():
        _print(hardware, each, layers[each], rows)


def _place(target: str | None, device: str | None) -> Gpu | torch.device:
    """Return where layers will run: a GPU of the table, or a device that is here."""
    import torch

    from ditune.kernels.hardware import gpu_named

    if target is not None:
        if device is not None:
            raise UsageFault("--for names a GPU that is elsewhere, --device one here: give one")
        return gpu_named(target)
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UsageFault(f"--device {device}: {error}") from error
    if place.type not in ("cpu", "cuda"):
        raise UsageFault(f"--device {device}: kernels run on cpu and cuda, not on {place.type}")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UsageFault(f"--device {device}: this machine has no CUDA device; --for predicts")
    return place


def _dtype(asked: str | None, place: Gpu | torch.device) -> Dtype:
    name = asked or ("float32" if getattr(place, "type", "") == "cpu" else "bfloat16")
    if name not in _DTYPES:
        raise UsageFault(f"--dtype {name} is unknown; use one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _shapes(model: str | None, shape: str | None, dtype: Dtype) -> dict[MoeShape, int]:
    """Return the shapes to tune, and how many layers of the model have each."""
    if model is not None and shape is not None:
        raise UsageFault(f"say what to tune: {_WANTED}; both were given, {model} and {shape}")
    if model is not None:
        from ditune.tuner.moe_shapes import shapes_of

        sources.quieten_libraries()
        return shapes_of(model, dtype)
    if shape is None:
        raise UsageFault(f"say what to tune: {_WANTED}; neither was given")
    return {_shape(shape, dtype): 1}


def _shape(text: str, dtype: Dtype) -> MoeShape:
    """Return the shape that `--shape` names."""
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise UsageFault(
            f"--shape {text} must be four whole numbers > 0, EXPERTS,HIDDEN,INNER,TOP_K, such as "
            "64,2048,1408,6"
        )
    experts, hidden, inner, top_k = map(int, parts)
    if top_k > experts:
        raise UsageFault(
            f"--shape {text}: a token cannot have {top_k} different experts of {experts}; give at "
            f"most {experts} as TOP_K"
        )
    return MoeShape(experts=experts, hidden=hidden, inner=inner, top_k=top_k, dtype=dtype)


def _routed(
    shape: MoeShape,
    tokens: Sequence[int] | None,
    kinds: Sequence[str] | None,
    file: Path | None,
) -> tuple[Routed, ...]:
    """Return the routings to tune for."""
    from ditune.tuner.moe import kinds_of_routing, read_routings

    if file is not None:
        if tokens or kinds:
            raise UsageFault("--routings has its own tokens: leave --tokens and --routing out")
        return read_routings(file, shape)
    return kinds_of_routing(shape, tokens or (1024,), _kinds(kinds or ("balanced", "zipf")))


def _kinds(names: Sequence[str]) -> tuple[Kind, ...]:
    from ditune.kernels.histograms import KINDS

    known: dict[str, Kind] = {kind: kind for kind in KINDS}
    for name in names:
        if name not in known:
            raise UsageFault(f"--routing {name} is unknown; use one of {', '.join(known)}")
    return tuple(known[name] for name in names)


def _tuned(
    shape: MoeShape, routed: Sequence[Routed], place: Gpu | torch.device, progress: Progress
) -> tuple[Tuned, ...]:
    from ditune.kernels.hardware import Gpu

    if isinstance(place, Gpu):
        from ditune.tuner.moe_offline import predicted

        return predicted(shape, routed, place, progress)
    if place.type == "cuda":
        from ditune.tuner.moe_gpu import bench_of, timed

        return timed(shape, routed, bench_of(place), progress)
    from ditune.tuner.moe_cpu import timed as timed_on_cpu

    return timed_on_cpu(shape, routed, progress)


def _hardware(place: Gpu | torch.device) -> Hardware:
    from ditune.accel import fingerprint
    from ditune.kernels.hardware import Gpu, any_device

    return any_device(place) if isinstance(place, Gpu) else fingerprint.hardware(place)


def _as_json(
    hardware: Hardware, layers: dict[MoeShape, int], found: dict[MoeShape, tuple[Tuned, ...]]
) -> dict[str, object]:
    return {
        "schema": "ditune/moe-1",
        "hardware": hardware.model_dump(mode="json"),
        "layers": [
            {
                "shape": shape.model_dump(mode="json"),
                "count": layers[shape],
                "found": [
                    {
                        **row.choice.model_dump(mode="json"),
                        "routings": list(row.routings),
                        "us": row.us,
                        "note": row.note,
                    }
                    for row in rows
                ],
            }
            for shape, rows in found.items()
        ],
    }


def _print(hardware: Hardware, shape: MoeShape, count: int, found: Sequence[Tuned]) -> None:
    console = Console(highlight=False)
    table = Table(
        title=f"{count} x {shape.words} on {escape(hardware.device_name)}", title_justify="left"
    )
    for column in ("routing", "tiles", "us", "over default", "status"):
        table.add_column(column, justify="right" if column in ("us", "over default") else "left")
    for row in found:
        table.add_row(
            "\n".join(row.routings),
            "\n".join(_words(row.choice.tiles)),
            f"{row.us:.0f}",
            f"{row.choice.speedup:.2f}x",
            row.choice.status,
        )
    console.print(table)
    for note in dict.fromkeys(row.note for row in found):
        console.print(note, style="dim")


def _words(tiles: Tiles) -> Iterator[str]:
    """Yield a line for each thing that is tiled."""
    if isinstance(tiles, LayerTiles):
        yield f"up   {_config_words(tiles.up)}"
        yield f"down {_config_words(tiles.down)}"
    else:
        yield _cpu_words(tiles)


def _config_words(config: TileConfig) -> str:
    parts = [f"{config.block_m}x{config.block_n}x{config.block_k}", f"{config.num_warps} warps"]
    parts += [f"{config.num_stages} stages", config.path, f"group {config.group_m}"]
    parts += [f"low {config.low_m}"] * bool(config.low_m) + ["swapped"] * config.swap_ab
    parts += [f"split {config.split_k}"] * (config.split_k > 1)
    return ", ".join(parts + ["stays"] * bool(config.persistent))


def _cpu_words(tiles: CpuTiles) -> str:
    parts = [f"{tiles.rows} rows", tiles.order, tiles.mapping]
    return ", ".join(parts + ["fused"] * tiles.fused + ["prepacked"] * tiles.prepacked)
