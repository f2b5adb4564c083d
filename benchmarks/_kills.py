"""Killing searches and workers at random points, and counting what became of their studies."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import optuna
from benchmarks._fake_study import Pauses, begin, drive, work
from optuna.trial import TrialState
from rich.console import Console

from ditune.db.engine import study_storage_url
from ditune.db.errors import DituneError
from ditune.db.store import Store
from ditune.tuner.search import Budget

PLANNED = 40  # trials of a study
LEASE_S = 1.0
_EVALUATION_S = 0.05
_WORKERS = 4
SEED = 7
_FORK = multiprocessing.get_context("fork")  # everything is imported once


@dataclass(frozen=True)
class Tally:
    """What became of one study, or of several together."""

    kills: int = 0
    studies: int = 0
    planned: int = 0
    trials: int = 0
    acknowledged: int = 0
    lost: int = 0  # acknowledged and not stored
    untold: int = 0  # stored and not told
    told_twice: int = 0
    left_running: int = 0  # of Optuna's trials and of our jobs
    failed: int = 0  # trials that were killed in every attempt
    damaged: int = 0

    def __add__(self, other: Tally) -> Tally:
        """Return the sum of both."""
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Place:
    """One study, its database, and the file that takes what was acknowledged."""

    url: str
    study: str
    log: Path

    def driver(self, alone_s: float | None, planned: int = PLANNED) -> BaseProcess:
        """Start a search."""
        return started(drive, self.url, self.study, Budget(planned), self.log, alone_s)

    def worker(self, number: int, seconds: float = _EVALUATION_S) -> BaseProcess:
        """Start a worker on a device of its own."""
        pauses = Pauses(f"d{number}", seconds)
        return started(work, self.url, self.study, pauses, LEASE_S, self.log)

    def tally(self, kills: int, planned: int = PLANNED) -> Tally:
        """Compare both memories with what was acknowledged."""
        noted = set(self.log.read_text().split()) if self.log.exists() else set()
        with Store.open(self.url) as store:
            trials = store.trials(self.study)
            running = sum(store.jobs.counts(self.study))
        stored = {trial.uuid for trial in trials}
        storage = optuna.storages.RDBStorage(study_storage_url(self.url))
        asked = optuna.load_study(study_name=self.study, storage=storage).get_trials()
        storage.remove_session()
        storage.engine.dispose()
        told = Counter(t.user_attrs.get("uuid") for t in asked if t.state.is_finished())
        return Tally(
            kills=kills,
            studies=1,
            planned=planned,
            trials=len(trials),
            acknowledged=len(noted),
            lost=len(noted - stored),
            untold=len(stored - told.keys()),
            told_twice=sum(told[uuid] > 1 for uuid in stored),
            left_running=running + sum(t.state == TrialState.RUNNING for t in asked),
            failed=sum(trial.state == "failed" for trial in trials),
            damaged=damaged(self.url),
        )


def started(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a process by forking."""
    process = _FORK.Process(target=quietly, args=(target, arguments))
    process.start()
    return process


def quietly(target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Run a target; an error of ours is an exit code and one line, as on the command line."""
    try:
        target(*arguments)
    except DituneError as fault:
        os.write(2, f"  {fault}\n".encode())
        os._exit(fault.exit_code)


def damaged(url: str) -> int:
    """Return whether SQLite finds its file damaged; a server looks after its own."""
    if "://" in url:
        return 0
    with closing(sqlite3.connect(url)) as connection:
        answer = connection.execute("PRAGMA integrity_check").fetchone()[0]
    return int(answer != "ok")


# --- kills -----------------------------------------------------------------------------------


def kill_alone(place: Place, kills: int, chance: random.Random) -> int:
    """Kill a searching process again and again, then let it end; return how often it was killed."""
    killed = 0
    while killed < kills:
        process = place.driver(_EVALUATION_S)
        process.join(chance.uniform(0.0, 1.5))
        if process.exitcode is not None:  # it reached its planned count
            assert process.exitcode == 0, "a search that was not killed failed"
            return killed
        process.kill()
        process.join()
        killed += 1
    finish(place.driver(_EVALUATION_S))
    return killed


def kill_team(place: Place, kills: int, chance: random.Random) -> int:
    """Kill a searching process or one of its workers, start it again, and so on."""
    makers: list[Callable[[], BaseProcess]] = [lambda: place.driver(None)]
    makers += [lambda n=number: place.worker(n) for number in range(_WORKERS)]  # type: ignore[misc]
    team = [make() for make in makers]
    killed = 0
    while killed < kills:
        time.sleep(chance.uniform(0.0, 0.5))
        victim = chance.randrange(len(team))
        if team[0].exitcode is not None:
            break
        if team[victim].exitcode is None:
            team[victim].kill()
            killed += 1
        team[victim].join()
        team[victim] = makers[victim]()
    for process in team:
        finish(process)
    return killed


def finish(process: BaseProcess) -> None:
    """Wait for a process that has to end by itself."""
    process.join()
    assert process.exitcode == 0, f"a process ended with {process.exitcode}"


def killed(
    kind: str, wanted: int, folder: Path, urls: Iterator[str], kill: Callable[..., int]
) -> Tally:
    """Kill until enough was killed, study by study; add to what earlier runs did."""
    path = folder / f"{kind}.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    total = sum((Tally(**each) for each in done), Tally())
    while total.kills < wanted:
        seed = SEED + total.studies
        url = next(urls)
        with tempfile.TemporaryDirectory() as log:
            place = Place(url, begin(url, seed), Path(log) / "acknowledged")
            count = kill(place, wanted - total.kills, random.Random(seed))
            tally = place.tally(count)
        with path.open("a") as lines:
            lines.write(json.dumps(asdict(tally)) + "\n")
        total += tally
        Console(stderr=True, highlight=False).print(f"{kind}: {total.kills} of {wanted} kills")
    return total
