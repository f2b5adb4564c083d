"""Kills, pauses, clock steps, a full disk, a restarted server: nothing is lost or told twice.

Real processes are killed by signal 9 at random points: a search that evaluates by itself on SQLite,
a search and four workers on PostgreSQL. An evaluation is a pause; everything else is the product.
Kills are counted in `--folder`, so that a run that was ended goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import rows
from benchmarks._faults import clock_steps, full_disk, long_pause, server_restart
from benchmarks._kills import LEASE_S, PLANNED, SEED, Tally, kill_alone, kill_team, killed
from benchmarks._server import Server
from benchmarks.resumed import require_same

_KILLS = {"sqlite": 200, "postgresql": 100}
_QUICK = {"sqlite": 4, "postgresql": 4}


def measure(benchmark: rows.Benchmark, arguments: argparse.Namespace) -> None:
    """Kill, disturb, and count."""
    kills = _QUICK if arguments.quick else _KILLS
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="ditune-crash-")))
        folder = arguments.folder or scratch
        folder.mkdir(parents=True, exist_ok=True)
        require_same(folder, {"planned": PLANNED, "lease_s": LEASE_S, "seed": SEED})
        server = stack.enter_context(Server())
        files, databases = _files(scratch), iter(server.database, "")
        benchmark.conditions["an evaluation"] = "a pause of 50 ms; a random sampler behind ladders"
        benchmark.conditions["a lease"] = f"{LEASE_S:g} s"
        alone = killed("sqlite", kills["sqlite"], folder, files, kill_alone)
        report(benchmark, "SQLite, one process", alone)
        team = killed("postgresql", kills["postgresql"], folder, databases, kill_team)
        report(benchmark, "PostgreSQL, 4 workers", team)
        for fault in (clock_steps, full_disk):
            for row in fault(next(files)):
                benchmark.add(row)
        benchmark.add(long_pause(next(databases)))
        benchmark.add(server_restart(next(databases), server))


def _files(folder: Path) -> Iterator[str]:
    number = 0
    while True:
        number += 1
        place = folder / f"study{number}"
        place.mkdir()
        yield str(place / "ditune.db")


def report(benchmark: rows.Benchmark, where: str, total: Tally) -> None:
    """Add the rows of some kills."""
    figures = {
        "acknowledged results lost": (total.lost, total.acknowledged),
        "results told twice": (total.told_twice, total.trials),
        "results stored and never told": (total.untold, total.trials),
        "left running": (total.left_running, total.trials),
        "trials missing from the planned count": (abs(total.planned - total.trials), total.planned),
        "damaged databases": (total.damaged, total.studies),
    }
    n = total.kills
    benchmark.add(rows.Row(f"{where}: kill -9", n, "", n=n))
    for figure, (value, of) in figures.items():
        row = rows.Row(f"{where}: {figure}", value, f"of {of}", "= 0", held=value == 0, n=n)
        benchmark.add(row)
    failed = rows.Row(f"{where}: trials killed in every attempt", total.failed, "", n=n)
    benchmark.add(failed)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, help="keep what was done here, and go on with it")


if __name__ == "__main__":
    rows.main("crash", measure, __doc__.partition("\n")[0], _options)
