"""Evaluating in this process: the pipeline is at hand, and what hangs cannot be killed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ditune.db.errors import EvaluationFault, UsageFault
from ditune.db.policy import Policy
from ditune.db.records import Job
from ditune.tuner.devices import device_name
from ditune.tuner.evaluate import Case, Evaluates, Outcome
from ditune.tuner.verdict import Found, given_up, search_speedup


class Here:
    """A runner around an evaluator; see `ditune.tuner.worker.Runner`."""

    def __init__(self, evaluator: Evaluates) -> None:
        """Take an evaluator; its constraints have to be those of the jobs."""
        self._evaluator = evaluator
        self.device = device_name(evaluator.device)

    def run(self, job: Job) -> Found:
        """Evaluate a policy; one that cannot run is found unfit.

        Raises:
            EvaluationFault: The device failed, or the plain pipeline itself does not run.
        """
        before = self._evaluator.videos
        cases = [Case(prompt, seed) for prompt, seed in zip(job.prompts, job.seeds, strict=True)]
        try:
            found = self._plain(cases) if job.policy == Policy() else self._tuned(job, cases)
        except torch.AcceleratorError as fault:  # sticky: the process has to be replaced
            raise EvaluationFault(f"the device failed: {_first_line(fault)}") from fault
        except (torch.OutOfMemoryError, MemoryError) as fault:
            found = Found((), unfit=f"it needs more memory: {_first_line(fault)}")
        except (RuntimeError, ValueError, UsageFault) as fault:
            found = Found((), unfit=_first_line(fault))
        if found.unfit and job.policy == Policy():
            raise EvaluationFault(f"the plain pipeline does not run: {found.unfit}")
        return replace(found, videos=self._evaluator.videos - before)

    def stop(self) -> None:
        """Do nothing: a generation in this process runs to its end."""

    def close(self) -> None:
        """Do nothing: the pipeline belongs to the caller."""

    def _plain(self, cases: Sequence[Case]) -> Found:
        """Return what the plain pipeline gives, without running it against itself."""
        return _finite([self._evaluator.plain_values(case) for case in cases], 1.0, 1.0)

    def _tuned(self, job: Job, cases: Sequence[Case]) -> Found:
        """Run a policy on the cases, until it is known to be of no use."""

        def stop(seen: Sequence[Outcome]) -> bool:
            return bool(given_up(job, [o.values for o in seen], _work_ratio(seen)))

        outcomes = list(self._evaluator.run(job.policy, cases, pairs=job.pairs, stop=stop))
        refused = [o.summary.reason for o in outcomes if o.summary.policy_id is None]
        if refused:  # it ran without the policy: nothing was measured of it
            return Found((), unfit=refused[0])
        values = [o.values for o in outcomes]
        pairs = sum(o.baseline_ms is not None for o in outcomes)
        return _finite(values, search_speedup(outcomes), _work_ratio(outcomes), pairs)


def _work_ratio(outcomes: Sequence[Outcome]) -> float:
    return float(np.median([o.summary.work_ratio for o in outcomes]))


def _finite(
    values: Sequence[dict[str, float]], speedup: float, work_ratio: float, pairs: int = 0
) -> Found:
    """Return what was found, unless a video is so broken that a metric has no value."""
    lost = [name for each in values for name, value in each.items() if not math.isfinite(value)]
    if lost:
        return Found((), unfit=f"{lost[0]} of a video is not a number")
    return Found(tuple(values), speedup, work_ratio, pairs=pairs)


def _first_line(fault: BaseException) -> str:
    """Return the first line of an error, or its kind if it says nothing."""
    return str(fault).strip().partition("\n")[0] or type(fault).__name__
