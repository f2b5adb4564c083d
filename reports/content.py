"""What one report shows: records, and frames that are too big to be records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ditune.db.cost import Cost
from ditune.db.record import Status
from ditune.db.records import Constraint, Interval, PolicyFile, Profile, Quality, Study, Trial


@dataclass(frozen=True, eq=False)
class FrameStrip:
    """The frames of one prompt, without and with the policy.

    Attributes:
        prompt: What was asked for; shown as it is, never interpreted.
        before: Frames of the plain pipeline, [frames, height, width, 3] uint8.
        after: Frames under the policy from the same seed, same shape.
    """

    prompt: str
    before: np.ndarray
    after: np.ndarray


@dataclass(frozen=True)
class FewerSteps:
    """The rival that needs no policy: the plain pipeline with fewer steps.

    Attributes:
        steps: How many steps it took, the fewest that were tried against the same floors.
        speedup: Against the plain pipeline with all its steps; None if it was not timed.
        quality: Per constraint; None if it was not scored.
        status: How its numbers came about.
    """

    steps: int
    speedup: Interval | None = None
    quality: Mapping[str, Quality] | None = None
    status: Status = "measured"


@dataclass(frozen=True)
class Expected:
    """What a policy's speedup should be by the work it leaves out, and what takes no part in it.

    Attributes:
        work_ratio: Blocks asked for / blocks run.
        speedup: Plain / tuned if only the transformer's time shrinks with its work.
        parts_ms: Milliseconds of one plain call by part.
    """

    work_ratio: float
    speedup: float
    parts_ms: Mapping[str, float]


@dataclass(frozen=True)
class TierShown:
    """One of several trade-offs of a run.

    Attributes:
        name: Under which it is looked up.
        floors: What it was asked to hold.
        chosen: The policy that held on unseen prompts; None if none did.
    """

    name: str
    floors: tuple[Constraint, ...]
    chosen: PolicyFile | None


@dataclass(frozen=True, eq=False)
class ReportContent:
    """Everything that one page is made of.

    Attributes:
        study: The search and its settings.
        profile: What the plain pipeline costs, and where its steps repeat.
        trials: Every policy tried, in order.
        chosen: The policy that held on unseen prompts; None if none did.
        frames: Before and after, a few prompts; may be empty.
        fewer_steps: The baseline of fewer steps; None if it was not run.
        cache_bytes: What the chosen policy's caches hold; None if that is not known.
        expected: What its work lets expect; None if that is not known.
        tiers: The trade-offs of the run, in order; all else is about that of the study.
        cost: What the whole session took; None if that is not known.
    """

    study: Study
    profile: Profile
    trials: tuple[Trial, ...]
    chosen: PolicyFile | None
    frames: tuple[FrameStrip, ...] = ()
    fewer_steps: FewerSteps | None = None
    cache_bytes: int | None = None
    expected: Expected | None = None
    tiers: tuple[TierShown, ...] = ()
    cost: Cost | None = None
