"""The page of a trade-off curve: what was tried, what was proved, and what each point costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from ditune.db.curve import Also, Curve, CurvePoint, taken
from ditune.db.files import write_atomically
from ditune.db.policy import Policy
from ditune.db.records import Constraint, Trial
from ditune.reports.charts import NONE, Chart, Table
from ditune.reports.document import document
from ditune.reports.figures import WHISKER, Figure, drawing, label, plot_layout
from ditune.reports.words import (
    cost_in_words,
    duration,
    factor,
    interval,
    memory,
    metric_label,
    moment,
    number,
    policy_in_brief,
    unit_of,
)

_ALSO_TITLES: dict[Also, str] = {"memory": "peak memory, MiB", "energy": "energy per video, J"}
_MIB = 2**20
_ROOM = 0.1  # of the range of what was tried, above and below it


def render(curve: Curve) -> str:
    """Return the page as HTML; every text in the curve is taken for hostile."""
    charts = {c.key: c for c in (_quality_chart(curve), _also_chart(curve)) if c is not None}
    return document(
        "curve.html",
        charts,
        curve=curve,
        headline=headline(curve),
        metric=metric_label(_scored(curve)),
        points=points_table(curve),
        trials=_trials_table(curve),
        conditions=_conditions(curve),
    )


def write(curve: Curve, path: Path) -> None:
    """Write the page; an existing file stays whole until the new one is complete.

    Raises:
        UsageFault: The folder is missing or cannot be written, or the path is a folder.
        StoreFault: The disk is full; an older page is untouched.
    """
    write_atomically(path, render(curve).encode("utf-8"))


def headline(curve: Curve) -> str:
    """Say in one line how far the curve reaches."""
    kept = [point for point in curve.points if not point.dominated]
    if not kept:
        return "No policy was found that the plain pipeline does not dominate"
    slow, fast = kept[0], kept[-1]
    if len(kept) == 1:
        return f"One point: {_in_words(curve, slow)}"
    return f"{len(kept)} points from {_in_words(curve, slow)} to {_in_words(curve, fast)}"


def points_table(curve: Curve) -> Table:
    """Return one row for the plain pipeline and one for every proved point, from slow to fast."""
    name = metric_label(_scored(curve))
    also = () if curve.also is None else (_ALSO_TITLES[curve.also].partition(",")[0],)
    head = ("point", "speedup", "95 % interval", f"{name}, mean", "95 % bound", "worst")
    plain = curve.trials[0]
    level = number(plain.quality[curve.metric].mean)
    rows = [("plain", factor(1.0), NONE, level, NONE, NONE, *_also_cells(curve, plain), "")]
    for place, point in enumerate(curve.points, start=1):
        evidence = point.evidence
        quality = evidence.quality[curve.metric]
        levels = (quality.mean, point.bound, quality.worst)
        rows.append(
            (
                f"{place}, dominated" if point.dominated else str(place),
                factor(evidence.speedup.median),
                interval(evidence.speedup),
                *(number(level) for level in levels),
                *_also_cells(curve, point),
                policy_in_brief(point.policy),
            )
        )
    head = (*head, *also, "policy")
    return Table(head, tuple(rows), frozenset({0, len(head) - 1}))


def _trials_table(curve: Curve) -> Table:
    """Return one row per trial of the search."""

    def row(trial: Trial) -> tuple[str, ...]:
        seen = trial.quality.get(curve.metric)
        return (
            str(trial.number),
            trial.source,
            factor(trial.speedup) if trial.speedup is not None else NONE,
            number(seen.mean) if seen is not None else NONE,
            *_also_cells(curve, trial),
            policy_in_brief(trial.policy),
            trial.reason or NONE,
        )

    also = () if curve.also is None else (_ALSO_TITLES[curve.also].partition(",")[0],)
    head = ("trial", "source", "speedup", metric_label(_scored(curve)), *also, "policy", "reason")
    words = frozenset({1, len(head) - 2, len(head) - 1})
    return Table(head, tuple(map(row, curve.trials)), words)


def _also_cells(curve: Curve, found: Trial | CurvePoint) -> tuple[str, ...]:
    """Return the cell of the third objective, none where there is no such thing."""
    takes = taken(found, curve.also)
    if curve.also is None:
        return ()
    if takes is None:
        return (NONE,)
    return (memory(round(takes)) if curve.also == "memory" else f"{number(takes)} J",)


def _in_words(curve: Curve, point: CurvePoint) -> str:
    unit = unit_of(_scored(curve))
    level = number(point.evidence.quality[curve.metric].mean)
    name = metric_label(_scored(curve))
    return f"{factor(point.evidence.speedup.median)} at {name} {level}{' ' + unit if unit else ''}"


def _scored(curve: Curve) -> Constraint:
    return Constraint(metric=curve.metric, statistic="mean", floor=0.0)


def _metric_title(curve: Curve) -> str:
    unit = unit_of(_scored(curve))
    return metric_label(_scored(curve)) + (f", {unit}" if unit else "")


def _conditions(curve: Curve) -> list[tuple[str, str]]:
    hardware, workload = curve.hardware, curve.workload
    software = ", ".join(f"{name} {value}" for name, value in curve.software)
    return [
        ("hardware", f"{hardware.device_name}, {hardware.capability}, {hardware.cores} cores"),
        ("software", software),
        ("pipeline", f"{workload.pipeline_class}, {workload.steps} steps, {workload.dtype}"),
        ("size", f"{workload.width}x{workload.height}, {workload.frames} frames"),
        ("one plain call", duration(curve.plain_ms)),
        ("searched", f"{len(curve.trials)} policies on {curve.search_videos} videos each"),
        ("proved", f"{len(curve.points)} policies on {curve.proof_videos} further videos each"),
        ("cost", cost_in_words(curve.cost)),
        ("study", curve.study),
        ("when", moment(curve.created_at)),
    ]


# --- charts --------------------------------------------------------------------------------------


def _quality_chart(curve: Curve) -> Chart:
    metric = curve.metric
    tried = [t for t in curve.trials if t.quality and t.policy != Policy()]
    levels = [t.quality[metric].mean for t in tried]
    levels += [level for p in curve.points for level in (p.bound, p.evidence.quality[metric].mean)]
    low, high = _range(levels or [curve.trials[0].quality[metric].mean])
    plain = curve.trials[0].quality[metric].mean
    proved = [p.evidence.quality[metric].mean for p in curve.points]
    below = [p.evidence.quality[metric].mean - p.bound for p in curve.points]
    traces = [
        _searched(tried, [t.quality[metric].mean for t in tried]),
        _plain(min(plain, high)),
        *_proved(curve, proved, below),
    ]
    said = "Circles are policies as the search saw them on its own videos, stars what was proved."
    if plain > high:
        said += " The plain pipeline equals itself and is drawn at the upper edge."
    title = _metric_title(curve)
    figure = _figure(traces, title, (low, high))
    return Chart("quality", f"Speed against {title}", said, figure, _numbers(curve, title))


def _also_chart(curve: Curve) -> Chart | None:
    """Return the chart of the third objective, None where there is none."""
    if curve.also is None:
        return None
    tried = [t for t in curve.trials if t.quality and t.policy != Policy()]
    levels = [_scaled(curve, each) for each in tried]
    plain = _scaled(curve, curve.trials[0])
    proved = [_scaled(curve, point) for point in curve.points]
    title = _ALSO_TITLES[curve.also]
    traces = [_searched(tried, levels), _plain(plain), *_proved(curve, proved, [])]
    figure = _figure(traces, title, _range([*levels, plain, *proved]))
    said = "Of the same policies: less is better."
    return Chart("also", f"Speed against {title}", said, figure, _numbers(curve, title, third=True))


def _scaled(curve: Curve, found: Trial | CurvePoint) -> float:
    takes = taken(found, curve.also) or 0.0
    return takes / _MIB if curve.also == "memory" else takes


def _range(levels: Sequence[float]) -> tuple[float, float]:
    """Return the vertical range, with room around what is drawn."""
    low, high = min(levels), max(levels)
    room = (high - low) * _ROOM or abs(high) * _ROOM or 1.0
    return low - room, high + room


def _numbers(curve: Curve, title: str, *, third: bool = False) -> Table:
    """Return what a chart draws as rows."""

    def level(found: Trial | CurvePoint) -> float:
        if third:
            return _scaled(curve, found)
        quality = found.quality if isinstance(found, Trial) else found.evidence.quality
        return quality[curve.metric].mean

    rows = [
        (f"trial {t.number}", factor(t.speedup or 1.0), number(level(t)), "searched")
        for t in curve.trials
        if t.quality
    ]
    rows += [
        (f"point {n}", factor(p.evidence.speedup.median), number(level(p)), "proved")
        for n, p in enumerate(curve.points, start=1)
    ]
    return Table(("policy", "speedup", title, "videos"), tuple(rows), frozenset({0, 3}))


def _figure(traces: list[Any], title: str, levels: tuple[float, float]) -> Figure:
    layout = plot_layout("speedup against the plain pipeline", label(title), height=460)
    layout["xaxis"] |= {"ticksuffix": "x"}
    layout["yaxis"] |= {"range": list(levels)}
    return drawing(traces, layout)


def _searched(tried: Sequence[Trial], levels: Sequence[float]) -> Any:
    return go.Scatter(
        x=[trial.speedup for trial in tried],
        y=list(levels),
        name="searched",
        mode="markers",
        marker={"symbol": "circle-open", "color": "var(--muted)", "size": 8},
        hovertext=[_hover(f"trial {t.number} ({t.source})", t.policy) for t in tried],
        hoverinfo="text",
    )


def _plain(level: float) -> Any:
    return go.Scatter(
        x=[1.0],
        y=[level],
        name="plain pipeline",
        mode="markers",
        cliponaxis=False,  # it may lie on the upper edge
        marker={"symbol": "square", "color": "var(--ink)", "size": 9},
        hoverinfo="skip",
    )


def _proved(curve: Curve, levels: Sequence[float], below: Sequence[float]) -> list[Any]:
    """Return the proved points with their intervals, those that are dominated apart.

    Args:
        curve: The points are its own.
        levels: Of each point.
        below: How far the level's bound lies below each; empty where it has none.
    """
    traces = []
    for name, symbol, colour, dominated in (
        ("proved", "star", "var(--cfg)", False),
        ("proved, dominated", "star-open", "var(--step)", True),
    ):
        own = [n for n, point in enumerate(curve.points) if point.dominated == dominated]
        if not own:
            continue
        speeds = [curve.points[n].evidence.speedup for n in own]
        hover = [_hover(f"point {n + 1}", curve.points[n].policy) for n in own]
        traces.append(
            go.Scatter(
                x=[speed.median for speed in speeds],
                y=[levels[n] for n in own],
                name=name,
                mode="markers" if dominated or curve.also else "lines+markers",
                line={"color": colour, "width": 1, "dash": "dot"},
                marker={"symbol": symbol, "color": colour, "size": 13},
                error_x=_whiskers(
                    [speed.ci95[1] - speed.median for speed in speeds],
                    [speed.median - speed.ci95[0] for speed in speeds],
                ),
                error_y=_whiskers([0.0] * len(own), [below[n] for n in own]) if below else None,
                hovertext=hover,
                hoverinfo="text",
            )
        )
    return traces


def _whiskers(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    return {"type": "data", "array": list(above), "arrayminus": list(below), **WHISKER}


def _hover(name: str, policy: Policy) -> str:
    return f"<b>{label(name)}</b><br>{label(policy_in_brief(policy))}"
