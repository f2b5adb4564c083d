"""What an applied policy costs that never reuses: hook, decision, indicator, caches.

CPU time of single forwards of the miniature, in short videos with the policy and without in turn:
what a step costs does not depend on how many there are. A mask decides nothing; rules measure and
remember at every step. With `--instructions` the instructions of such videos are counted instead:
half an hour, on a machine that may do other work.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from benchmarks.instructions import counted
from benchmarks.rows import Benchmark, Row, main
from scipy import stats

from ditune.accel.apply import accelerate
from ditune.cli.sources import quieten_libraries
from ditune.db.policy import Action, MaskCache, Payload, Policy, RuleCache
from ditune.db.records import Interval
from ditune.miniature.system import MiniatureSource
from ditune.profiler.statistics import paired_speedup

SHORT = 10  # steps of a video
PLAIN, FORWARD = "plain", "forward"  # pieces that are counted
_BRANCHES = 2  # forwards of a step
_LIMIT = 1.01
_NEVER = 1e-9  # an indicator's threshold at which every step is computed


def policies(steps: int) -> dict[str, Policy]:
    """Return policies of every kind that compute every step."""
    full: list[Action] = ["full"] * steps
    mask = MaskCache(actions=tuple(full))
    rule = RuleCache(warmup_frac=0.0, cooldown_steps=0, threshold=_NEVER)

    def indicated(kind: str) -> Policy:
        return Policy(cache=rule.model_copy(update={"indicator": kind}))

    return {
        "mask": Policy(cache=mask),
        "MixCache's rule, protecting every step": Policy(cache=RuleCache(warmup_frac=1.0)),
        "latent indicator": indicated("latent"),
        "spectral indicator": indicated("spectral"),
        "timestep indicator": indicated("timestep"),
        "first-block indicator": indicated("first_block"),
        "latent indicator, hidden form, order 2": Policy(
            cache=rule.model_copy(
                update={"indicator": "latent", "payload": Payload(form="hidden", order=2)}
            )
        ),
    }


class Clock:
    """CPU time of every call of a function, in seconds."""

    def __init__(self, function: Callable[..., Any]) -> None:
        """Wrap a function."""
        self.function = function
        self.seconds: list[float] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it and note how long it took."""
        started = time.process_time()
        returned = self.function(*args, **kwargs)
        self.seconds.append(time.process_time() - started)
        return returned


def measure(benchmark: Benchmark, arguments: argparse.Namespace) -> None:
    """Time the forwards of every kind of policy, the model's own and all that is around it."""
    if arguments.instructions:
        _count(benchmark)
        return
    quieten_libraries()
    source = MiniatureSource()
    source.call["num_inference_steps"] = SHORT
    pairs = 6 if arguments.quick else 24
    benchmark.conditions["measure"] = f"CPU time of every forward, {SHORT} steps a video"
    benchmark.conditions["around"] = "all forwards with the policy / the model's own part of them"
    benchmark.conditions["inside"] = "interleaved medians, forward with the policy / plain forward"
    _generate(source, 0)
    for name, policy in policies(SHORT).items():
        around, tuned, plain = [], [], []
        for index in range(pairs):
            plain += _timed(source, None, index)[0]
            outer, inner = _timed(source, policy, index)
            tuned += outer
            around.append((sum(outer), sum(inner)))
        shares = paired_speedup([outer for outer, _ in around], [inner for _, inner in around])
        _add(benchmark, f"{name}: around the forward", shares)
        _add(benchmark, f"{name}: inside and around", _ratio_of_medians(tuned, plain))


def _count(benchmark: Benchmark) -> None:
    """Compare counts of instructions.

    What a policy adds is counted without fused multiply-adds. What a plain step takes is corrected
    by one forward that is counted with them: it would look dearer, and the policy cheaper.
    """
    program = "benchmarks._overhead_counted"
    counts = counted(program, "videos", fused=False)
    excess = counts[FORWARD] - counted(program, fused=True)[FORWARD]
    plain = counts[PLAIN] - excess * SHORT * _BRANCHES
    benchmark.conditions["measure"] = f"instructions, {SHORT} steps a video, text encoder included"
    benchmark.conditions["plain step"] = f"{plain / SHORT / 1e6:.0f} million instructions"
    for name in policies(SHORT):
        cost = 1.0 + (counts[name] - counts[PLAIN]) / plain
        target = f"<= {_LIMIT}"
        benchmark.add(Row(f"{name}: instructions", cost, "x", target, cost <= _LIMIT))


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--instructions", action="store_true", help="count instructions; needs valgrind"
    )


def _add(benchmark: Benchmark, figure: str, cost: Interval) -> None:
    held = cost.median <= _LIMIT
    target = f"<= {_LIMIT}"
    benchmark.add(Row(figure, cost.median, "x", target, held, cost.ci95, cost.n))


def _timed(
    source: MiniatureSource, policy: Policy | None, index: int
) -> tuple[list[float], list[float]]:
    """Generate a video; return the CPU time of each call of the model, and of its own forward."""
    model: Any = source.pipe.transformer
    inner = outer = Clock(model.forward)
    model.forward = inner
    applied = accelerate(source.pipe, policy) if policy is not None else None
    try:
        if applied is not None:
            outer = Clock(model.forward)
            model.forward = outer
        _generate(source, index)
        if applied is not None:
            assert applied.summary().steps == {"full": SHORT}
    finally:
        if applied is not None:
            model.forward = outer.function
            applied.remove()
        del model.forward
    return outer.seconds, inner.seconds


def _generate(source: MiniatureSource, index: int) -> None:
    generator = torch.Generator().manual_seed(index)
    source.pipe(prompt=source.held_out[index], generator=generator, **source.call)


def _ratio_of_medians(tuned: Sequence[float], plain: Sequence[float]) -> Interval:
    found = stats.bootstrap(
        (np.asarray(tuned), np.asarray(plain)),
        lambda a, b, axis: np.median(a, axis=axis) / np.median(b, axis=axis),
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    median = float(np.median(tuned) / np.median(plain))
    return Interval(median=median, ci95=(float(found.low), float(found.high)), n=len(tuned))


if __name__ == "__main__":
    main("overhead", measure, __doc__ or "", _options)
