"""Explicit step masks from a redundancy profile: pure functions of numbers.

The denoising change per step is a density: steps are computed where equal shares of it have
accumulated, so that a mask spends its budget where the trajectory moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ditune.db.policy import Action
from ditune.db.records import StepRedundancy

_UNKNOWN_CHANGE = 1.0
_LEAST_CHANGE = 1e-3  # of the mean: an axis has to rise


def densities(redundancy: Sequence[StepRedundancy], steps: int) -> list[float]:
    """Return the relative change of every step, mean 1; a flat line where nothing is known.

    The first step has no step before it and takes its neighbour's value.
    """
    changes = [step.step_change for step in redundancy]
    known = [change for change in changes if change is not None]
    if len(changes) != steps or not known or sum(known) <= 0:
        return [_UNKNOWN_CHANGE] * steps
    mean = sum(known) / len(known)
    filled = [change if change is not None else known[0] for change in changes]
    return [value / mean for value in filled]


def arc_length(changes: Sequence[float]) -> tuple[float, ...] | None:
    """Return how far the output has travelled at each step, None where it moves at an even pace.

    Over this axis the pace is even, and a line through two outputs reaches further than over the
    steps' numbers.

    Args:
        changes: From each step to the next, non-negative, in any unit.
    """
    if len(set(changes)) < 2:
        return None
    mean = sum(changes) / len(changes)
    paces = (max(change / mean, _LEAST_CHANGE) for change in changes)
    return tuple(round(value, 4) for value in accumulate(paces, initial=0.0))


def place(density: Sequence[float], budget: int, warmup: int, cooldown: int) -> list[int]:
    """Return which steps to compute in full: the protected ends, then equal shares of density.

    Args:
        density: Non-negative weight per step.
        budget: How many steps to compute in all; the protected ends are never given up.
        warmup: Steps at the start that are always computed, at least one.
        cooldown: Steps at the end that are always computed.

    Returns:
        Step indices in order.
    """
    steps = len(density)
    start, end = min(max(warmup, 1), steps), max(steps - cooldown, max(warmup, 1))
    chosen = list(range(start)) + list(range(min(end, steps), steps))
    free = min(budget - len(chosen), end - start)
    if free <= 0:
        return sorted(set(chosen))
    total = sum(density[start:end])
    reached, taken = 0.0, 0
    for step in range(start, end):
        reached += density[step]
        left, open_steps = free - taken, end - step
        due = reached >= total * (taken + 1) / (free + 1) - 1e-12
        if left and (due or open_steps <= left):
            chosen.append(step)
            taken += 1
    return sorted(set(chosen))


def mask(
    steps: int, computed: Sequence[int], cfg_share: float, block_share: float
) -> tuple[Action, ...]:
    """Return the action of every step; part of the reused steps is only half reused.

    Reuse is worst where it is oldest. The oldest `block_share` of the reused steps run their outer
    blocks, the next oldest `cfg_share` compute the conditional branch.
    """
    actions: list[Action] = ["step"] * steps
    for step in computed:
        actions[step] = "full"
    ages, age = {}, 0
    for step in range(steps):
        age = 0 if actions[step] == "full" else age + 1
        if age:
            ages[step] = age
    oldest = sorted(ages, key=lambda step: (-ages[step], step))
    blocks = round(block_share * len(oldest))
    cfgs = round(cfg_share * len(oldest))
    for step in oldest[:blocks]:
        actions[step] = "block"
    for step in oldest[blocks : blocks + cfgs]:
        actions[step] = "cfg"
    return tuple(actions)
