"""The page of a comparison: what it says, and what foreign names cannot do in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright
from tests.db.conftest import HARDWARE, SOFTWARE, WORKLOAD
from tests.reports.test_browser import CHROMIUM, FLAGS

from ditune.db.comparison import Comparison, Contender, Lead, Standing
from ditune.db.records import Constraint, Interval, Quality
from ditune.reports import rivals

HOSTILE = "<img src=x onerror=alert(1)>"
FLOORS = (
    Constraint(metric="psnr", statistic="mean", floor=35.0),
    Constraint(metric="psnr", statistic="worst", floor=27.0),
)


def interval(median: float) -> Interval:
    return Interval(median=median, ci95=(0.95 * median, 1.05 * median), n=40)


def quality(psnr: float) -> dict[str, Quality]:
    return {
        "psnr": Quality(floor=None, mean=psnr, worst=psnr - 4, n=40),
        "ssim": Quality(floor=None, mean=psnr / 50, worst=psnr / 60, n=40),
    }


@pytest.fixture
def comparison() -> Comparison:
    def standing(peer: str, setting: str | None, work: float, psnr: float) -> Standing:
        found = setting is not None
        return Standing(
            peer=peer,
            floors=FLOORS,
            setting=setting,
            reason="" if found else f"{peer} crashed: {HOSTILE}",
            work_ratio=interval(work),
            speedup=interval(0.9 * work),
            quality=quality(psnr) if found else {},
            holds=found,
        )

    return Comparison(
        hardware=HARDWARE,
        software=SOFTWARE,
        workload=WORKLOAD,
        threads=2,
        calibration=3,
        confirmation=8,
        held_out=40,
        contenders=tuple(
            Contender(
                peer=peer,
                setting=f"threshold {t:g} {HOSTILE}",
                work_ratio=1 + t,
                quality=quality(60 - 10 * t),
                n=1,
            )
            for peer in ("SeaCache", HOSTILE)
            for t in (0.5, 1.0, 2.0)
        ),
        standings=(
            standing("SeaCache", "threshold 2", 3.0, 40.0),
            standing("broken", None, 1.0, 0.0),
            standing("ditune", "0a1b2c", 4.5, 38.0),
        ),
        leads=(
            Lead(
                floors=FLOORS,
                best_by_work="SeaCache",
                work=interval(1.5),
                best_by_speed="SeaCache",
                speed=interval(1.4),
            ),
        ),
        created_at="2026-01-02T03:04:05Z",
    )


def test_the_page_says_who_is_ahead_and_by_how_much(comparison: Comparison) -> None:
    html = rivals.render(comparison)
    assert "<h1>1.40x as fast as the best peer at the same quality</h1>" in html
    assert "1.50x less work than SeaCache" in html
    assert html.index("0a1b2c") < html.index("threshold 2</td>")  # least work first
    assert "PSNR ≥ 35 dB" in html
    assert HOSTILE not in html
    assert "broken crashed: &lt;img" in html


def test_a_comparison_without_peers_is_a_page_too(comparison: Comparison) -> None:
    empty = comparison.model_copy(update={"contenders": (), "leads": (), "standings": ()})
    assert "Nothing was compared" in rivals.render(empty)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_it_draws_in_a_browser_and_asks_for_nothing(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "comparison.html"
    rivals.write(comparison, path)
    wrong: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.on("request", lambda r: wrong.append(r.url) if r.url != path.as_uri() else None)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(path.as_uri())
        page.wait_for_function("document.querySelectorAll('.plot .main-svg').length >= 2")
        browser.close()
    assert [url for url in wrong if not url.startswith("data:")] == []
