"""Turn what a session found into what a report shows."""

from __future__ import annotations

import numpy as np

from ditune.reports.content import FewerSteps, FrameStrip, ReportContent
from ditune.tuner.session import Result


def content_of(result: Result) -> ReportContent:
    """Return the report's content; frames become 8-bit."""
    return ReportContent(
        study=result.study,
        profile=result.profile,
        trials=result.trials,
        chosen=result.policy_file,
        frames=tuple(
            FrameStrip(pair.prompt, _eight_bit(pair.plain), _eight_bit(pair.tuned))
            for pair in result.frames
        ),
        fewer_steps=_fewer_steps(result),
    )


def _fewer_steps(result: Result) -> FewerSteps | None:
    found = result.fewer_steps
    if found is None:
        return None
    return FewerSteps(found.steps, found.speedup, found.quality or None)


def _eight_bit(video: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(video * 255.0 + 0.5, 0, 255), dtype=np.uint8)
