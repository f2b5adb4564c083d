"""The page of a comparison with peers: standings at each floor, and what every setting gave."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from ditune.db.comparison import Comparison, Contender, Lead, Standing
from ditune.db.files import write_atomically
from ditune.db.records import Constraint
from ditune.reports.charts import NONE, Chart, Table
from ditune.reports.document import document
from ditune.reports.figures import Figure, drawing, label, plot_layout
from ditune.reports.words import factor, interval, metric_label, moment, number, unit_of

OURS = "ditune"
_SHOWN_FROM = 0.7  # of the lowest floor: what lies below is no choice for anybody
_LOOKS = [  # colour and symbol of each peer in turn; shapes tell apart what colours repeat
    (f"var(--{colour})", symbol)
    for symbol in ("circle", "square", "diamond")
    for colour in ("full", "step", "block", "muted")
]


def render(comparison: Comparison) -> str:
    """Return the page as HTML; every text in the comparison is taken for hostile."""
    metrics = list(comparison.contenders[0].quality) if comparison.contenders else []
    charts = {c.key: c for c in (_pareto(comparison, metric) for metric in metrics)}
    return document(
        "rivals.html",
        charts,
        comparison=comparison,
        headline=_headline(comparison),
        leads=[_lead_in_words(lead) for lead in comparison.leads],
        standings=[
            (_floors_in_words(floors), _standings(found, metrics))
            for floors, found in _by_floors(comparison.standings)
        ],
        conditions=_conditions(comparison),
    )


def write(comparison: Comparison, path: Path) -> None:
    """Write the page; an existing file stays whole until the new one is complete.

    Raises:
        UsageFault: The folder is missing or cannot be written, or the path is a folder.
        StoreFault: The disk is full; an older page is untouched.
    """
    write_atomically(path, render(comparison).encode("utf-8"))


def _headline(comparison: Comparison) -> str:
    if not comparison.leads:
        return "Nothing was compared"
    behind = [lead for lead in comparison.leads if lead.speed.median < 1.0]
    least = min(lead.speed.median for lead in comparison.leads)
    most = max(lead.speed.median for lead in comparison.leads)
    if behind:
        return f"ditune against its peers: {factor(least)} to {factor(most)} as fast as the best"
    same = factor(least) == factor(most)
    span = factor(least) if same else f"{factor(least)} to {factor(most)}"
    return f"{span} as fast as the best peer at the same quality"


def _lead_in_words(lead: Lead) -> str:
    return (
        f"{_floors_in_words(lead.floors)}: {factor(lead.work.median)} less work than "
        f"{lead.best_by_work} ({interval(lead.work)}), {factor(lead.speed.median)} as fast as "
        f"{lead.best_by_speed} ({interval(lead.speed)})."
    )


def _floors_in_words(floors: Sequence[Constraint]) -> str:
    said = []
    for each in floors:
        unit = unit_of(each)
        said.append(f"{metric_label(each)} ≥ {number(each.floor)}{f' {unit}' if unit else ''}")
    return ", ".join(said)


def _by_floors(
    standings: Sequence[Standing],
) -> list[tuple[tuple[Constraint, ...], list[Standing]]]:
    found: dict[tuple[Constraint, ...], list[Standing]] = {}
    for standing in standings:
        found.setdefault(standing.floors, []).append(standing)
    return list(found.items())


def _standings(found: Sequence[Standing], metrics: Sequence[str]) -> Table:
    """Return one row per peer, the one of least work first."""

    def row(standing: Standing) -> tuple[str, ...]:
        if standing.setting is None:
            empty = (NONE,) * (4 + len(metrics))
            return (standing.peer, standing.reason, *empty, "")
        values = [standing.quality[metric] for metric in metrics]
        return (
            standing.peer,
            standing.setting,
            factor(standing.work_ratio.median),
            interval(standing.work_ratio),
            factor(standing.speedup.median),
            interval(standing.speedup),
            *(f"{number(seen.mean)} / {number(seen.worst)}" for seen in values),
            "held" if standing.holds else "not held",
        )

    columns = [f"{_name(metric)}, mean / worst" for metric in metrics]
    head = ("peer", "setting", "work", "95 %", "speed", "95 %", *columns, "floors")
    ordered = sorted(found, key=lambda standing: -standing.work_ratio.median)
    return Table(head, tuple(row(s) for s in ordered), frozenset({0, 1, len(head) - 1}))


def _conditions(comparison: Comparison) -> list[tuple[str, str]]:
    hardware, workload = comparison.hardware, comparison.workload
    software = ", ".join(f"{name} {value}" for name, value in comparison.software)
    return [
        ("hardware", f"{hardware.device_name}, {hardware.capability}, {hardware.cores} cores"),
        ("threads", str(comparison.threads)),
        ("software", software),
        ("pipeline", f"{workload.pipeline_class}, {workload.steps} steps, {workload.dtype}"),
        ("size", f"{workload.width}x{workload.height}, {workload.frames} frames"),
        ("settings swept on", f"{comparison.calibration} prompts"),
        ("proved on", f"{comparison.confirmation} further videos"),
        ("measured on", f"{comparison.held_out} held-out videos, all peers in turn on each"),
        ("when", moment(comparison.created_at)),
    ]


# --- chart ---------------------------------------------------------------------------------------


def _pareto(comparison: Comparison, metric: str) -> Chart:
    """Return the chart of one metric: every setting swept, and what stood on held-out prompts."""
    peers = list(dict.fromkeys(c.peer for c in comparison.contenders))
    floors = {c for s in comparison.standings for c in s.floors if c.statistic == "mean"}
    shown = [c for c in comparison.contenders if _worth_showing(c, floors)]
    stood = [s for s in comparison.standings if s.setting is not None]
    said = (
        f"Every setting that was swept, on one calibration prompt: {len(shown)} of "
        f"{len(comparison.contenders)} are drawn, the others lie far below every floor. Stars are "
        "ditune's policies and rings the peers' settings that were proved, on held-out prompts."
    )
    rows = [
        (c.peer, c.setting, factor(c.work_ratio), number(c.quality[metric].mean), "swept")
        for c in shown
    ]
    rows += [
        (
            s.peer,
            s.setting or NONE,
            factor(s.work_ratio.median),
            number(s.quality[metric].mean),
            "held-out",
        )
        for s in stood
    ]
    head = ("peer", "setting", "work", _name(metric), "prompts")
    table = Table(head, tuple(rows), frozenset({0, 1, 4}))
    title = f"Work left out against {_name(metric)}"
    figure = _drawn(peers, shown, stood, metric)
    return Chart(f"pareto-{metric}", title, said, figure, table)


def _worth_showing(contender: Contender, floors: Collection[Constraint]) -> bool:
    """Whether a setting comes near any of the floors on a mean."""
    seen = contender.quality
    near = [seen[c.metric].mean >= _SHOWN_FROM * c.floor for c in floors if c.metric in seen]
    return any(near) or not near


def _name(metric: str) -> str:
    return metric_label(Constraint(metric=metric, statistic="mean", floor=0.0))


def _drawn(
    peers: Sequence[str], shown: Sequence[Contender], stood: Sequence[Standing], metric: str
) -> Figure:
    looks = {peer: _LOOKS[place % len(_LOOKS)] for place, peer in enumerate(peers)}
    traces: list[Any] = []
    for peer in peers:
        own = sorted((c for c in shown if c.peer == peer), key=lambda c: c.work_ratio)
        if not own:
            continue
        colour, symbol = looks[peer]
        traces.append(
            go.Scatter(
                x=[c.work_ratio for c in own],
                y=[c.quality[metric].mean for c in own],
                name=label(peer),
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 7, "opacity": 0.75},
                hovertext=[_hover(c.peer, c.setting, c.work_ratio) for c in own],
                hoverinfo="text",
            )
        )
    for name, symbol, colour, own_standings in (
        ("peers, held-out", "circle-open", "var(--ink)", [s for s in stood if s.peer != OURS]),
        ("ditune, held-out", "star", "var(--cfg)", [s for s in stood if s.peer == OURS]),
    ):
        traces.append(
            go.Scatter(
                x=[s.work_ratio.median for s in own_standings],
                y=[s.quality[metric].mean for s in own_standings],
                name=name,
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 14, "line": {"width": 2}},
                hovertext=[
                    _hover(s.peer, s.setting or "", s.work_ratio.median) for s in own_standings
                ],
                hoverinfo="text",
            )
        )
    layout = plot_layout("work: plain operations / operations", label(_name(metric)), height=460)
    layout["xaxis"] |= {"ticksuffix": "x"}
    return drawing(traces, layout)


def _hover(peer: str, setting: str, work: float) -> str:
    return f"<b>{label(peer)}</b><br>{label(setting)}<br>{factor(work)} less work"
