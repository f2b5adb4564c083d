"""Which steps to compute, by dynamic programming on what plain trajectories show.

A reused step is a line through the outputs of the last two computed steps. How far that line is
from the true output is known for every pair of computed steps from the inner products of one
trajectory; weighted with the solver's step width it is the error that the step adds to the latents.
The sum of these errors is the cost of a schedule, and its minimum over all schedules of a given
number of steps is found exactly: after two computed steps, what comes does not depend on how one
got there.

First order: what the model makes of an error later is left out, and errors are not taken to cancel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ditune.profiler.trajectory import Trajectory


class StepSchedules:
    """Proposes steps to compute, for any budget, from some plain trajectories."""

    def __init__(self, trajectories: Sequence[Trajectory]) -> None:
        """Tabulate the error of every step for every pair of computed steps before it.

        Args:
            trajectories: One or more, all of the same number of steps.
        """
        self.steps = trajectories[0].steps
        self._errors = np.sqrt(np.mean([_squared_errors(t) for t in trajectories], axis=0))

    def computed(self, budget: int, tilt: float = 0.0) -> list[int]:
        """Return the best steps to compute, in order; the first step is always one of them.

        Args:
            budget: How many, from 1 to the number of steps.
            tilt: Weighs errors by exp(tilt) more at the last step than at the first: positive
                values move computed steps towards the end.
        """
        steps = self.steps
        weight = np.exp(tilt * np.linspace(-0.5, 0.5, steps))
        # gap[a, b, c]: errors of the steps between b and c, when a and b are the last two computed
        summed = np.cumsum(self._errors * weight, axis=2)
        gap = np.concatenate([np.zeros((steps, steps, 1)), summed], axis=2)
        after = np.arange(steps)
        gap -= gap[:, after, after + 1][:, :, None]
        # best[a, b]: least cost of a schedule that begins with step 0 and ends with a and b so far
        best = np.full((steps, steps), np.inf)
        best[0, 0] = 0.0
        earlier = []
        for _ in range(budget - 1):
            through = best[:, :, None] + gap[:, :, :steps]
            through[:, after[:, None] >= after[None, :]] = np.inf  # the next one comes later
            earlier.append(through.argmin(axis=0))
            best = through.min(axis=0)
        total = best + gap[:, :, steps]
        first, second = np.unravel_index(int(total.argmin()), total.shape)
        chosen = [int(second)]
        for origin in reversed(earlier):
            chosen.append(int(first))
            first, second = origin[first, second], first
        return sorted(set(chosen))


def _squared_errors(trajectory: Trajectory) -> np.ndarray:
    """Return the mean squared error that a reused step adds to the latents: [a, b, step].

    Steps a <= b are the last two computed ones; a == b stands for one alone, which is reused as it
    is. Scaled so that every prompt counts the same.
    """
    steps = trajectory.steps
    gram = trajectory.gram[:steps, :steps] / np.trace(trajectory.gram[:steps, :steps]) * steps
    widths = np.diff(np.append(trajectory.sigmas, 0.0))
    first, second, step = np.ogrid[:steps, :steps, :steps]
    apart = np.maximum(second - first, 1)
    slope = np.where(second > first, (step - second) / apart, 0.0)
    # the error is out[step] - (1 + slope) out[second] + slope out[first]
    ahead = 1.0 + slope
    squared = (
        gram[step, step]
        + ahead**2 * gram[second, second]
        + slope**2 * gram[first, first]
        - 2.0 * ahead * gram[step, second]
        + 2.0 * slope * gram[step, first]
        - 2.0 * ahead * slope * gram[second, first]
    )
    squared = np.where((step > second) & (second >= first), np.maximum(squared, 0.0), 0.0)
    scaled: np.ndarray = squared * widths**2
    return scaled
