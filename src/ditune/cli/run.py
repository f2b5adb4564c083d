"""`tune run`: profile, search, confirm, save, policy file, report."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditune.cli import sources
from ditune.cli.display import RunDisplay, print_result
from ditune.db.errors import DituneError, NoFeasiblePolicy, UsageFault

if TYPE_CHECKING:
    from ditune.tuner.elsewhere import Elsewhere
    from ditune.tuner.result import Options, Result
    from ditune.tuner.source import Source

_RESUMED = ("model", "small_model", "prompts", "quality", "tiers", "device", "out", "junit", "db")
_RESUMED_INTEGERS = ("trials", "seed", "steps", "height", "width", "frames")
_RESUMED_NUMBERS = ("guidance", "time_limit", "memory_limit")
_RESUMED_SWITCHES = ("miniature", "in_process", "workers", "no_warm_start")


class Interrupted(DituneError):
    """The user pressed Ctrl-C; everything measured so far is in the database."""

    exit_code = 130


def run(
    model: sources.Model = None,
    miniature: sources.Miniature = False,
    small_model: sources.SmallModel = None,
    prompts: sources.Prompts = None,
    quality: Annotated[
        str | None,
        typer.Option("--quality", help='Floors, such as "psnr>=35,psnr_worst>=27,ssim>=0.92".'),
    ] = None,
    tiers: Annotated[
        str | None,
        typer.Option(
            "--tiers",
            metavar="NAMES",
            help="Several trade-offs instead: some of lossless,high,fast, or floors of your own: "
            '"high;draft:psnr>=28,psnr_worst>=20". The first one is also the default.',
        ),
    ] = None,
    trials: Annotated[
        int,
        typer.Option(
            "--trials",
            min=1,
            help="Policies to try; for each tier after the first, a third (at least 5).",
        ),
    ] = 20,
    time_limit: Annotated[
        float | None,
        typer.Option(
            "--time-limit", min=0.1, help="Minutes for profile and search; the proof is extra."
        ),
    ] = None,
    no_warm_start: Annotated[
        bool,
        typer.Option("--no-warm-start", help="Do not begin with what other searches proved."),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the search.")] = 0,
    steps: sources.Steps = None,
    height: sources.Height = None,
    width: sources.Width = None,
    frames: sources.Frames = None,
    guidance: sources.Guidance = None,
    device: sources.Device = None,
    db: sources.Database = None,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the policy file and the report.")
    ] = Path("ditune-out"),
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="STUDY", help="Go on with a study.")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", help="Also write the floors as JUnit tests.")
    ] = None,
    in_process: Annotated[
        bool,
        typer.Option("--in-process", help="Evaluate in this process, where a hang hangs all."),
    ] = False,
    workers: Annotated[
        bool,
        typer.Option("--workers", help="Let tune worker processes evaluate; needs PostgreSQL."),
    ] = False,
    memory_limit: sources.MemoryLimit = None,
    json_output: sources.Json = False,
) -> None:
    """Profile a pipeline, search a policy, prove it on unseen prompts, save it and report.

    Policies are evaluated in a process of their own, which is ended when it hangs or takes too much
    memory; with --workers, by any number of tune worker processes on machines like this one.

    With --tiers each trade-off is searched and proved in turn, in the order listed, and begins with
    what the ones before it measured. ditune.accelerate(pipe, tier="high") takes one of them,
    ditune.accelerate(pipe) the first.

    Exit codes: 0 found, 2 something to correct, 4 no policy holds the floors, 130 interrupted.
    """
    asked: dict[str, Any] = {
        "model": model,
        "miniature": miniature,
        "small_model": small_model,
        "prompts": str(prompts.absolute()) if prompts else None,
        "quality": quality,
        "tiers": tiers,
        "trials": trials,
        "time_limit": time_limit,
        "no_warm_start": no_warm_start,
        "seed": seed,
        "steps": steps,
        "height": height,
        "width": width,
        "frames": frames,
        "guidance": guidance,
        "device": device,
        "db": db,
        "out": str(out),
        "junit": str(junit) if junit else None,
        "in_process": in_process,
        "workers": workers,
        "memory_limit": memory_limit,
    }
    if resume is not None:
        asked = _arguments_of(resume, db)
    load = _checked(asked)
    with sources.alone_in(Path(asked["out"])):
        _run(asked, load, resume, json_output)


def _checked(asked: Mapping[str, Any]) -> Callable[[], Source]:
    """Return what loads the source, after finding every mistake that needs no model to be found.

    Nothing is created before.
    """
    from ditune.tuner.quality import parse_constraints
    from ditune.tuner.tiers import require_one, split_tiers

    if asked["in_process"] and asked["workers"]:
        raise UsageFault("--in-process and --workers exclude each other: leave one of them out")
    require_one(asked["quality"], asked["tiers"])
    if asked["quality"] is not None:
        parse_constraints(asked["quality"])
    if asked["tiers"] is not None:
        split_tiers(asked["tiers"])
    return _source(asked)


def _run(
    asked: dict[str, Any], load: Callable[[], Source], resume: str | None, json_output: bool
) -> None:
    """Do the work of the command with its arguments in one place."""
    from ditune.db.engine import study_storage_url
    from ditune.db.store import Store
    from ditune.tuner.session import Session

    out = Path(asked["out"])
    junit = Path(asked["junit"]) if asked["junit"] else None
    if junit is not None:
        sources.require_writable(junit.absolute().parent, "the JUnit file")
    url = sources.database_url(asked["db"])
    with Store.open(url) as store, RunDisplay(quiet=json_output) as display:
        source = load()
        session = Session(source, store, _options(asked), display, _elsewhere(asked))
        session.expected_study = resume
        try:
            result = session.run(study_storage_url(url))
        except KeyboardInterrupt:
            raise Interrupted(_how_to_resume(session.study_name, asked["db"])) from None
    report = _write(result, out, junit)
    print_result(result, out, report, url, json_output)
    if not result.shipped:
        floors = asked["tiers"] or asked["quality"] or source.quality
        raise NoFeasiblePolicy(f"no policy holds {floors}: {result.best_seen()}")


def _call(asked: Mapping[str, Any]) -> dict[str, Any]:
    given = [asked[name] for name in ("steps", "height", "width", "frames", "guidance")]
    return sources.call_arguments(*given)


def _elsewhere(asked: Mapping[str, Any]) -> Elsewhere | None:
    """Return where policies are evaluated, None for this process."""
    from ditune.tuner.elsewhere import Elsewhere

    if asked["in_process"]:
        return None
    origin = sources.origin_of(asked["model"], asked["small_model"], _call(asked))
    limits = sources.limits_of(asked["memory_limit"])
    return Elsewhere(origin, asked["device"], asked["workers"], limits)


def _source(asked: Mapping[str, Any]) -> Callable[[], Source]:
    prompts = Path(asked["prompts"]) if asked["prompts"] else None
    load = sources.source_loader(
        asked["model"], asked["miniature"], asked["small_model"], prompts, _call(asked)
    )
    return lambda: sources.moved(load(), asked["device"])


def _options(asked: dict[str, Any]) -> Options:
    from ditune.tuner.result import Options

    limit = asked["time_limit"]
    kept = {name: str(value) for name, value in asked.items() if value is not None}
    return Options(
        quality=asked["quality"],
        tiers=asked["tiers"],
        trials=asked["trials"],
        time_limit_s=limit * 60.0 if limit else float("inf"),
        seed=asked["seed"],
        warm_start=not asked["no_warm_start"],
        arguments=kept,
    )


def _arguments_of(study_name: str, db: str | None) -> dict[str, Any]:
    """Return the arguments that a study was started with."""
    from ditune.db.store import Store

    with Store.open(sources.database_url(db)) as store:
        known = {study.name: study for study in store.studies()}
    if study_name not in known:
        raise UsageFault(
            f"there is no study {study_name!r} in {sources.database_url(db)}; "
            f"it holds: {', '.join(sorted(known)) or 'none'}"
        )
    if not known[study_name].settings.constraints:
        raise UsageFault(
            f"{study_name} is a trade-off curve: run tune curve as it was run before, and it goes "
            "on from there"
        )
    kept = known[study_name].arguments
    asked: dict[str, Any] = {name: kept.get(name) for name in _RESUMED}
    asked |= {name: int(kept[name]) if name in kept else None for name in _RESUMED_INTEGERS}
    asked |= {name: float(kept[name]) if name in kept else None for name in _RESUMED_NUMBERS}
    asked |= {name: kept.get(name) == "True" for name in _RESUMED_SWITCHES}
    asked["db"] = db or kept.get("db")
    return asked


def _how_to_resume(study: str | None, db: str | None) -> str:
    if study is None:
        return "interrupted before the search began; nothing to resume"
    where = f" --db {shlex.quote(db)}" if db else ""
    return (
        f"interrupted; every finished trial is saved. Resume with: tune run --resume {study}{where}"
    )


def _write(result: Result, out: Path, junit: Path | None) -> Path:
    """Write the policy files, the trials, the floors as tests and the report; return its path."""
    from ditune.cli.reporting import content_of
    from ditune.db import policy_file
    from ditune.db.files import write_atomically
    from ditune.reports import export, page

    found = result.policy_file
    if found is not None:
        policy_file.write(found, out / "policy.json")
    write_atomically(out / "trials.csv", export.trials_csv(result.trials).encode())
    for name, tier in result.tiers.items():
        if tier.policy_file is not None:
            policy_file.write(tier.policy_file, out / f"policy-{name}.json")
        write_atomically(out / f"trials-{name}.csv", export.trials_csv(tier.trials).encode())
    if junit is not None:
        evidence = found.evidence if found is not None else None
        text = export.junit_xml(result.study.name, evidence, result.best_seen())
        write_atomically(junit, text.encode())
    report = out / "report.html"
    page.write(content_of(result), report)
    return report
