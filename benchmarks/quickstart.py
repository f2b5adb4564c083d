"""Is the policy that `make tune` found worth what it says? Measured on prompts nobody saw.

Looks the active policy up exactly as a user's program would, then compares it with the plain
miniature on captions and seeds that neither search nor confirmation used: quality on every one,
speed in interleaved pairs. Beside it: the fewest plain steps that hold the same floors.
"""

from __future__ import annotations

import argparse

from benchmarks.rows import Benchmark, Row, main
from diffusers.utils import logging as diffusers_logging

from ditune.accel.apply import accelerate
from ditune.accel.fingerprint import detect
from ditune.accel.lookup import default_database, lookup
from ditune.db.errors import UsageFault
from ditune.db.records import Match
from ditune.db.store import Store
from ditune.miniature.system import MiniatureSource
from ditune.profiler.parts import parts_of, speedup_of_work
from ditune.profiler.statistics import paired_speedup
from ditune.tuner.evaluate import Case, Evaluator, Outcome, cases_of
from ditune.tuner.fewer_steps import fewest_steps
from ditune.tuner.quality import parse_constraints, summarise

_SEED = 9_000_000  # far from the seeds of search and confirmation
_SKIPPED = 100  # held-out captions that confirmation may have used come first
_AGREES = 0.1
_SPEEDUP_FLOOR, _INTERVAL_FLOOR = 1.5, 1.3


def measure(benchmark: Benchmark, arguments: argparse.Namespace) -> None:
    """Compare policy, plain pipeline and fewer steps."""
    diffusers_logging.set_verbosity_error()
    source = MiniatureSource()
    count = 6 if arguments.quick else 20
    cases = cases_of(source.held_out[_SKIPPED:], count, _SEED)
    match = _found(source)
    assert match.policy is not None
    benchmark.conditions["policy"] = str(match.policy_id)
    evaluator = Evaluator(source, parse_constraints(source.quality))
    outcomes = list(evaluator.run(match.policy, cases, pairs=count))
    _add_outcomes(benchmark, evaluator, outcomes)
    _add_lookup(benchmark, source, evaluator, cases[0])
    _add_fewest_steps(benchmark, evaluator, cases)


def _found(source: MiniatureSource) -> Match:
    """Return the active policy for the miniature's reference setting on this machine."""
    hardware, _, workload = detect(source.pipe, source.call)
    assert workload is not None
    match = lookup(hardware, workload)
    if match.policy is None:
        raise UsageFault(f"no policy to measure ({match.reason}): run make tune first")
    return match


def _add_outcomes(benchmark: Benchmark, evaluator: Evaluator, outcomes: list[Outcome]) -> None:
    baseline = [o.baseline_ms for o in outcomes if o.baseline_ms is not None]
    speed = paired_speedup(baseline, [o.tuned_ms for o in outcomes])
    held = speed.median >= _SPEEDUP_FLOOR
    benchmark.add(Row("speedup", speed.median, "x", ">= 1.5", held, speed.ci95, speed.n))
    low = speed.ci95[0]
    benchmark.add(
        Row("speedup, lower end of interval", low, "x", "> 1.3", low > _INTERVAL_FLOOR, n=speed.n)
    )
    work = outcomes[0].summary.work_ratio
    benchmark.add(Row("work ratio (blocks asked / run)", work, "x", n=len(outcomes)))
    _add_expected(benchmark, work, speed.median)
    quality = summarise(evaluator.constraints, [o.values for o in outcomes])
    for constraint in evaluator.constraints:
        seen = quality[constraint.name]
        value = seen.mean if constraint.statistic == "mean" else seen.worst
        target = f">= {constraint.floor:g}"
        held = value >= constraint.floor
        benchmark.add(Row(constraint.name, value, "dB", target, held, n=seen.n))


def _add_expected(benchmark: Benchmark, work: float, speedup: float) -> None:
    """Does the speedup agree with the forwards that were computed?"""
    source = MiniatureSource()
    hardware, _, workload = detect(source.pipe, source.call, source.small)
    assert workload is not None
    with Store.open(str(default_database())) as store:
        profile = store.profile(hardware, workload)
    parts = parts_of(profile) if profile is not None else None
    if parts is None:
        return
    expected = speedup_of_work(parts, work)
    benchmark.add(Row("speedup expected by computed forwards", expected, "x"))
    agrees = 1.0 - _AGREES <= speedup / expected <= 1.0 + _AGREES
    benchmark.add(Row("speedup / expected", speedup / expected, "", "0.9 to 1.1", agrees))


def _add_lookup(
    benchmark: Benchmark, source: MiniatureSource, evaluator: Evaluator, case: Case
) -> None:
    """A user's program finds the same policy by itself."""
    with accelerate(source.pipe) as applied:
        evaluator.generate(case)
        found = applied.summary().policy_id
    same = found == benchmark.conditions["policy"]
    benchmark.add(Row("accelerate(pipe) found this policy", float(same), "", "= 1", same))


def _add_fewest_steps(benchmark: Benchmark, evaluator: Evaluator, cases: list[Case]) -> None:
    """The baseline: the fewest plain steps that hold the same floors on the same cases."""
    found = fewest_steps(evaluator, cases)
    benchmark.add(Row("fewest steps that hold the floors", found.steps, "steps", n=len(cases)))
    if found.speedup is not None:
        speed = found.speedup
        benchmark.add(Row("their speedup", speed.median, "x", ci95=speed.ci95, n=speed.n))


if __name__ == "__main__":
    main("quickstart", measure, __doc__ or "")
