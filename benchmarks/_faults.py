"""Faults other than kills, one study each: clocks, a full disk, a pause, a restarted server."""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks._fake_study import begin, drive
from benchmarks._kills import LEASE_S, Place, finish, started
from benchmarks._server import Server
from benchmarks.rows import Row
from optuna.storages._rdb import storage as optuna_storage

from ditune.db.store import Store
from ditune.tuner.search import Budget

_PLANNED = 12
_CLOCK_STEP_S = 7200.0
_SMALL_DISK = "600k"


def clock_steps(url: str) -> Iterator[Row]:
    """Set the clock of a search forth and back by two hours with every look at it.

    Its time budget is one hour; the clock is set for Python and Optuna inside of the process.
    """
    with _placed(url) as place:
        budget = Budget(_PLANNED, seconds=3600.0)
        finish(started(_stepping, drive, place.url, place.study, budget, place.log, 0.01))
        tally = place.tally(0, _PLANNED)
        missing = _PLANNED - tally.trials
        yield _none("clock steps of +-2 h: trials missing of a 1 h budget", missing, _PLANNED)


def full_disk(url: str) -> Iterator[Row]:
    """Search in a file system that fills up, then give it room and go on.

    The file system is a real one of 600 kB where this may be mounted; elsewhere there are no rows.
    """
    folder = Path(url).parent / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_SMALL_DISK}", "ditune", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        return
    try:
        yield from _full_disk(str(folder / "ditune.db"), folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _full_disk(url: str, folder: Path) -> Iterator[Row]:
    with _placed(url) as place:
        process = place.driver(0.01, planned=400)
        process.join()
        yield Row(
            "full disk: the search ends with a sentence",
            process.exitcode or 0,
            "exit code",
            "= 1",
            held=process.exitcode == 1,
        )
        grow = ["mount", "-o", "remount,size=64m", str(folder)]
        subprocess.run(grow, check=True)
        planned = 1 + place.tally(0).trials
        finish(place.driver(0.01, planned=planned))
        tally = place.tally(0, planned)
        bad = tally.lost + tally.told_twice + tally.untold + tally.left_running + tally.damaged
        bad += planned - tally.trials
        yield _none("full disk, then room: results lost, told twice or missing", bad, planned)


def long_pause(url: str) -> Row:
    """Stop a worker for five leases in the middle of an evaluation, and let it go on."""
    with _placed(url) as place:
        driver = place.driver(None, _PLANNED)
        paused, other = (place.worker(number, seconds=0.3) for number in range(2))
        with Store.open(url) as store:
            _until(lambda: _evaluates(store, place.study, paused.pid))
            os.kill(paused.pid or 0, signal.SIGSTOP)
            time.sleep(5 * LEASE_S)
            os.kill(paused.pid or 0, signal.SIGCONT)
        for process in (driver, paused, other):
            finish(process)  # the paused one lives, and leaves like the other
        return _none(
            "a worker paused for 5 leases: results told twice, lost or missing", *_bad(place)
        )


def server_restart(url: str, server: Server) -> Row:
    """Restart the server in the middle of a search with four workers."""
    with _placed(url) as place:
        team = [place.driver(None, 2 * _PLANNED)]
        team += [place.worker(number, seconds=0.2) for number in range(4)]
        with Store.open(url) as store:
            _until(lambda: len(store.trials(place.study)) >= _PLANNED // 2)
        server.restart()
        for process in team:
            finish(process)
        bad = _bad(place, 2 * _PLANNED)
        return _none("a server restart in mid-search: results told twice, lost or missing", *bad)


@contextmanager
def _placed(url: str) -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as log:
        yield Place(url, begin(url, 0), Path(log) / "acknowledged")


def _bad(place: Place, planned: int = _PLANNED) -> tuple[int, int]:
    """Return how many results are not as they should be, and of how many."""
    tally = place.tally(0, planned)
    bad = tally.lost + tally.told_twice + tally.untold + tally.left_running
    return bad + abs(planned - tally.trials), planned


def _none(figure: str, value: int, of: int) -> Row:
    return Row(figure, value, f"of {of}", "= 0", held=value == 0, n=of)


def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.02)


def _evaluates(store: Store, study: str, pid: int | None) -> bool:
    """Whether a process holds a lease at the moment."""
    return any(holder.startswith(f"{pid}-") for holder in store.jobs.holders(study))


def _stepping(target: Callable[..., None], *arguments: Any) -> None:
    """Run a target under a clock that is two hours off, forth and back at every look."""
    real = time.time
    looks = 0

    def off_s() -> float:
        nonlocal looks
        looks += 1
        return _CLOCK_STEP_S if looks % 2 else -_CLOCK_STEP_S

    class Stepping(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return super().now(tz) + datetime.timedelta(seconds=off_s())

    with (
        patch.object(time, "time", lambda: real() + off_s()),
        patch.object(optuna_storage, "datetime", Stepping),
    ):
        target(*arguments)
