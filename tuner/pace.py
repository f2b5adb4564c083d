"""How fast policies are by all that a study measured, and which of them to prove first.

A trial times a few pairs on a machine that others may share. What it left out is known exactly: so
all trials together say what a forward of each model costs, and what the rest of a call does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from ditune.db.policy import AdaptiveHandoff, MaskCache, Policy
from ditune.db.records import Trial
from ditune.tuner.handoffs import small_steps

_OTHERS_WEIGHT = 3  # how many of its own measurements the other trials are worth to each
_GUESS_WEIGHT = 1e-3  # of a guess before any trial
_TIMED = 5  # masks, after which all are known to be as fast as their work
_WHOLE = {"full", "step"}  # actions that run all blocks of a model, or none


class Pace:
    """Latency as a sum of parts, each a share of the plain call: the rest, and both models' work.

    Fitted to the complete trials of a study with errors relative to each, none of the parts below
    zero.
    """

    def __init__(
        self, trials: Sequence[Trial], sigmas: Sequence[float], outside_blocks: float = 0.0
    ) -> None:
        """Fit what the trials say.

        Args:
            trials: Of one study.
            sigmas: Noise level of each step; without them hand-offs stand for themselves.
            outside_blocks: Share of a forward that is spent outside of its blocks, 0 to 1: where
                hidden states are reused, that is computed in every step.
        """
        self._sigmas = sigmas
        self._outside_blocks = outside_blocks
        speedups, rows = [1.0], [(1.0, 1.0, 0.0)]  # the plain call
        self._masks = 0
        for trial in trials:
            work = self._work(trial.policy, trial.work_ratio)
            timed = trial.state == "complete" and trial.pairs != 0 and trial.policy != Policy()
            if timed and trial.speedup and work:
                speedups.append(trial.speedup)
                rows.append((1.0, *work))
                self._masks += whole_mask(trial.policy)
        # where nothing complete is known, half the work takes half the time
        speedups, rows = [*speedups, 2.0], [*rows, (1.0, 0.5, 0.0)]
        weights = np.array([1.0] * (len(rows) - 1) + [_GUESS_WEIGHT])
        relative = np.array(rows) * np.array(speedups)[:, None] * weights[:, None]
        self._parts = nnls(relative, weights)[0]

    def speedup(self, trial: Trial) -> float:
        """Return a trial's speedup, its noise shrunk towards what its work says."""
        assert trial.speedup is not None  # of a complete trial
        expected = self.expected(trial.policy, trial.work_ratio)
        if expected is None:
            return trial.speedup
        if trial.pairs == 0:
            return expected
        logs = np.log([trial.speedup, expected])
        return float(np.exp(np.average(logs, weights=(1, _OTHERS_WEIGHT))))

    def expected(self, policy: Policy, work_ratio: float | None) -> float | None:
        """Return how fast a policy should be by its work, None where that is not known.

        Args:
            policy: It need not have been tried.
            work_ratio: Blocks asked for / blocks run.
        """
        work = self._work(policy, work_ratio)
        share = 0.0 if work is None else float(np.dot(self._parts, (1.0, *work)))
        return 1.0 / share if share > 0.0 else None

    def foreseen(self, policy: Policy) -> float | None:
        """Return how fast a policy will be where that is known well enough not to time it.

        A mask of whole steps leaves out what it says; a few of them tell what that is worth.
        """
        if self._masks < _TIMED or not whole_mask(policy):
            return None
        assert isinstance(policy.cache, MaskCache)
        computed = policy.cache.actions.count("full")
        return self.expected(policy, len(policy.cache.actions) / computed)

    def _work(self, policy: Policy, work_ratio: float | None) -> tuple[float, float] | None:
        """Return the work of the large and of the small model, in shares of the plain call's steps.

        None where it shows only while the policy runs: blocks of two models do not add up.
        """
        if policy.handoff is None:
            return None if work_ratio is None else (self._with_outside(policy, 1 / work_ratio), 0.0)
        cache, steps = policy.cache, len(self._sigmas)
        if isinstance(policy.handoff, AdaptiveHandoff) or not steps:
            return None
        small = set(small_steps(policy.handoff, self._sigmas))
        computed = set(range(steps))
        if cache is not None:
            if not isinstance(cache, MaskCache) or not _WHOLE.issuperset(cache.actions):
                return None
            computed = {step for step in computed if cache.actions[step] == "full"}
        return len(computed - small) / steps, len(computed & small) / steps

    def _with_outside(self, policy: Policy, blocks_run: float) -> float:
        """Return the share of forwards that is computed where such a share of blocks is."""
        if policy.cache is None or policy.cache.payload.form != "hidden":
            return blocks_run
        return blocks_run + self._outside_blocks * (1.0 - blocks_run)


def whole_mask(policy: Policy) -> bool:
    """Whether a policy is a mask that computes or reuses whole steps, and nothing else."""
    cache = policy.cache
    if policy.handoff is not None or not isinstance(cache, MaskCache):
        return False
    return _WHOLE.issuperset(cache.actions)


def fastest_held(trials: Sequence[Trial], pace: Pace) -> float | None:
    """Return the greatest speedup among the trials that hold every floor, None if none does.

    Args:
        trials: Of one study; the plain pipeline's does not count.
        pace: Of these trials.
    """
    held = [trial for trial in trials if trial.feasible and trial.policy != Policy()]
    return max((pace.speedup(trial) for trial in held), default=None)


def candidates(trials: Sequence[Trial], count: int, pace: Pace) -> list[Trial]:
    """Return the trials to confirm: distinct policies, the fastest first.

    Those that may have been unlucky are among them: where a metric counts, a few dozen videos say
    little, and the proof gives up early on what is wrong.

    Args:
        trials: Of one study.
        count: How many at most.
        pace: Of these trials.
    """
    possible = [
        trial
        for trial in trials
        if trial.state == "complete" and trial.reason is None and trial.policy != Policy()
    ]
    distinct: dict[str, Trial] = {}
    for trial in sorted(possible, key=pace.speedup, reverse=True):
        distinct.setdefault(trial.policy.id, trial)
    return list(distinct.values())[:count]
