"""`tune worker`: evaluate for a search that another process runs, here or on another machine."""

from __future__ import annotations

import signal
import time
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ditune.cli import sources
from ditune.db.errors import DituneError, UsageFault

if TYPE_CHECKING:
    from ditune.db.store import Store
    from ditune.tuner.child import Limits

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
