"""The numbers behind each figure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from ditune.db.policy import AdaptiveHandoff, Policy, RuleCache
from ditune.db.records import Constraint, LayerTiming, Quality, Study, Trial
from ditune.reports import charts, gather
from ditune.reports.content import ReportContent
from ditune.reports.page import render

Build = Callable[..., ReportContent]


def asking(content: ReportContent, *constraints: Constraint) -> Study:
    """Return the study with other floors."""
    settings = content.study.settings.model_copy(update={"constraints": constraints})
    return content.study.model_copy(update={"settings": settings})


def test_layers_are_parted_into_parts_and_ordered_blocks(content: ReportContent) -> None:
    def timing(name: str) -> LayerTiming:
        return LayerTiming(name=name, median_ms=1.0, p20_ms=0.9, p80_ms=1.2, n=3)

    names = ("vae.decoder", "t.blocks.10", "t.blocks.2", "t2.blocks.0", "transformer_2")
    profile = content.profile.model_copy(update={"layers": tuple(map(timing, names))})
    found = gather.layers(profile)
    assert [part.name for part in found.parts] == ["vae.decoder", "transformer_2"]
    assert list(found.stacks) == ["t.blocks", "t2.blocks"]
    assert [block.name for block in found.stacks["t.blocks"]] == ["t.blocks.2", "t.blocks.10"]


def test_redundancy_counts_from_one_and_keeps_gaps(content: ReportContent) -> None:
    found = gather.redundancy(content.profile)
    assert tuple(range(1, 51)) == found.steps
    assert list(found.lines) == ["whole step", "guidance", "blocks"]
    assert found.lines["whole step"][0] is None
    assert content.profile.redundancy[7].step_change == found.lines["whole step"][7]


def test_redundancy_without_guidance_has_no_such_line(content: ReportContent) -> None:
    steps = tuple(s.model_copy(update={"cfg_change": None}) for s in content.profile.redundancy)
    found = gather.redundancy(content.profile.model_copy(update={"redundancy": steps}))
    assert list(found.lines) == ["whole step", "blocks"]


def test_strip_of_a_mask(content: ReportContent) -> None:
    assert content.chosen is not None
    cells = gather.strip(content.chosen.policy, content.profile)
    assert len(cells) == 50
    assert (cells[0].action, cells[8].action) == ("full", "step")
    assert not any(cell.small for cell in cells)
    assert (1, 8, cells[7]) == gather.runs(cells)[0]


def test_strip_of_a_handoff_marks_steps_below_sigma(
    content: ReportContent, handoff: Policy
) -> None:
    cells = gather.strip(handoff, content.profile)
    sigmas = [step.sigma for step in content.profile.redundancy]
    assert [s is not None and s < 0.6 for s in sigmas] == [cell.small for cell in cells]
    assert {"full"} == {cell.action for cell in cells}


def test_what_is_decided_at_run_time_has_no_strip(content: ReportContent) -> None:
    assert gather.strip(Policy(cache=RuleCache()), content.profile) == ()
    assert gather.strip(Policy(handoff=AdaptiveHandoff()), content.profile) == ()


def test_scatter_takes_mean_psnr_and_the_chosen_policy(content: ReportContent) -> None:
    found = gather.scatter(content)
    assert found.constraint is not None and found.constraint.name == "psnr"
    assert len(found.points) == 80
    assert found.left_out == 0
    assert found.ringed is not None and found.ringed.trial.number == 1
    assert found.confirmed is not None
    assert (found.confirmed[0].median, found.confirmed[1]) == (1.87, 31.12)
    assert found.points[0].verdict == "baseline"


def test_scatter_verdicts_agree_with_the_records(content: ReportContent) -> None:
    for point in gather.scatter(content).points[1:]:
        rejected = point.trial.state != "complete"
        expected = "rejected" if rejected else "feasible" if point.trial.feasible else "infeasible"
        assert expected == point.verdict


def test_scatter_falls_back_to_the_first_metric(content: ReportContent) -> None:
    judge = Constraint(metric="judge", statistic="mean", floor=-0.01)
    worst = Constraint(metric="psnr", statistic="worst", floor=25.0)
    study = asking(content, worst, judge)
    found = gather.scatter(replace(content, study=study))
    assert worst == found.constraint
    assert content.trials[5].quality["psnr_worst"].worst == found.points[5].quality


def test_scatter_leaves_out_what_has_no_numbers(content: ReportContent) -> None:
    blind = content.trials[3].model_copy(update={"speedup": None, "state": "failed"})
    trials = (*content.trials[:3], blind, *content.trials[4:])
    found = gather.scatter(replace(content, trials=trials))
    assert found.left_out == 1
    assert 3 not in [point.trial.number for point in found.points]
    unasked = gather.scatter(replace(content, study=asking(content)))
    assert (unasked.constraint, unasked.points) == (None, ())


def test_quality_rows_keep_the_order_asked_for(content: ReportContent) -> None:
    assert content.chosen is not None
    evidence = content.chosen.evidence
    rows = gather.quality_rows(content.study.settings, evidence.quality, evidence.bound_by)
    assert [r.label for r in rows] == ["PSNR", "PSNR of the worst prompt", "judge score change"]
    assert [row.floor for row in rows] == [30.0, 25.0, -0.01]
    assert [row.binds for row in rows] == [True, False, False]
    assert all(row.held for row in rows)


def test_quality_rows_see_a_broken_floor_and_one_without(content: ReportContent) -> None:
    quality = {
        "extra": Quality(floor=None, mean=1.0, worst=0.5, n=4),
        "psnr_worst": Quality(floor=25.0, mean=40.0, worst=24.9, n=4),
    }
    rows = gather.quality_rows(content.study.settings, quality)
    assert [(row.label, row.held) for row in rows] == [
        ("PSNR of the worst prompt", False),
        ("extra", None),
    ]


def test_best_seen_is_the_fastest_feasible_one(content: ReportContent) -> None:
    best = gather.best_seen(content)
    assert best is not None and best.feasible
    assert best.speedup == max(t.speedup or 0 for t in content.trials if t.feasible)


def test_best_seen_without_a_feasible_one_misses_by_least(build: Build) -> None:
    content = build(found=False)
    best = gather.best_seen(content)
    assert best is not None
    complete = [t for t in content.trials if t.state == "complete" and t.source != "baseline"]
    assert min(t.violation["psnr"] for t in complete) == best.violation["psnr"]


def test_best_seen_of_nothing(content: ReportContent) -> None:
    assert gather.best_seen(replace(content, trials=content.trials[:1])) is None


@pytest.mark.parametrize("count", [1, gather.TRIALS_SHOWN, gather.TRIALS_SHOWN + 3])
def test_a_page_lists_no_more_than_it_can(content: ReportContent, count: int) -> None:
    trials = tuple(content.trials[2].model_copy(update={"number": n}) for n in range(count))
    listed = gather.listed(trials)
    assert min(count, gather.TRIALS_SHOWN) == len(listed)
    assert sorted(t.number for t in listed) == [t.number for t in listed]


def test_ways_stand_beside_each_other_with_the_fastest_that_held(
    content: ReportContent, handoff: Policy
) -> None:
    assert gather.ways(content.trials) == ()  # nothing handed over
    template = content.trials[1]

    def trial(policy: Policy, speedup: float, *, holds: bool = True) -> Trial:
        violation = {"psnr": -0.1 if holds else 0.1}
        changes = {"policy": policy, "speedup": speedup, "violation": violation}
        return template.model_copy(update={**changes, "state": "complete"})

    cached = Policy(cache=RuleCache())
    both = Policy(cache=RuleCache(), handoff=handoff.handoff)
    trials = (
        trial(Policy(), 1.0),
        trial(cached, 2.0),
        trial(cached, 3.0),
        trial(cached, 4.0, holds=False),
        trial(handoff, 2.5),
        trial(both, 6.0, holds=False),
    )
    found = {way.name: (way.tried, way.fastest) for way in gather.ways(trials)}
    assert found == {
        "cache only": (3, trials[2]),
        "hand-off only": (1, trials[4]),
        "both": (1, None),
    }
    table = charts.ways_table(replace(content, trials=trials))
    assert table is not None
    assert [row[3] for row in table.rows] == ["3.00x", "2.50x", charts.NONE]
    page = str(render(replace(content, trials=trials)))
    assert "Caches, hand-offs and both" in page
