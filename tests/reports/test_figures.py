"""What is drawn: the gathered numbers, told apart by shape, with labels that cannot act."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ditune.db.records import LayerTiming
from ditune.reports import figures, gather
from ditune.reports.content import ReportContent


def traces(figure: figures.Figure) -> dict[str, dict[str, Any]]:
    """Return the traces by name."""
    return {trace["name"]: trace for trace in figure["data"] if "name" in trace}


def test_figures_are_plain_json(content: ReportContent) -> None:
    scatter = figures.trials(gather.scatter(content))
    assert scatter == json.loads(json.dumps(scatter))
    assert "template" not in scatter["layout"]


def test_whiskers_reach_from_p20_to_p80(content: ReportContent) -> None:
    gathered = gather.layers(content.profile)
    bars = figures.blocks(gathered)["data"][0]
    first = gathered.stacks["transformer.blocks"][0]
    assert first.median_ms == bars["y"][0]
    assert pytest.approx(first.p80_ms) == bars["y"][0] + bars["error_y"]["array"][0]
    assert pytest.approx(first.p20_ms) == bars["y"][0] - bars["error_y"]["arrayminus"][0]


def test_lines_differ_in_dash_and_marker(content: ReportContent) -> None:
    found = traces(figures.redundancy(gather.redundancy(content.profile), ()))
    assert len({trace["line"]["dash"] for trace in found.values()}) == 3
    assert len({trace["marker"]["symbol"] for trace in found.values()}) == 3


def test_strip_shows_every_step_once(content: ReportContent) -> None:
    assert content.chosen is not None
    cells = gather.strip(content.chosen.policy, content.profile)
    drawn = figures.redundancy(gather.redundancy(content.profile), cells)["data"]
    steps = [step for trace in drawn if trace["type"] == "bar" for step in trace["x"]]
    assert list(range(1, 51)) == sorted(steps)


def test_disagreement_is_a_line_of_its_own(content: ReportContent) -> None:
    profile = content.profile.model_copy(update={"disagreement": (0.1,) * 50})
    found = traces(figures.redundancy(gather.redundancy(profile), ()))
    assert len(found["small against large model"]["y"]) == 50


def test_trials_differ_in_shape_and_the_floor_is_a_line(content: ReportContent) -> None:
    drawn = figures.trials(gather.scatter(content))
    symbols = [trace["marker"]["symbol"] for trace in drawn["data"]]
    assert 6 == len(symbols) == len(set(symbols))
    assert 30.0 == drawn["layout"]["shapes"][0]["y0"] == drawn["layout"]["shapes"][0]["y1"]
    assert drawn["layout"]["annotations"][0]["text"] == "floor 30 dB"


def test_the_plain_pipeline_does_not_stretch_the_axis(content: ReportContent) -> None:
    drawn = figures.trials(gather.scatter(content))
    _, high = drawn["layout"]["yaxis"]["range"]
    assert high < 60
    assert (high,) == tuple(traces(drawn)["plain pipeline"]["y"])


def test_the_chosen_policy_is_ringed_and_confirmed_with_its_interval(
    content: ReportContent,
) -> None:
    found = traces(figures.trials(gather.scatter(content)))
    assert found["chosen"]["marker"]["symbol"] == "circle-open"
    star = found["confirmed"]
    assert pytest.approx(1.93) == star["x"][0] + star["error_x"]["array"][0]
    assert pytest.approx(1.81) == star["x"][0] - star["error_x"]["arrayminus"][0]


def test_hover_says_number_source_and_policy(content: ReportContent) -> None:
    hover = traces(figures.trials(gather.scatter(content)))["holds the floors"]["hovertext"][0]
    assert "trial 1</b> (prior)" in hover
    assert "23 reuse the whole<br>step" in hover or "23 reuse the whole step" in hover


def test_a_layer_name_cannot_be_markup() -> None:
    hostile = "</script>\x1b\u202e<a href='javascript:alert(1)'>"
    layer = LayerTiming(name=hostile, median_ms=1.0, p20_ms=1.0, p80_ms=1.0, n=1)
    drawn = json.dumps(figures.parts(gather.Layers((layer,), {})))
    assert "<a" not in drawn and "</script" not in drawn
    assert "&lt;/script&gt;" in drawn
    assert "\\\\x1b" in drawn and "\\\\u202e" in drawn


def test_labels_are_not_endless() -> None:
    assert len(figures.label("x" * 200)) == 48
