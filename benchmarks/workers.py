"""How much faster a search gets with more workers, and how long they wait for the next point.

Throughput is measured: a search on PostgreSQL, workers whose evaluations are pauses of one second.
What an evaluation of a minute leaves idle is simulated, event by event, with the ask times that
were measured here and the product's own rule for asking ahead.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import optuna
from benchmarks import rows
from benchmarks._fake_study import Pauses, begin, drive, space, work
from benchmarks._kills import finish, started
from benchmarks._server import Server
from benchmarks.resumed import require_same

from ditune.db.engine import study_storage_url
from ditune.db.jobs import LEASE_S
from ditune.db.store import Store
from ditune.tuner.asking import Asking
from ditune.tuner.crew import reserve_lacks
from ditune.tuner.search import Budget

_TEAMS = (1, 2, 4, 8)
_EVALUATIONS = 200
_PAUSE_S = 1.0
_LINEAR_MIN = 0.9
_TRIALS = (20, 60, 200)  # told before a point is asked
_ASKS = 5
_PENDING = 8  # points that are evaluated meanwhile
_MINUTE_S = 60.0
_JITTER = 0.1  # of an evaluation, relative
_IDLE_MAX = 0.10


def measure(benchmark: rows.Benchmark, arguments: argparse.Namespace) -> None:
    """Measure throughput and ask times, then simulate."""
    evaluations = 16 if arguments.quick else _EVALUATIONS
    pause_s = 0.2 if arguments.quick else _PAUSE_S
    with tempfile.TemporaryDirectory(prefix="ditune-workers-") as scratch, Server() as server:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        require_same(folder, {"evaluations": evaluations, "pause_s": pause_s})
        benchmark.conditions["an evaluation"] = f"a pause of {pause_s:g} s; a random sampler"
        lasted = [
            _kept(
                folder / f"{team}.json",
                partial(_evaluated, server.database(), team, evaluations, pause_s),
            )
            for team in _TEAMS
        ]
        for row in _throughput(lasted, evaluations):
            benchmark.add(row)
        counts = _TRIALS[:1] if arguments.quick else _TRIALS
        asks = {count: _asked(server.database(), count) for count in counts}
        for count, seconds in asks.items():
            figure = f"one ask of Gaussian processes after {count} trials"
            benchmark.add(rows.Row(figure, statistics.median(seconds), "s", n=len(seconds)))
        for row in _idle({count: statistics.median(seconds) for count, seconds in asks.items()}):
            benchmark.add(row)


def _kept(path: Path, measured: Callable[[], list[list[float]]]) -> list[list[float]]:
    """Return what a file holds, measuring if there is none."""
    if not path.exists():
        path.write_text(json.dumps(measured()))
    found: list[list[float]] = json.loads(path.read_text())
    return found


# --- throughput ------------------------------------------------------------------------------


def _evaluated(url: str, team: int, evaluations: int, pause_s: float) -> list[list[float]]:
    """Return when each evaluation began and ended, in seconds."""
    study = begin(url, seed=team)
    with tempfile.TemporaryDirectory() as folder:
        log, times = Path(folder, "acknowledged"), Path(folder, "times")
        workers = [
            started(work, url, study, Pauses(f"d{number}", pause_s, times), LEASE_S, log)
            for number in range(team)
        ]
        time.sleep(2.0)  # all are at the door
        finish(started(drive, url, study, Budget(evaluations), log))
        for process in workers:
            finish(process)
        lines = times.read_text().splitlines()
    assert len(lines) == evaluations, f"{len(lines)} evaluations instead of {evaluations}"
    return [[float(number) for number in line.split()] for line in lines]


def _throughput(lasted: list[list[list[float]]], evaluations: int) -> Iterator[rows.Row]:
    """Yield the throughput of each team, and its share of linear growth from one worker."""
    rates = []
    for times in lasted:
        window = max(end for _, end in times) - min(begun for begun, _ in times)
        rates.append(len(times) / window)
    for team, rate in zip(_TEAMS, rates, strict=True):
        figure = f"{team} workers: evaluations"
        yield rows.Row(figure, rate, "1/s", n=evaluations)
        share = rate / (team * rates[0])
        yield rows.Row(
            f"{team} workers: share of linear growth",
            share,
            "",
            f">= {_LINEAR_MIN:g}",
            held=share >= _LINEAR_MIN,
            n=evaluations,
        )


# --- waiting ---------------------------------------------------------------------------------


def _asked(url: str, count: int) -> list[float]:
    """Return what asks for one more point take, in seconds, after so many random trials."""
    Store.open(url).close()
    distributions = space().distributions
    sampler = optuna.samplers.GPSampler(seed=0, deterministic_objective=False)
    with closing(Asking("asked", study_storage_url(url), sampler)) as asking:
        for number in range(count + _PENDING):
            point = asking.by_chance(distributions)
            asked = asking.place(point, distributions, "search", str(number))
            if number < count:
                share = float(point["compute_frac"])
                asked.set_constraint("psnr", 0.4 - share)
                asked.set_constraint("psnr_worst", 0.3 - share)
                noise = random.Random(share).gauss(0.0, 0.02)
                asking.study.tell(asked, 0.2 + share + noise)
        seconds = []
        for _ in range(_ASKS):
            begun = time.monotonic()
            asking.give_up(asking.ask(distributions)[0])
            seconds.append(time.monotonic() - begun)
    return seconds


def _idle(ask_s: dict[int, float]) -> Iterator[rows.Row]:
    """Yield the idle share of eight workers, asked ahead and asked when one is free."""
    team = _TEAMS[-1]
    ahead = reserve_lacks
    for name, rule in (("asked ahead", ahead), ("asked when one is free", _when_free)):
        share = _idle_share(team, ask_s, rule)
        target = f"<= {_IDLE_MAX:g}" if rule is ahead else ""
        yield rows.Row(
            f"{team} workers, evaluations of 60 s, {name}: idle share",
            share,
            "",
            target,
            held=share <= _IDLE_MAX if target else None,
            n=_EVALUATIONS,
            status="simulated",
        )


def _when_free(waiting: int, running: int) -> int:
    return max(0, _TEAMS[-1] - running - waiting)


def _idle_share(team: int, ask_s: dict[int, float], wanted: Callable[[int, int], int]) -> float:
    """Return the share of the workers' time that they wait, from the first to the last result.

    One process asks, one point at a time; what it takes grows with the trials as measured.
    """
    chance = random.Random(0)
    known, seconds = list(ask_s), list(ask_s.values())
    clock_s, waiting, asked, done, asking = 0.0, 0, 0, 0, False
    events: list[tuple[float, str]] = []
    running, busy_s = 0, 0.0
    while done < _EVALUATIONS:
        if not asking and asked < _EVALUATIONS and wanted(waiting, running) > 0:
            asking = True
            takes = float(np.interp(done, known, seconds))
            heapq.heappush(events, (clock_s + takes, "asked"))
        if waiting and running < team:
            lasts = _MINUTE_S * chance.lognormvariate(0.0, _JITTER)
            heapq.heappush(events, (clock_s + lasts, "done"))
            waiting, running, busy_s = waiting - 1, running + 1, busy_s + lasts
            continue  # what is wanted may have changed
        clock_s, what = heapq.heappop(events)
        if what == "asked":
            asking, asked, waiting = False, asked + 1, waiting + 1
        else:
            running, done = running - 1, done + 1
    return 1.0 - busy_s / (team * clock_s)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, help="keep what was measured here, and go on")


if __name__ == "__main__":
    rows.main("workers", measure, __doc__.partition("\n")[0], _options)
