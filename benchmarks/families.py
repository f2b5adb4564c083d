"""Does MixCache work on every transformer of diffusers that can carry a cache?

Builds each in a tiny form with random weights and drives it as a pipeline does, with two guidance
branches. The same table as in the tests; here every check is a row.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

from benchmarks.rows import Benchmark, Row, main
from tests.accel import test_families as families
from tests.accel.families_first import FIRST_LEFT_OUT
from tests.accel.families_second import SECOND_LEFT_OUT

from ditune.cli.sources import quieten_libraries

Check = Callable[[families.Loop], None]
CHECKS: dict[str, Check] = {
    "all-full mask and removal bit-identical": families.test_all_full_and_removed_are_bit_identical,
    "step reuse, output": lambda loop: families.test_step_masks_run_no_block_at_reused_steps(
        loop, "output"
    ),
    "step reuse, latent": lambda loop: families.test_step_masks_run_no_block_at_reused_steps(
        loop, "latent"
    ),
    "step reuse, hidden": lambda loop: families.test_step_masks_run_no_block_at_reused_steps(
        loop, "hidden"
    ),
    "cfg reuse": families.test_cfg_masks_run_one_branch,
    "block reuse": families.test_block_masks_run_the_outer_blocks,
    "first-block indicator": families.test_the_front_blocks_decide_inside_the_forward,
    "two at once, stopped in mid-run": (
        families.test_two_pipelines_at_once_and_a_stopped_call_leave_nothing
    ),
}


def measure(benchmark: Benchmark, arguments: argparse.Namespace) -> None:
    """Run every check on every family."""
    quieten_libraries()
    warnings.simplefilter("ignore")
    names = sorted(families.FAMILIES)[:: 6 if arguments.quick else 1]
    passed = dict.fromkeys(CHECKS, 0)
    for name in names:
        failed = []
        for check, run in CHECKS.items():
            try:
                run(families.build(name))
                passed[check] += 1
            except AssertionError:
                failed.append(check)
        note = f" (without {', '.join(failed)})" if failed else ""
        blocks = " (no hidden or block reuse)" if name in families.INTERLEAVED else ""
        held = len(failed) == 0
        benchmark.add(Row(f"{name}{blocks}{note}", len(CHECKS) - len(failed), "checks", "", held))
    for check, count in passed.items():
        target = f"= {len(names)}"
        benchmark.add(Row(f"families: {check}", count, "", target, count == len(names)))
    benchmark.conditions["left out"] = str({**FIRST_LEFT_OUT, **SECOND_LEFT_OUT})
    benchmark.conditions["no hidden or block reuse"] = ", ".join(sorted(families.INTERLEAVED))


if __name__ == "__main__":
    main("families", measure, __doc__ or "")
