"""What all commands share: the pipeline, the database, the folder for results, and JSON."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditune.accel.lookup import default_database
from ditune.db.errors import UsageFault

if TYPE_CHECKING:
    from ditune.db.records import Origin
    from ditune.tuner.child import Limits
    from ditune.tuner.source import Source

Model = Annotated[
    str | None, typer.Argument(help="A folder with a diffusers pipeline, or a hub id.")
]
Miniature = Annotated[
    bool, typer.Option("--miniature", help="Use the small text-to-video system inside ditune.")
]
SmallModel = Annotated[
    str | None, typer.Option("--small-model", help="The small model of the family, for hand-offs.")
]
Prompts = Annotated[
    Path | None, typer.Option("--prompts", help="A text file with one prompt on each line.")
]
Database = Annotated[
    str | None,
    typer.Option("--db", help="The database: a file or URL (default: your data folder)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Denoising steps.")]
Height = Annotated[int | None, typer.Option("--height", min=1, help="Pixels.")]
Width = Annotated[int | None, typer.Option("--width", min=1, help="Pixels.")]
Frames = Annotated[int | None, typer.Option("--frames", min=1, help="Video frames.")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Guidance scale.")]
Device = Annotated[
    str | None,
    typer.Option("--device", help='Where to run, such as "cuda:1" (default: where it loads).'),
]
MemoryLimit = Annotated[
    float | None,
    typer.Option(
        "--memory-limit",
        min=0.1,
        metavar="GIB",
        help="Memory that an evaluation may take (default: 90 % of the machine's).",
    ),
]


def call_arguments(
    steps: int | None,
    height: int | None,
    width: int | None,
    frames: int | None,
    guidance: float | None,
) -> dict[str, Any]:
    """Return the options of a call under the names that diffusers gives them."""
    return {
        "num_inference_steps": steps,
        "height": height,
        "width": width,
        "num_frames": frames,
        "guidance_scale": guidance,
    }


def quieten_libraries() -> None:
    """Keep model libraries from writing progress bars and advice over ours, and from the network.

    Hub access stays as the user set it; remote code is never run.
    """
    os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def source_loader(
    model: str | None,
    miniature: bool,
    small_model: str | None,
    prompts: Path | None,
    call: Mapping[str, Any],
) -> Callable[[], Source]:
    """Check what the user named, exactly one of a model and the miniature; return what loads it.

    Raises:
        UsageFault: Arguments do not fit together, or the model or the prompts cannot be used.
    """
    from ditune.tuner import source

    if miniature == (model is not None):
        raise UsageFault(
            "say what to tune: either --miniature, or a MODEL (a folder or hub id) with "
            "--prompts FILE"
        )
    chosen = {name: value for name, value in call.items() if value is not None}
    lines = source.read_prompts(prompts) if prompts is not None else None
    if miniature:
        if lines is not None or chosen or small_model:
            raise UsageFault(
                "--miniature brings its own prompts, sizes and small model: leave --prompts, "
                "--small-model, --steps, --height, --width, --frames and --guidance out"
            )
        return _quietly(lambda: source.registered("miniature"))
    if lines is None:
        raise UsageFault("a MODEL needs prompts to tune on: add --prompts FILE, one on each line")
    assert model is not None
    source.require_loadable(model, len(lines))
    folder, given = model, lines
    return _quietly(lambda: source.load_folder(folder, given, chosen, small_model=small_model))


def moved(source: Source, device: str | None) -> Source:
    """Return a source on the device that was asked for, by default where it loaded."""
    from ditune.tuner.source import move

    if device is not None:
        move(source, device)
    return source


def origin_of(model: str | None, small_model: str | None, call: Mapping[str, Any]) -> Origin:
    """Return where another process finds the pipeline that `source_loader` was given.

    Folders are named in full: another process may stand in another folder.
    """
    from ditune.db.records import Origin

    def full(name: str | None) -> str | None:
        return str(Path(name).absolute()) if name and Path(name).exists() else name

    if model is None:
        return Origin(registered="miniature")
    chosen = {name: value for name, value in call.items() if value is not None}
    return Origin(model=full(model), small_model=full(small_model), call=chosen)


def limits_of(memory_limit_gib: float | None) -> Limits:
    """Return what an evaluation in a child may take."""
    from ditune.tuner.child import Limits
    from ditune.tuner.elsewhere import host_limit_bytes

    if memory_limit_gib is None:
        return Limits(host_bytes=host_limit_bytes())
    most = int(memory_limit_gib * (1 << 30))
    return Limits(host_bytes=most, device_bytes=most)


def _quietly(load: Callable[[], Source]) -> Callable[[], Source]:
    def loader() -> Source:
        quieten_libraries()
        return load()

    return loader


def database_url(db: str | None) -> str:
    """Return the database that was asked for, or the user's own, whose folder is made for it."""
    if db:
        return db
    own = default_database()
    require_writable(own.parent, "the policy database")
    return str(own)


def require_writable(folder: Path, what: str) -> None:
    """Create a folder and prove that it can be written, before hours of work rely on it.

    Raises:
        UsageFault: It cannot be created or written.
    """
    probe = folder / f".ditune-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as fault:
        raise UsageFault(
            f"cannot write {what} to {folder}: {fault.strerror or fault}; "
            "choose a folder you may write"
        ) from fault


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Keep a second run from writing to the same folder; its results would mix with these.

    Raises:
        UsageFault: The folder cannot be written, or another run holds it.
    """
    from filelock import FileLock, Timeout

    require_writable(out, "the report")
    try:
        with FileLock(out / ".ditune.lock", blocking=False):
            yield
    except Timeout:
        raise UsageFault(
            f"another tune run is writing to {out}: wait for it, or name another folder with --out"
        ) from None


def print_json(data: Mapping[str, Any]) -> None:
    """Write one JSON object to standard output."""
    json.dump(data, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")
