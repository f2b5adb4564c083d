"""The page of a trade-off curve: what it says, and what foreign names cannot do in it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright
from tests.reports.test_browser import CHROMIUM, FLAGS
from tests.reports.test_page import text_of

from ditune.db.cost import Cost, Spent
from ditune.db.curve import Also, Curve, CurvePoint
from ditune.db.policy import Policy
from ditune.db.records import Interval, Quality, Trial
from ditune.reports import curve as page
from ditune.reports.content import ReportContent

Build = Callable[..., ReportContent]
HOSTILE = "<img src=x onerror=alert(1)>"
SPENT = Spent(seconds=60.0, videos=20.0)


def quality(psnr: float) -> dict[str, Quality]:
    return {"psnr": Quality(floor=None, mean=psnr, worst=psnr - 4.0, n=8)}


def point(content: ReportContent, trial: Trial, speedup: float, psnr: float) -> CurvePoint:
    assert content.chosen is not None
    found = {
        "speedup": Interval(median=speedup, ci95=(0.9 * speedup, 1.1 * speedup), n=6),
        "quality": quality(psnr),
    }
    return CurvePoint(
        trial=trial.number,
        policy_id=trial.policy.id,
        policy=trial.policy,
        evidence=content.chosen.evidence.model_copy(update=found),
        bound=psnr - 1.5,
        peak_bytes=3 * 2**20,
        energy_j=250.0,
        dominated=False,
    )


def drawn(content: ReportContent, also: Also | None = None) -> Curve:
    """Return a curve of three points, of which the middle one is dominated."""
    measured = {"peak_bytes": 2 * 2**20, "energy_j": 400.0}
    trials = tuple(
        t.model_copy(update={**measured, "quality": quality(t.quality["psnr"].mean)})
        for t in content.trials[:12]
    )
    points = [
        point(content, trial, speedup, psnr)
        for trial, speedup, psnr in zip(
            trials[1:4], (1.5, 1.8, 2.4), (40.0, 30.0, 31.0), strict=True
        )
    ]
    points[1] = points[1].model_copy(update={"dominated": True})
    settings = content.study.settings
    return Curve(
        hardware=settings.hardware,
        software=settings.software,
        workload=settings.workload,
        metric="psnr",
        also=also,
        study=content.study.name,
        plain_ms=18_930.0,
        search_videos=3,
        proof_videos=8,
        trials=trials,
        points=tuple(points),
        cost=Cost(profile=SPENT, search=SPENT, proof=SPENT, forwards_per_video=100),
        created_at=content.study.created_at,
    )


def test_the_page_says_what_every_point_gave(content: ReportContent) -> None:
    said = text_of(page.render(drawn(content)))
    for part in (
        "2 points from 1.50x at PSNR 40 dB to 2.40x at PSNR 31 dB",
        "plain 1.00x \u2013 100 \u2013 \u2013",
        "1 1.50x 1.35x to 1.65x 40 38.5 36",
        "2, dominated 1.80x",
        "12 policies on 3 videos each",
        "3 policies on 8 further videos each",
        "18.9 s",
        "The plain pipeline equals itself and is drawn at the upper edge.",
    ):
        assert part in said
    assert "memory" not in said
    assert "energy" not in said


def test_the_plain_pipeline_does_not_set_the_scale(content: ReportContent) -> None:
    html = page.render(drawn(content))
    found = re.search(r'id="plots">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    figure = json.loads(found[1])["figures"]["quality"]
    (plain,) = (trace for trace in figure["data"] if trace["name"] == "plain pipeline")
    low, high = figure["layout"]["yaxis"]["range"]
    assert plain["y"] == [high]
    assert low < 31.0 - 1.5
    assert high < 60.0


@pytest.mark.parametrize(
    ("also", "title", "cells"),
    [
        ("memory", "Speed against peak memory, MiB", ("2.0 MiB", "3.0 MiB")),
        ("energy", "Speed against energy per video, J", ("400 J", "250 J")),
    ],
)
def test_a_third_objective_has_a_chart_and_a_column(
    content: ReportContent, also: Also, title: str, cells: tuple[str, str]
) -> None:
    html = page.render(drawn(content, also))
    assert html.count("data-chart=") == 2
    assert all(part in text_of(html) for part in (title, *cells))


def test_one_point_or_none_is_a_page_too(content: ReportContent) -> None:
    whole = drawn(content)
    alone = whole.model_copy(update={"points": whole.points[:1]})
    assert page.headline(alone) == "One point: 1.50x at PSNR 40 dB"
    none = whole.model_copy(update={"points": (), "trials": whole.trials[:1]})
    assert "No policy was found" in text_of(page.render(none))


def test_a_trial_that_could_not_run_is_told_and_not_drawn(content: ReportContent) -> None:
    whole = drawn(content, "memory")
    unfit = {
        "policy": Policy(),
        "quality": {},
        "peak_bytes": None,
        "reason": f"it cannot run here: {HOSTILE}",
    }
    trials = (*whole.trials[:-1], whole.trials[-1].model_copy(update=unfit))
    html = page.render(whole.model_copy(update={"trials": trials}))
    assert "it cannot run here: &lt;img" in html
    assert HOSTILE not in html
    assert "trial 11" not in html  # among the numbers of the charts


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_it_draws_in_a_browser_and_asks_for_nothing(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "curve.html"
    page.write(drawn(build(hostile=True), "memory"), path)
    wrong: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab = browser.new_page(viewport={"width": 390, "height": 900})
        tab.on("request", lambda r: wrong.append(r.url) if r.url != path.as_uri() else None)
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("dialog", lambda dialog: wrong.append(dialog.message))
        tab.goto(path.as_uri())
        tab.wait_for_function("document.querySelectorAll('.plot .main-svg').length >= 2")
        points = tab.locator("[data-chart=quality] .scatterlayer .point").count()
        assert points == 11 + 1 + 3  # searched, plain, proved
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        browser.close()
    assert [url for url in wrong if not url.startswith("data:")] == []
