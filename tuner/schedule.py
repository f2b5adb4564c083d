"""Which steps to compute, by dynamic programming on what plain trajectories show.

A reused step continues the outputs of the last two computed steps in a line. How far the latents
are off when the next step is computed follows, for every pair of computed steps and every next one,
from the inner products of one trajectory. The squares of these errors, weighted with how much an
error of that time matters, add up to the cost of a schedule. Its minimum over all schedules of a
given number of steps is found exactly: after two computed steps, what comes does not depend on how
one got there.

Errors of different gaps are taken not to cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ditune.profiler.trajectory import Trajectory
from ditune.tuner.masks import arc_length

_FADES = 4  # power with which the weight of early errors falls


def gains(steps: int, early: float) -> np.ndarray:
    """Return how much an error of the latents counts at each step, relative to a late one.

    Source: RA-CFGCache fits measured gains with such a power of what is left of the trajectory; on
    the miniature, a forecast's error grows 11 times on average if made at the first of 50 steps, 5
    times at the ninth, 2 times at the 23rd, and not at all from the 34th on.

    Args:
        steps: Of the trajectory.
        early: By how much an error in the very beginning counts more than one at the end, >= 0.
    """
    left: np.ndarray = 1.0 - np.arange(steps + 1) / steps
    return 1.0 + early * left**_FADES


def arc_length_of(trajectories: Sequence[Trajectory]) -> tuple[float, ...] | None:
    """Return how far outputs have travelled at each step, mean over one or more trajectories."""
    return arc_length(np.mean([t.changes for t in trajectories], axis=0).tolist())


class Gaps(NamedTuple):
    """The gaps between a schedule's computed steps, in order; each array has one value for each."""

    where: np.ndarray  # the step in the middle of each
    reused: np.ndarray  # how many steps each reuses
    squared: np.ndarray  # error of the latents after it


class StepSchedules:
    """Proposes steps to compute, for any budget, from some plain trajectories."""

    def __init__(
        self, trajectories: Sequence[Trajectory], arc_length: Sequence[float] | None = None
    ) -> None:
        """Tabulate the error of every gap for every pair of computed steps before it.

        Args:
            trajectories: One or more, all of the same number of steps.
            arc_length: What forecasts run over; the steps' numbers by default.
        """
        self.steps = trajectories[0].steps
        axis = np.arange(self.steps) if arc_length is None else arc_length
        each = [_squared_errors(t, np.asarray(axis, dtype=float)) for t in trajectories]
        self._errors: np.ndarray = np.mean(each, axis=0)
        after = np.arange(self.steps)
        self._middle: np.ndarray = (after[:, None] + np.arange(self.steps + 1)) // 2  # of a gap
        self._known: dict[float, list[tuple[int, ...]]] = {}

    def computed(self, budget: int, early: float = 0.0) -> list[int]:
        """Return the best steps to compute, in order; the first step is always one of them.

        Args:
            budget: How many, from 1 to the number of steps.
            early: See `gains`; more moves computed steps towards the beginning.
        """
        if early not in self._known:
            self._known[early] = self.frontier(gains(self.steps, early) ** 2)
        return list(self._known[early][budget - 1])

    def frontier(
        self, weights: np.ndarray, powers: np.ndarray | float = 0.0, most: int | None = None
    ) -> list[tuple[int, ...]]:
        """Return the best steps to compute for every budget from 1 on.

        Args:
            weights: How much a squared error counts that is made at each step, or after the last
                one [steps + 1].
            powers: Of the number of steps that a gap reuses, with which its error counts more;
                one for all, or one for each step [steps + 1].
            most: The greatest budget; by default all steps.
        """
        steps = self.steps
        powers = np.broadcast_to(powers, steps + 1)
        after = np.arange(steps)
        reused = np.maximum(np.arange(steps + 1) - after[:, None] - 1, 1)
        gap = self._errors * weights[self._middle] * reused ** powers[self._middle]
        # best[a, b]: least cost of a schedule that begins with step 0 and ends with a and b so far
        best = np.full((steps, steps), np.inf)
        best[0, 0] = 0.0
        earlier: list[np.ndarray] = []
        found = []
        for _ in range(steps if most is None else most):
            total = best + gap[:, :, steps]
            found.append(_chosen(earlier, int(total.argmin()), steps))
            through = best[:, :, None] + gap[:, :, :steps]
            through[:, after[:, None] >= after[None, :]] = np.inf  # the next one comes later
            earlier.append(through.argmin(axis=0))
            best = through.min(axis=0)
        return found

    def errors(self, computed: Sequence[int]) -> Gaps:
        """Return the gaps of a schedule and their errors.

        Args:
            computed: The steps that are computed, in order, the first one among them.
        """
        before, stops = [computed[0], *computed[:-1]], [*computed[1:], self.steps]
        index = (np.array(before), np.array(computed), np.array(stops))
        return Gaps(self._middle[index[1:]], index[2] - index[1] - 1, self._errors[index])


def _chosen(earlier: Sequence[np.ndarray], last: int, steps: int) -> tuple[int, ...]:
    """Return the schedule that ends with a pair of computed steps, from what came before each."""
    first, second = divmod(last, steps)
    chosen = [second]
    for origin in reversed(earlier):
        chosen.append(first)
        first, second = int(origin[first, second]), first
    return tuple(sorted(set(chosen)))


def _squared_errors(trajectory: Trajectory, axis: np.ndarray) -> np.ndarray:
    """Return the mean squared error of the latents when a step is computed next: [a, b, next].

    Steps a <= b are the last two computed ones; a == b stands for one alone, which is reused as it
    is. The next one may be the end of the trajectory. Scaled so that every prompt counts the same.
    """
    steps = trajectory.steps
    gram = trajectory.gram[:steps, :steps] / np.trace(trajectory.gram[:steps, :steps]) * steps
    widths = np.diff(np.append(trajectory.sigmas, 0.0))
    # travelled[k]: what the steps before k add to the latents, as a sum of outputs
    travelled = np.tril(np.broadcast_to(widths, (steps + 1, steps)), -1)
    across, whole = travelled @ gram, travelled @ gram @ travelled.T
    size, reach = np.append(0.0, np.cumsum(widths)), np.append(0.0, np.cumsum(widths * axis))
    first, second, step = np.ogrid[:steps, :steps, : steps + 1]
    start = np.minimum(second + 1, step)  # the first reused step
    width = size[step] - size[start]
    apart = np.where(second > first, axis[second] - axis[first], 1.0)
    slope = np.where(second > first, (reach[step] - reach[start] - axis[second] * width) / apart, 0)
    # the error is travelled[step] - travelled[start] - ahead out[second] + slope out[first]
    ahead = width + slope
    squared = (
        whole[step, step]
        - 2.0 * whole[step, start]
        + whole[start, start]
        + ahead**2 * gram[second, second]
        + slope**2 * gram[first, first]
        - 2.0 * ahead * (across[step, second] - across[start, second])
        + 2.0 * slope * (across[step, first] - across[start, first])
        - 2.0 * ahead * slope * gram[second, first]
    )
    reused = (step > second + 1) & (second >= first)
    errors: np.ndarray = np.where(reused, np.maximum(squared, 0.0), 0.0)
    return errors
