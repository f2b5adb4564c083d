"""What is tuned: a pipeline with its prompts and arguments, from a folder, hub or entry point."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from ditune.accel.pairs import configs_in, require_pair
from ditune.db.digest import digest_bytes
from ditune.db.errors import UsageFault
from ditune.db.records import Origin

PIPELINE_GROUP = "ditune.pipelines"
PROMPT_CHARACTERS_MAX = 10_000
PROMPTS_MIN = 8
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_CONDITIONING = ("text_encoder", "tokenizer", "image_encoder", "feature_extractor")
_DEFAULT_QUALITY = "psnr>=30,psnr_worst>=22,ssim>=0.9"


class Source(Protocol):
    """A loaded pipeline and what to feed it; calibration and held-out prompts are disjoint."""

    @property
    def name(self) -> str:
        """What the user called it."""

    @property
    def pipe(self) -> Any:
        """The diffusers pipeline, on its device."""

    @property
    def small(self) -> Any | None:
        """The small transformer of the family or its pipeline, if there is one."""

    @property
    def call(self) -> dict[str, Any]:
        """The pipeline's arguments besides prompt and generator."""

    @property
    def calibration(self) -> tuple[str, ...]:
        """Prompts to search on."""

    @property
    def held_out(self) -> tuple[str, ...]:
        """Prompts to prove the winner on."""

    @property
    def quality(self) -> str:
        """The floors to use when the user names none."""


@dataclass(frozen=True)
class FolderSource:
    """A pipeline loaded from a folder or hub id, with the user's prompts."""

    name: str
    pipe: Any
    small: Any | None
    call: dict[str, Any]
    calibration: tuple[str, ...]
    held_out: tuple[str, ...]
    quality: str = _DEFAULT_QUALITY


def registered(name: str) -> Source:
    """Return the source that a package registers under a name.

    Raises:
        UsageFault: No package registers it.
    """
    known = {entry.name: entry for entry in entry_points(group=PIPELINE_GROUP)}
    if name not in known:
        raise UsageFault(
            f"no installed package registers a pipeline called {name!r}; known: {sorted(known)}"
        )
    source: Source = known[name].load()()
    return source


def load_folder(
    model: str,
    prompts: Sequence[str],
    call: Mapping[str, Any],
    *,
    small_model: str | None = None,
    revision: str | None = None,
) -> FolderSource:
    """Load a pipeline from a local folder or a hub id, without running any code from it.

    Args:
        model: A folder, or a hub id (downloaded by diffusers as usual).
        prompts: At least eight; they are split into calibration and held-out in turn.
        call: The pipeline's arguments besides the prompt.
        small_model: The small model of the family, for hand-offs.
        revision: The hub revision of `model`.

    Raises:
        UsageFault: The folder is missing or is no pipeline, there are too few prompts, or the small
            model cannot take over from the large one.
    """
    require_loadable(model, len(prompts))
    if small_model is not None:
        _require_pair(model, small_model)
    pipe = _load(model, revision)
    small = _load(small_model, None, _shared(pipe)) if small_model else None
    return FolderSource(
        name=str(model),
        pipe=pipe,
        small=small,
        call=dict(call),
        calibration=tuple(prompts[0::2]),
        held_out=tuple(prompts[1::2]),
    )


def load_origin(origin: Origin, device: str | None = None) -> Source:
    """Load what another process named, without its prompts: those come with each job.

    Args:
        origin: A registered name, or a folder or hub id.
        device: Where to, as torch names it; by default it stays where loading puts it.

    Raises:
        UsageFault: It names nothing, or what it names cannot be loaded here.
    """
    if origin.registered is not None:
        source = registered(origin.registered)
    elif origin.model is not None:
        require_loadable(origin.model, PROMPTS_MIN)
        pipe = _load(origin.model, origin.revision)
        small = _load(origin.small_model, None, _shared(pipe)) if origin.small_model else None
        source = FolderSource(origin.model, pipe, small, dict(origin.call), (), ())
    else:
        raise UsageFault("a pipeline without a name cannot be loaded: its process has to stay")
    if device is not None:
        move(source, device)
    return source


def move(source: Source, device: str) -> None:
    """Move a source's pipeline and its small model to a device, as torch names it.

    Raises:
        UsageFault: There is no such device, or it has too little memory.
    """
    try:
        for part in (source.pipe, source.small):
            if part is not None:
                part.to(device)
    except (RuntimeError, AssertionError) as fault:  # torch says either
        first = str(fault).strip().partition("\n")[0]
        raise UsageFault(f"{source.name} cannot be moved to {device}: {first}") from fault


def require_loadable(model: str, prompts: int) -> None:
    """Check what can be checked before minutes are spent on loading.

    Raises:
        UsageFault: The folder is missing or is no pipeline, or there are too few prompts.
    """
    folder = Path(model)
    is_hub_id = _HUB_ID.match(model) is not None
    if not folder.exists() and not is_hub_id:
        raise UsageFault(
            f"there is no model folder at {model}: give the folder that holds model_index.json"
        )
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UsageFault(
            f"{model} is not a diffusers pipeline: it has no model_index.json; "
            "save one there with pipe.save_pretrained(...)"
        )
    if prompts < PROMPTS_MIN:
        raise UsageFault(
            f"a search needs at least {PROMPTS_MIN} prompts, half of them to prove the winner on, "
            f"and got {prompts}: add some to the file"
        )


def _require_pair(model: str, small_model: str) -> None:
    """Compare what can be compared before anything is loaded: pipelines in folders."""
    large, small = Path(model), Path(small_model)
    if large.is_dir() and small.is_dir():
        require_pair(configs_in(large), configs_in(small), (model, small_model))


def _shared(pipe: Any) -> dict[str, Any]:
    """Return the parts of a pipeline that its small sibling need not load again."""
    return {n: part for n, part in pipe.components.items() if n.startswith(_CONDITIONING)}


def _load(model: str, revision: str | None, parts: Mapping[str, Any] | None = None) -> Any:
    """Load a pipeline; `parts` are taken as they are."""
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(
            model, revision=revision, use_safetensors=True, trust_remote_code=False, **(parts or {})
        )
    except (OSError, ValueError, AttributeError, ImportError) as fault:
        first = str(fault).strip().splitlines()[0] if str(fault).strip() else type(fault).__name__
        raise UsageFault(f"diffusers cannot load a pipeline from {model}: {first}") from fault


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a text file, one per line; empty lines are left out.

    Raises:
        UsageFault: The file is missing, unreadable, empty, or has a line that is too long.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise UsageFault(f"cannot read the prompt file {path}: {fault}") from fault
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UsageFault(f"the prompt file {path} is empty: put one prompt on each line")
    if (longest := max(map(len, prompts))) > PROMPT_CHARACTERS_MAX:
        raise UsageFault(
            f"a prompt in {path} is longer than {PROMPT_CHARACTERS_MAX} characters ({longest})"
        )
    return prompts


def prompts_digest(source: Source) -> str:
    """Return the digest of all prompts of a source, calibration first."""
    return digest_bytes("\n".join([*source.calibration, "", *source.held_out]).encode())
