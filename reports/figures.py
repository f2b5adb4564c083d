"""Draw gathered numbers as plotly figures.

Colours are CSS variables: the page's script puts in the values of the light or the dark scheme.
Plotly reads some HTML in labels, so every foreign name passes `label` before it becomes one.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from ditune.db.policy import Action
from ditune.db.records import LayerTiming
from ditune.reports.gather import VERDICTS, Layers, Point, Redundancy, Scatter, StripCell, Verdict
from ditune.reports.words import (
    ACTION_WORDS,
    ACTIONS,
    factor,
    metric_label,
    number,
    policy_in_brief,
    policy_in_words,
    shortened,
    unit_of,
    visible,
)

Figure = dict[str, Any]

# How much of a step is computed, as bar height: only the order of the four means something.
ACTION_HEIGHT: dict[Action, float] = {"full": 1.0, "cfg": 0.6, "block": 0.36, "step": 0.14}
_LINES = {  # name -> colour of the action that it is about, dash, marker
    "whole step": ("var(--step)", "solid", "circle"),
    "guidance": ("var(--cfg)", "dash", "square"),
    "blocks": ("var(--block)", "dot", "diamond"),
}
_MARKERS: dict[Verdict, tuple[str, str, str]] = {  # legend, symbol, colour
    "feasible": ("holds the floors", "circle", "var(--full)"),
    "infeasible": ("misses a floor", "x", "var(--step)"),
    "rejected": ("stopped early", "triangle-down-open", "var(--muted)"),
    "baseline": ("plain pipeline", "square", "var(--ink)"),
}
_STACK_STYLES = (("var(--full)", ""), ("var(--step)", "/"), ("var(--cfg)", "."))
WHISKER = {"color": "var(--ink)", "thickness": 1, "width": 2}
_LABEL_LIMIT = 48
_HOVER_WIDTH = 52
_ROW_PX = 34


def label(text: str, limit: int = _LABEL_LIMIT) -> str:
    """Return foreign text as a plotly label: nothing in it acts, and it is not endless."""
    return escape(shortened(visible(text), limit))


def parts(gathered: Layers) -> Figure:
    """Draw the parts of the pipeline as horizontal bars, median with p20 to p80 whiskers."""
    found = gathered.parts[::-1]  # plotly counts from the bottom
    bar = go.Bar(
        x=[part.median_ms for part in found],
        y=[label(f"{part.name} ({part.n}x)", 28) for part in found],
        orientation="h",
        width=0.55,
        marker={"color": "var(--full)"},
        error_x=_whiskers(found),
        hovertext=[_layer_hover(part) for part in found],
        hoverinfo="text",
    )
    layout = plot_layout("median per call, ms", "", height=90 + _ROW_PX * len(found))
    layout["yaxis"] |= {"showgrid": False, "automargin": True}
    return drawing([bar], layout)


def blocks(gathered: Layers) -> Figure:
    """Draw the blocks of each stack as bars over their index, median with p20 to p80 whiskers."""
    traces = []
    for place, (stack, found) in enumerate(gathered.stacks.items()):
        colour, pattern = _STACK_STYLES[place % len(_STACK_STYLES)]
        traces.append(
            go.Bar(
                x=[int(block.name.rpartition(".")[2]) for block in found],
                y=[block.median_ms for block in found],
                name=label(stack),
                marker={"color": colour, "pattern": {"shape": pattern}},
                error_y=_whiskers(found),
                hovertext=[_layer_hover(block) for block in found],
                hoverinfo="text",
            )
        )
    layout = plot_layout("block", "median per call, ms", height=320)
    return drawing(traces, layout | {"barmode": "group", "showlegend": len(traces) > 1})


def redundancy(gathered: Redundancy, cells: Sequence[StripCell]) -> Figure:
    """Draw the change against the step, and under it what the policy does at each step."""
    traces: list[Any] = [
        go.Scatter(
            x=gathered.steps,
            y=line,
            name=name,
            mode="lines+markers",
            line={"color": _LINES[name][0], "dash": _LINES[name][1], "width": 2},
            marker={"symbol": _LINES[name][2], "size": 5},
            hovertemplate=f"step %{{x}}: {name} changes by %{{y:.3g}}<extra></extra>",
        )
        for name, line in gathered.lines.items()
    ]
    if gathered.disagreement is not None:
        traces.append(
            go.Scatter(
                x=gathered.steps,
                y=gathered.disagreement,
                name="small against large model",
                mode="lines",
                line={"color": "var(--muted)", "dash": "longdash", "width": 2},
                hovertemplate="step %{x}: the models differ by %{y:.3g}<extra></extra>",
            )
        )
    layout = plot_layout("denoising step", "relative change", height=400)
    layout["yaxis"] |= {"rangemode": "tozero"}
    layout["xaxis"] |= {"range": [0.3, max(gathered.steps) + 0.7]}
    if cells:
        traces += [_strip_bars(action, cells) for action in ACTIONS]
        layout["yaxis"] |= {"domain": [0.27, 1.0]}
        layout["xaxis"] |= {"anchor": "y2"}
        hidden = {"showgrid": False, "showticklabels": False, "zeroline": False, "fixedrange": True}
        title = {"text": "policy", "standoff": 18}
        layout["yaxis2"] = {"domain": [0.0, 0.17], "range": [0, 1], "title": title, **hidden}
    return drawing(traces, layout | {"barmode": "overlay"})


def trials(gathered: Scatter) -> Figure:
    """Draw the trials as speedup against quality, with the floor and the chosen policy."""
    constraint = gathered.constraint
    assert constraint is not None, "a scatter without a metric has no vertical axis"
    low, high = _quality_range(gathered)
    traces = [
        _verdict_points(verdict, found, high)
        for verdict in VERDICTS
        if (found := [p for p in gathered.points if p.verdict == verdict])
    ]
    traces += _chosen_marks(gathered, high)
    unit = unit_of(constraint)
    axis = label(metric_label(constraint)) + (f", {unit}" if unit else "")
    layout = plot_layout("speedup against the plain pipeline", axis, height=460)
    layout["xaxis"] |= {"ticksuffix": "x"}
    layout["yaxis"] |= {"range": [low, high]}
    layout["shapes"] = [
        {
            "type": "line", "xref": "paper", "x0": 0, "x1": 1,
            "y0": constraint.floor, "y1": constraint.floor,
            "line": {"color": "var(--ink)", "width": 1.5, "dash": "dash"},
        }
    ]  # fmt: skip
    layout["annotations"] = [
        {
            "xref": "paper", "x": 1, "xanchor": "right", "y": constraint.floor, "yanchor": "bottom",
            "text": f"floor {number(constraint.floor)}{' ' + unit if unit else ''}",
            "showarrow": False,
        }
    ]  # fmt: skip
    return drawing(traces, layout)


def drawing(traces: list[Any], layout: dict[str, Any]) -> Figure:
    """Return plain JSON, checked by plotly against its own schema."""
    # without this plotly adds a template with colours of its own, 7 KB per figure
    figure = go.Figure(data=traces, layout={"template": "none", **layout})
    drawn: Figure = figure.to_plotly_json()
    drawn["layout"].pop("template", None)
    return drawn


def plot_layout(x_title: str, y_title: str, *, height: int) -> dict[str, Any]:
    """Return what all charts look like: two axes, a grid, a legend above."""
    axis = {"gridcolor": "var(--rule)", "linecolor": "var(--rule)", "zerolinecolor": "var(--rule)"}
    return {
        "height": height,
        "margin": {"l": 56, "r": 12, "t": 8, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var(--ink)", "size": 13},
        "hoverlabel": {
            "align": "left",
            "bgcolor": "var(--paper)",
            "bordercolor": "var(--muted)",
            "font": {"color": "var(--ink)"},
        },
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": {"title": {"text": x_title}, "automargin": True, **axis},
        "yaxis": {"title": {"text": y_title}, "automargin": True, **axis},
    }


def _whiskers(found: Sequence[LayerTiming]) -> dict[str, Any]:
    return {
        "type": "data",
        "array": [layer.p80_ms - layer.median_ms for layer in found],
        "arrayminus": [layer.median_ms - layer.p20_ms for layer in found],
        **WHISKER,
    }


def _layer_hover(layer: LayerTiming) -> str:
    quantiles = f"{number(layer.p20_ms)} to {number(layer.p80_ms)} ms"
    return (
        f"{label(layer.name)}<br>median {number(layer.median_ms)} ms<br>"
        f"p20 to p80: {quantiles}<br>{layer.n} calls"
    )


def _strip_bars(action: Action, cells: Sequence[StripCell]) -> Any:
    own = [cell for cell in cells if cell.action == action]
    return go.Bar(
        x=[cell.step for cell in own],
        y=[ACTION_HEIGHT[action]] * len(own),
        width=0.8,
        marker={"color": f"var(--{action})"},
        yaxis="y2",
        showlegend=False,
        hovertext=[
            f"step {cell.step} {ACTION_WORDS[action]}" + (" (small model)" if cell.small else "")
            for cell in own
        ],
        hoverinfo="text",
    )


def _quality_range(gathered: Scatter) -> tuple[float, float]:
    """Return the vertical range: the plain pipeline (identical, so at the cap) must not set it."""
    assert gathered.constraint is not None
    tried = [p.quality for p in gathered.points if p.verdict != "baseline"]
    if gathered.confirmed is not None:
        tried.append(gathered.confirmed[1])
    shown = [*tried, gathered.constraint.floor]
    room = (max(shown) - min(shown)) * 0.1 or abs(max(shown)) * 0.1 or 1.0
    return min(shown) - room, max(shown) + room


def _verdict_points(verdict: Verdict, found: Sequence[Point], high: float) -> Any:
    name, symbol, colour = _MARKERS[verdict]
    return go.Scatter(
        x=[p.speedup for p in found],
        y=[min(p.quality, high) for p in found],
        name=name,
        mode="markers",
        cliponaxis=False,  # the plain pipeline lies on the upper edge
        marker={"symbol": symbol, "color": colour, "size": 9, "opacity": 0.85},
        hovertext=[_point_hover(p, name) for p in found],
        hoverinfo="text",
    )


def _chosen_marks(gathered: Scatter, high: float) -> list[Any]:
    marks = []
    if (ringed := gathered.ringed) is not None:
        marks.append(
            go.Scatter(
                x=[ringed.speedup],
                y=[min(ringed.quality, high)],
                name="chosen",
                mode="markers",
                marker={
                    "symbol": "circle-open",
                    "size": 20,
                    "line": {"width": 2.5},
                    "color": "var(--ink)",
                },
                hoverinfo="skip",
            )
        )
    if gathered.confirmed is not None:
        speedup, quality = gathered.confirmed
        low, top = speedup.ci95
        marks.append(
            go.Scatter(
                x=[speedup.median],
                y=[min(quality, high)],
                name="confirmed",
                mode="markers",
                marker={"symbol": "star", "size": 15, "color": "var(--cfg)"},
                error_x={
                    "type": "data",
                    "array": [top - speedup.median],
                    "arrayminus": [speedup.median - low],
                    **WHISKER,
                },
                hovertext=[
                    f"chosen policy, confirmed on unseen prompts<br>{factor(speedup.median)}, "
                    f"95 % interval {factor(low)} to {factor(top)}<br>quality {number(quality)}"
                ],
                hoverinfo="text",
            )
        )
    return marks


def _point_hover(point: Point, ending: str) -> str:
    trial = point.trial
    policy = policy_in_words(trial.policy)
    if len(policy) > 400:
        policy = policy_in_brief(trial.policy)
    said = textwrap.wrap(policy, _HOVER_WIDTH)
    numbers = f"{factor(point.speedup)}, quality {number(point.quality)}"
    head = f"<b>trial {trial.number}</b> ({trial.source}): {ending}<br>{numbers}"
    return "<br>".join([head, *(escape(line) for line in said)])
