"""The frame of every page: one self-contained HTML file that needs no network.

Names and prompts are foreign text. Jinja escapes them, `words.visible` spells out what would act in
them, charts get them as JSON, and the content security policy forbids every script but ours.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ditune import __version__
from ditune.reports import words
from ditune.reports.charts import Chart

_TEMPLATES = Path(__file__).parent / "templates"
_SCRIPTS = ("plotly-cartesian.min.js", "page.js")
_PLOT_CONFIG = {  # plotly's default shows a button that uploads the chart
    "showSendToCloud": False,
    "displaylogo": False,
    "displayModeBar": False,
    "responsive": True,
}
_PROMPT_LIMIT = 600


def document(template: str, charts: Mapping[str, Chart], **values: Any) -> str:
    """Return a page as HTML.

    Args:
        template: A file of the templates folder that extends `base.html`.
        charts: What it draws, by key.
        values: What else it shows; every text is taken for hostile.
    """
    scripts = [_asset(name) for name in _SCRIPTS]
    return (
        _environment()
        .get_template(template)
        .render(
            csp=_security_policy(scripts),
            style=Markup(_asset("page.css")),
            scripts=[Markup(script) for script in scripts],
            plots={"config": _PLOT_CONFIG, "figures": {k: c.figure for k, c in charts.items()}},
            charts=charts,
            version=__version__,
            **values,
        )
    )


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
