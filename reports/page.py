"""The page of one study: its result, its policy, its proof, and the conditions of all three."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ditune.db.files import write_atomically
from ditune.db.policy import MaskCache, Policy
from ditune.reports import charts, gather, summary, words
from ditune.reports.clip import shown_clips
from ditune.reports.content import ReportContent
from ditune.reports.document import document
from ditune.reports.figures import ACTION_HEIGHT
from ditune.reports.frames import shown_strips


def render(content: ReportContent) -> str:
    """Return the page as HTML.

    Args:
        content: Records and frames; every text in them is taken for hostile.
    """
    shown = {**_result(content), **_evidence(content)}
    return document("page.html", charts.charts(content), **shown)


def write(content: ReportContent, path: Path) -> None:
    """Write the page; an existing file stays whole until the new one is complete.

    Args:
        content: What to show.
        path: The file; its folder must exist.

    Raises:
        UsageFault: The folder is missing or cannot be written, or the path is a folder.
        StoreFault: The disk is full; an older report is untouched.
    """
    write_atomically(path, render(content).encode("utf-8"))


def _result(content: ReportContent) -> dict[str, Any]:
    """Return what the first screen says: the result and the policy."""
    chosen = content.chosen
    best = gather.best_seen(content) if chosen is None else None
    policy = chosen.policy if chosen is not None else best.policy if best is not None else None
    return {
        "study": content.study,
        "headline": summary.headline(content),
        "summary": summary.summary(content),
        "chosen": chosen,
        "best": best,
        "best_seen": summary.best_seen_in_words(content),
        "policy_words": _policy_in_words(policy, content) if policy is not None else "",
        "cells": gather.strip(policy, content.profile) if policy is not None else (),
        "steps_words": summary.steps_in_words(policy, content) if policy is not None else "",
        "legend": _legend(policy),
        "action_height": ACTION_HEIGHT,
    }


def _policy_in_words(policy: Policy, content: ReportContent) -> str:
    said = words.policy_in_words(policy, content.study.settings.workload.steps)
    if content.cache_bytes is None:
        return said
    return f"{said} Its caches hold {words.memory(content.cache_bytes)}."


def _evidence(content: ReportContent) -> dict[str, Any]:
    """Return what backs the result up: quality, frames, trials and conditions."""
    settings, fewer = content.study.settings, content.fewer_steps
    evidence = content.chosen.evidence if content.chosen is not None else None
    given = [strip for strip in content.frames if len(strip.before) and len(strip.after)]
    strips = shown_strips(given)
    return {
        "rows": gather.quality_rows(settings, evidence.quality, evidence.bound_by)
        if evidence is not None
        else (),
        "fewer": fewer,
        "fewer_rows": gather.quality_rows(settings, (fewer.quality or {}) if fewer else {}),
        "strips": tuple(zip(strips, shown_clips(given[: len(strips)]), strict=True)),
        "strips_given": len(content.frames),
        "searched": summary.searched_in_words(evidence),
        "cost": words.cost_in_words(content.cost) if content.cost is not None else "",
        "agreement": summary.agreement_in_words(content),
        "profile_words": summary.profile_in_words(content.profile),
        "trials": charts.trials_table(content),
        "ways": charts.ways_table(content),
        "tiers": charts.tiers_table(content.tiers),
        "trials_given": len(content.trials),
        "groups": summary.conditions(content),
    }


def _legend(policy: Policy | None) -> list[tuple[str, str]]:
    """Return the actions that occur in a mask with how often, for the strip."""
    if policy is None or not isinstance(policy.cache, MaskCache):
        return []
    counts = words.action_counts(policy.cache)
    return [(a, words.counted_action(a, count)) for a, count in counts.items() if count]
