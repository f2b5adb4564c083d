"""Hand-offs from a profile: which steps the small model takes, written as noise levels.

`q_k` is how far the small model's guided output lies from the large one's at step k, on latents of
the large one. It says where a hand-off is worth trying, before any video is rendered.
Source: TRACK's disagreement curve, its steps of smallest q_k; SRDiffusion's order for one switch.
"""

from __future__ import annotations

from collections.abc import Sequence

from ditune.db.policy import (
    MAX_SIGMA,
    AdaptiveHandoff,
    BandedHandoff,
    Handoff,
    HandoffPolicy,
    Policy,
)

_PLATEAU = 0.25  # of the way from the smallest to the greatest disagreement


def edge(sigmas: Sequence[float], step: int) -> float:
    """Return a noise level between a step and the one before it; above all, or 0 below all.

    Schedules that begin at no signal at all have no level above their first step that a policy can
    hold: what is returned then lies between the first two.
    """
    if step == 0:
        return min(sigmas[0] + (sigmas[0] - sigmas[1]) / 2.0, MAX_SIGMA)
    if step == len(sigmas):
        return 0.0
    return min((sigmas[step - 1] + sigmas[step]) / 2.0, MAX_SIGMA)


def switched(
    sigmas: Sequence[float], large_steps: int, *, head_steps: int = 0, tail_steps: int = 0
) -> Handoff | BandedHandoff | None:
    """Return the hand-off after some steps of the large model.

    The small model may run the first steps too, and the large one come back for the last ones. None
    where no step is left to the small model, or none before the tail is the large one's.

    Args:
        sigmas: Noise level of every step, falling.
        large_steps: Of the large model, the tail among them.
        head_steps: How many of the small one come first.
        tail_steps: How many of the large one come at the end.
    """
    steps = len(sigmas)
    if not tail_steps < large_steps < steps or head_steps + large_steps > steps:
        return None
    switch, back = head_steps + large_steps - tail_steps, steps - tail_steps
    if head_steps > 0:
        return _banded(sigmas, [(0, head_steps), (switch, back)])
    until = edge(sigmas, back) if tail_steps > 0 else None
    return Handoff(sigma=edge(sigmas, switch), until=until)


def ranked(
    sigmas: Sequence[float], disagreement: Sequence[float], large_steps: int
) -> BandedHandoff | None:
    """Return the hand-off that leaves the steps of greatest disagreement to the large model.

    Of all choices of so many steps it adds up the least squared disagreement.
    """
    steps = len(sigmas)
    if not 0 <= large_steps < steps:
        return None
    by_disagreement = sorted(range(steps), key=lambda step: (disagreement[step], -step))
    taken = set(by_disagreement[: steps - large_steps])
    starts = [step for step in sorted(taken) if step - 1 not in taken]
    ends = [step + 1 for step in sorted(taken) if step + 1 not in taken]
    return _banded(sigmas, list(zip(starts, ends, strict=True)))


def _banded(sigmas: Sequence[float], ranges: Sequence[tuple[int, int]]) -> BandedHandoff | None:
    """Return the hand-off of some ranges of steps, without those that no noise level can bound."""
    edges = [(edge(sigmas, start), edge(sigmas, end)) for start, end in ranges]
    bands = tuple((upper, lower) for upper, lower in edges if upper > lower)
    return BandedHandoff(bands=bands) if bands else None


def small_steps(handoff: HandoffPolicy | None, sigmas: Sequence[float]) -> list[int]:
    """Return the steps that the small model takes, none where that shows only while it runs."""
    if handoff is None or isinstance(handoff, AdaptiveHandoff):
        return []
    return [step for step, sigma in enumerate(sigmas) if handoff.takes(sigma)]


def large_window(policy: Policy, sigmas: Sequence[float]) -> range | None:
    """Return the steps of the large model in a hand-off without a cache, if they lie together."""
    small = set(small_steps(policy.handoff, sigmas))
    large = [step for step in range(len(sigmas)) if step not in small]
    together = bool(large) and len(large) == large[-1] - large[0] + 1
    if policy.cache is not None or not small or not together:
        return None
    return range(large[0], large[-1] + 1)


def first_guess(disagreement: Sequence[float]) -> int | None:
    """Return after how many steps to hand over first: where the disagreement has settled.

    None where it is low from the start. The first steps decide the most however well the two agree
    there, so that such a curve says nothing about the switch.
    """
    low, high = min(disagreement), max(disagreement)
    settled = (k for k, q in enumerate(disagreement) if q <= low + _PLATEAU * (high - low))
    return next(settled) or None


def latest(disagreement: Sequence[float]) -> int:
    """Return after how many steps at most, of the later half: where the two agree best.

    Waiting longer buys nothing more. Whatever comes before the middle is no such place.
    """
    steps = len(disagreement)
    return max(1, min(range(steps // 2, steps), key=lambda step: disagreement[step]))
