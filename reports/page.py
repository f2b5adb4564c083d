"""The page: one self-contained HTML file that needs no network and runs no script but its own.

Prompts and names are foreign text. Jinja escapes them, `words.visible` spells out what would act in
them, charts get them as JSON, and the content security policy forbids every other script.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ditune import __version__
from ditune.db.files import write_atomically
from ditune.db.records import MaskCache, Policy
from ditune.reports import charts, gather, summary, words
from ditune.reports.clip import shown_clips
from ditune.reports.content import ReportContent
from ditune.reports.figures import ACTION_HEIGHT
from ditune.reports.frames import shown_strips

_TEMPLATES = Path(__file__).parent / "templates"
_SCRIPTS = ("plotly-cartesian.min.js", "page.js")
_PLOT_CONFIG = {  # plotly's default shows a button that uploads the chart
    "showSendToCloud": False,
    "displaylogo": False,
    "displayModeBar": False,
    "responsive": True,
}
_PROMPT_LIMIT = 600


def render(content: ReportContent) -> str:
    """Return the page as HTML.

    Args:
        content: Records and frames; every text in them is taken for hostile.
    """
    scripts = [_asset(name) for name in _SCRIPTS]
    drawn = charts.charts(content)
    template = _environment().get_template("page.html")
    return template.render(
        csp=_security_policy(scripts),
        style=Markup(_asset("page.css")),
        scripts=[Markup(script) for script in scripts],
        plots={"config": _PLOT_CONFIG, "figures": {k: c.figure for k, c in drawn.items()}},
        charts=drawn,
        version=__version__,
        **_result(content),
        **_evidence(content),
    )


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
    steps = content.study.settings.workload.steps
    best = gather.best_seen(content) if chosen is None else None
    policy = chosen.policy if chosen is not None else best.policy if best is not None else None
    return {
        "study": content.study,
        "headline": summary.headline(content),
        "summary": summary.summary(content),
        "chosen": chosen,
        "best": best,
        "best_seen": summary.best_seen_in_words(content),
        "policy_words": words.policy_in_words(policy, steps) if policy is not None else "",
        "cells": gather.strip(policy, content.profile) if policy is not None else (),
        "steps_words": summary.steps_in_words(policy, content) if policy is not None else "",
        "legend": _legend(policy),
        "action_height": ACTION_HEIGHT,
    }


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
        "profile_words": summary.profile_in_words(content.profile),
        "trials": charts.trials_table(content),
        "trials_given": len(content.trials),
        "groups": summary.conditions(content),
    }


def _legend(policy: Policy | None) -> list[tuple[str, str]]:
    """Return the actions that occur in a mask with how often, for the strip."""
    if policy is None or not isinstance(policy.cache, MaskCache):
        return []
    counts = words.action_counts(policy.cache)
    return [(a, words.counted_action(a, count)) for a, count in counts.items() if count]


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_readable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "factor": words.factor,
        "interval": words.interval,
        "number": words.number,
        "duration": words.duration,
        "prompt": lambda text: words.shortened(text, _PROMPT_LIMIT),
        "brief": lambda text: words.shortened(text, 120),
    }
    return environment


def _readable(value: object) -> object:
    """Spell out control and reordering characters in every text that a template puts in."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return words.visible(value)
    return value


def _asset(name: str) -> str:
    """Return a file of the templates folder, with plain newlines as browsers hash them."""
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _security_policy(scripts: list[str]) -> str:
    hashes = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{found}'" for found in hashes)
    return (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; media-src data:; "
        f"style-src 'unsafe-inline'; script-src {allowed}"
    )
