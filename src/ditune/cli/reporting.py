"""Turn what a session found into what a report shows."""

from __future__ import annotations

import numpy as np

from ditune.accel.memory import planned_bytes
from ditune.profiler.parts import parts_of, speedup_of_work
from ditune.reports.content import Expected, FewerSteps, FrameStrip, ReportContent, TierShown
from ditune.tuner.result import Result


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
        cache_bytes=_cache_bytes(result),
        expected=_expected(result),
        tiers=shown_tiers(result),
        cost=result.cost,
    )


def shown_tiers(result: Result) -> tuple[TierShown, ...]:
    """Return the tiers of a run as tables show them; empty where none was asked for."""
    return tuple(
        TierShown(name, tier.study.settings.constraints, tier.policy_file)
        for name, tier in result.tiers.items()
    )


def _expected(result: Result) -> Expected | None:
    found, parts = result.policy_file, parts_of(result.profile)
    tried = [t for t in result.trials if found is not None and t.policy == found.policy]
    ratios = [t.work_ratio for t in tried if t.work_ratio is not None]
    if parts is None or found is None or found.policy.handoff is not None or not ratios:
        return None
    shown = {
        "transformer": parts.transformer_ms,
        "text encoder": parts.text_encoder_ms,
        "decoder": parts.decoder_ms,
        "everything else": parts.rest_ms,
    }
    return Expected(ratios[0], speedup_of_work(parts, ratios[0]), shown)


def _cache_bytes(result: Result) -> int | None:
    sizes, found = result.profile.forward_bytes, result.policy_file
    if sizes is None or found is None or found.policy.cache is None:
        return None
    return planned_bytes(found.policy.cache, sizes)


def _fewer_steps(result: Result) -> FewerSteps | None:
    found = result.fewer_steps
    if found is None:
        return None
    return FewerSteps(found.steps, found.speedup, found.quality or None)


def _eight_bit(video: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(video * 255.0 + 0.5, 0, 255), dtype=np.uint8)
