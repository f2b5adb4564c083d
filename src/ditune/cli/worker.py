"""`tune worker`: evaluate for a search that another process runs, here or on another machine."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ditune.cli import sources
from ditune.db.errors import DituneError, UsageFault

if TYPE_CHECKING:
    from ditune.db.store import Store
    from ditune.tuner.child import Limits

_LOGS = Path("ditune-workers")  # must be on a file system that the cluster shares
_LOOK_S = 5.0  # how often a worker without a study looks for one


class Stopped(DituneError):
    """The worker was asked to stop; its job waits for another one."""

    exit_code = 130


def worker(
    study: Annotated[
        str | None, typer.Argument(help="The study (default: the newest whose search goes on).")
    ] = None,
    db: sources.Database = None,
    device: sources.Device = None,
    memory_limit: sources.MemoryLimit = None,
    lease: Annotated[
        float,
        typer.Option(
            "--lease",
            min=1.0,
            metavar="SECONDS",
            help="After how long without a sign of life another worker gets the job.",
        ),
    ] = 60.0,
    submit: Annotated[
        int, typer.Option("--submit", min=0, help="Submit so many workers to SLURM instead.")
    ] = 0,
    slurm: Annotated[
        list[str] | None,
        typer.Option("--slurm", metavar="NAME=VALUE", help="Of each job, such as partition=gpu."),
    ] = None,
    json_output: sources.Json = False,
) -> None:
    """Evaluate policies for a search that was started with tune run --workers, until it ends.

    Any number of workers on any number of machines share the PostgreSQL database of the search. All
    need the same hardware and software as the machine that began it, and each a device of its own.

    Exit codes: 0 the search ended, 2 something to correct, 5 others compute on the device, 130
    stopped by Ctrl-C or SIGTERM (the job is given back).
    """
    from ditune.db.store import Store
    from ditune.tuner.elsewhere import require_shared

    with Store.open(sources.database_url(db)) as store:
        require_shared(store.jobs)
        if submit:
            given = {"--device": device, "--memory-limit": memory_limit, "--lease": lease}
            _submit(study, sources.database_url(db), given, (submit, slurm or []), json_output)
            return
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        try:
            name = _chosen(store, study)
            begun = _work(store, name, device, sources.limits_of(memory_limit), lease)
        except KeyboardInterrupt:
            raise Stopped("stopped; the job that it was doing waits for another worker") from None
    if json_output:
        sources.print_json({"schema": "ditune/worker-1", "study": name, "jobs": begun})
    else:
        Console().print(f"{escape(name)} has ended; this worker did {begun} of its jobs")


def _submit(
    study: str | None,
    url: str,
    given: Mapping[str, object],
    wanted: tuple[int, Sequence[str]],
    json_output: bool,
) -> None:
    """Submit this command as jobs of SLURM; their logs lie in a folder beside the caller."""
    from ditune.tuner.cluster import submit

    command = [sys.executable, "-m", "ditune.cli.main", "worker", "--db", url]
    command += [study] if study is not None else []
    for name, value in given.items():
        command += [name, str(value)] if value is not None else []
    count, settings = wanted
    if wrong := [each for each in settings if "=" not in each]:
        raise UsageFault(f"--slurm takes NAME=VALUE, such as partition=gpu, and got {wrong[0]!r}")
    pairs = dict(each.split("=", 1) for each in settings)
    jobs = [job.job_id for job in submit(command, count, _LOGS, _numbers(pairs))]
    if json_output:
        sources.print_json({"schema": "ditune/submitted-1", "jobs": jobs, "logs": str(_LOGS)})
    else:
        Console().print(f"submitted {', '.join(jobs)}; logs in {_LOGS}")


def _numbers(settings: Mapping[str, str]) -> dict[str, str | int]:
    """Return settings with those that are whole numbers as such: SLURM's time is one."""
    return {name: int(text) if text.isdigit() else text for name, text in settings.items()}


def _chosen(store: Store, study: str | None) -> str:
    """Return the study to work for; without a name the newest, as soon as one goes on.

    Raises:
        UsageFault: There is no study of that name.
    """
    if study is not None:
        if store.study(study) is None:
            raise UsageFault(f"{store.where} holds no study {study}: tune run prints its name")
        return study
    while not (going_on := store.jobs.open_searches()):
        Console(stderr=True).print(f"waiting for a search in {escape(store.where)}", style="dim")
        time.sleep(_LOOK_S)
    return going_on[0]


def _work(store: Store, name: str, device: str | None, limits: Limits, lease_s: float) -> int:
    """Load the pipeline once a job names it, and do jobs until the search ends."""
    from ditune.tuner.child import Child
    from ditune.tuner.elsewhere import first_origin, require_same_machine
    from ditune.tuner.worker import Worker

    found = store.study(name)
    origin = first_origin(store.jobs, name)
    if origin is None or found is None:
        return 0
    with closing(Child(origin, device=device, limits=limits)) as child:
        require_same_machine(found.settings, child.hardware, child.software)
        return Worker(store.jobs, name, child, lease_s).until_ended()
