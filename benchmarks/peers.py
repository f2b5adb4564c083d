"""Is ditune faster than what a user would take instead, at the same quality?

Sweeps every peer on the same calibration prompts, proves the fastest setting of each under the same
rule, and measures what was proved on held-out prompts, interleaved. It takes hours; what it
measured stays in `bench-out/peers` (`bench-out/peers-quick`), and the next run goes on from there.
With `--peers SeaCache` only some are measured beside ditune, which is searched anew: half an hour
says whether a change moved the figures of a full run.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from benchmarks.resumed import require_same
from benchmarks.rows import Benchmark, Row, main
from rich.console import Console

from ditune.cli.sources import quieten_libraries
from ditune.db.comparison import Comparison, Standing
from ditune.db.files import write_atomically
from ditune.miniature.system import MiniatureSource
from ditune.reports import rivals
from ditune.tuner.bench import Bench, Options
from ditune.tuner.peers import ours
from ditune.tuner.peers.catalogue import PEERS
from ditune.tuner.quality import parse_constraints

_MEANS = (35, 40, 45)
_WORST_BELOW = 8  # dB that the worst prompt may lie below the floor of the mean
_LEAD = 1.15
_OUT = Path("bench-out")


def measure(benchmark: Benchmark, arguments: argparse.Namespace) -> None:
    """Compare on the miniature in its reference setting."""
    quieten_libraries()
    source = MiniatureSource()
    folder = _OUT / ("peers-quick" if arguments.quick else "peers")
    folder.mkdir(parents=True, exist_ok=True)
    means = _MEANS[:1] if arguments.quick else _MEANS
    options = Options()
    if arguments.quick:
        options = Options(
            trials=6, calibration=1, confirmation=2, confirmation_seeds=1, held_out=2, seeds=1
        )
    require_same(folder, {"options": asdict(options)})
    floors = [parse_constraints(f"psnr>={m},psnr_worst>={m - _WORST_BELOW}") for m in means]
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    comparison = Bench(source, floors, folder, options, console.print).run(_names(arguments))
    write_atomically(
        folder / "comparison.json", comparison.model_dump_json(indent=2).encode() + b"\n"
    )
    rivals.write(comparison, folder / "comparison.html")
    if arguments.peers is not None:
        benchmark.conditions["peers"] = f"{arguments.peers} alone"
    _add(benchmark, comparison)


def _options(parser: argparse.ArgumentParser) -> None:
    """Add what this benchmark alone has."""
    parser.add_argument("--peers", help="some of the peers, with commas (default: all)")


def _names(arguments: argparse.Namespace) -> list[str]:
    """Return the peers to measure."""
    if arguments.peers is None:
        return list(PEERS)
    return [name.strip() for name in arguments.peers.split(",")]


def _add(benchmark: Benchmark, comparison: Comparison) -> None:
    benchmark.conditions["prompts"] = (
        f"{comparison.calibration} to sweep on, {comparison.confirmation} videos to prove on, "
        f"{comparison.held_out} held-out videos"
    )
    for standing in comparison.standings:
        _add_standing(benchmark, standing)
    own = {s.floors: s for s in comparison.standings if s.peer == ours.NAME}
    for lead in comparison.leads:
        floor = f"{lead.floors[0].floor:g} dB"
        for kind, rival, seen in (
            ("work", lead.best_by_work, lead.work),
            ("wall-clock", lead.best_by_speed, lead.speed),
        ):
            held = own[lead.floors].holds and seen.median >= _LEAD and seen.ci95[0] > 1.0
            figure = f"{floor}: ditune / best peer ({rival}), {kind}"
            benchmark.add(Row(figure, seen.median, "x", f">= {_LEAD}", held, seen.ci95, seen.n))


def _add_standing(benchmark: Benchmark, standing: Standing) -> None:
    name = f"{standing.floors[0].floor:g} dB: {standing.peer}"
    if standing.setting is None:
        benchmark.add(Row(f"{name} ({standing.reason})", 1.0, "x"))
        return
    work, speed = standing.work_ratio, standing.speedup
    name = f"{name}, {standing.setting}"
    benchmark.add(Row(f"{name}: work ratio", work.median, "x", ci95=work.ci95, n=work.n))
    benchmark.add(Row(f"{name}: speedup", speed.median, "x", ci95=speed.ci95, n=speed.n))
    seen = standing.quality["psnr"]
    benchmark.add(Row(f"{name}: PSNR mean", seen.mean, "dB", n=seen.n))
    floors = "all floors" if standing.holds else "no"
    benchmark.add(Row(f"{name}: PSNR worst ({floors} held)", seen.worst, "dB", n=seen.n))


if __name__ == "__main__":
    main("peers", measure, __doc__ or "", _options)
