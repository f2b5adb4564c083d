"""The page as text, and as a file."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from plotly.offline import get_plotlyjs_version

from ditune.db.cost import Cost, Spent
from ditune.db.errors import UsageFault
from ditune.db.records import SearchFigures
from ditune.reports import page
from ditune.reports.content import Expected, FrameStrip, ReportContent, TierShown

Build = Callable[..., ReportContent]
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def templates() -> Path:
    return Path(page.__file__).parent / "templates"


def text_of(html: str) -> str:
    """Return what a person reads, without the markup and on one line."""
    body = re.sub(r"<(script|style).*?</\1>", "", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_summary_says_what_where_how_fast_and_how_good(content: ReportContent) -> None:
    assert "Its caches hold 1.5 MiB." in page.render(replace(content, cache_bytes=3 * 2**19))
    said = text_of(page.render(content))
    for part in (
        "WanPipeline was tuned on NVIDIA H100 80GB HBM3 (832 \u00d7 480 px, 81 frames, 50 steps).",
        "10.1 s instead of 18.9 s: 1.87x as fast, 95 % interval 1.81x to 1.93x over 48 ",
        "PSNR 31.12 dB (floor 30), PSNR of the worst prompt 26.4 dB (floor 25)",
        "Status: measured",
        "Of 50 steps 23 run in full",
        "32 instead of 50 steps",
        "4f1c2ab7d09e3c5586f1b2a4c7d8e9f001122334",
        "seed 1234",
        "One call takes 18.9 s in the median over 4 prompts. Status of this section: measured.",
    ):
        assert part in said


def test_no_policy_is_a_result(build: Build) -> None:
    said = text_of(page.render(build(found=False)))
    assert "WanPipeline: no policy held the floors" in said
    assert "no feasible policy" in said
    assert re.search(r"The best seen Trial \d+ came nearest: 1\.\d+x as fast in the search", said)
    assert "it missed: PSNR" in said
    assert "Before and after" not in said


def test_tiers_stand_beside_each_other(content: ReportContent) -> None:
    assert "Tiers" not in text_of(page.render(content))
    study = content.study.model_copy(update={"tier": "high"})
    floors = study.settings.constraints
    harder = (floors[0].model_copy(update={"floor": 60.0}),)
    tiers = (
        TierShown("high", floors, content.chosen),
        TierShown("<b>never</b>", harder, None),
    )
    said = text_of(page.render(replace(content, study=study, tiers=tiers)))
    assert content.chosen is not None
    for part in (
        "The first one is also the default. All else on this page is about high.",
        "tier floors speedup 95 % interval quality policy high psnr>=30, psnr_worst>=25, "
        "judge>=-0.01 1.87x 1.81x to 1.93x psnr 31.12, psnr_worst 26.4, judge -0.0021",
        content.chosen.policy_id[:19],
        "<b>never</b> psnr>=60 \u2013 \u2013 \u2013 none held the floors",
    ):
        assert part in said


def test_a_broken_floor_is_not_called_held(content: ReportContent) -> None:
    assert content.chosen is not None
    evidence = content.chosen.evidence
    low = evidence.quality["psnr"].model_copy(update={"mean": 29.0})
    worse = evidence.model_copy(
        update={"quality": {**evidence.quality, "psnr": low}, "status": "simulated"}
    )
    chosen = content.chosen.model_copy(update={"evidence": worse})
    said = text_of(page.render(replace(content, chosen=chosen)))
    assert "every floor held" not in said
    assert "Not held: PSNR." in said
    assert "Status: simulated" in said


def test_a_study_without_trials_still_has_a_page(build: Build) -> None:
    empty = replace(build(found=False), trials=())
    assert "No trial ran to its end" in text_of(page.render(empty))


def test_a_profile_without_figures_still_has_a_page(content: ReportContent) -> None:
    profile = content.profile.model_copy(update={"layers": (), "redundancy": ()})
    html = page.render(replace(content, profile=profile))
    assert 'data-chart="trials"' in html
    assert 'data-chart="redundancy"' not in html


def test_scripts_are_those_whose_hashes_are_allowed(content: ReportContent) -> None:
    html = page.render(content)
    allowed = re.search(r"script-src ([^\"]+)", html)
    assert allowed is not None
    policy = unescape(allowed[1])
    assert "unsafe" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert [f"'sha256-{found}'" for found in hashes] == policy.split()


def test_plotly_has_the_major_version_that_checks_the_figures(templates: Path) -> None:
    header = (templates / "plotly-cartesian.min.js").read_text(encoding="utf-8")[:200]
    found = re.search(r"v(\d+)\.", header)
    assert found is not None
    assert get_plotlyjs_version().split(".")[0] == found[1]
    assert "MIT" in header
    assert "MIT License" in (templates / "plotly-cartesian.LICENSE.txt").read_text("utf-8")


def test_a_page_is_small(build: Build) -> None:
    content = build()
    many = tuple(content.trials[2].model_copy(update={"number": n}) for n in range(1200))
    noise = np.random.default_rng(0).integers(0, 256, (8, 90, 160, 3), dtype=np.uint8)
    frames = tuple(FrameStrip(f"prompt {n}", noise, noise) for n in range(4))
    html = page.render(replace(content, trials=many, frames=frames))
    assert len(html.encode()) <= 3 * MEGABYTE
    assert "the best 500 of 1200" in text_of(html)


def test_write_replaces_and_leaves_no_draft(content: ReportContent, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    page.write(content, path)
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [path] == list(tmp_path.iterdir())


def test_a_missing_folder_is_the_callers_fault(content: ReportContent, tmp_path: Path) -> None:
    with pytest.raises(UsageFault, match="name a file in a folder that exists"):
        page.write(content, tmp_path / "nowhere" / "report.html")


def test_a_folder_in_place_of_the_file(content: ReportContent, tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UsageFault, match=r"report\.html"):
        page.write(content, tmp_path / "report.html")
    assert [tmp_path / "report.html"] == list(tmp_path.iterdir())


def test_the_page_says_whether_the_speedup_is_what_its_work_lets_expect(
    content: ReportContent,
) -> None:
    assert content.chosen is not None
    measured = content.chosen.evidence.speedup.median
    parts = {"transformer": 900.0, "text encoder": 20.0, "decoder": 60.0, "everything else": 20.0}
    near = replace(content, expected=Expected(2.0, measured * 1.04, parts))
    said = text_of(page.render(near))
    assert "runs 50% of the transformer's blocks" in said
    assert "decoder 60" in said
    assert "gaps on the host" not in said
    far = replace(content, expected=Expected(2.0, measured * 1.5, parts))
    assert "33% less: gaps on the host" in text_of(page.render(far))


def test_the_page_shows_what_the_search_saw_and_what_all_took(content: ReportContent) -> None:
    assert "No part of this proof" not in text_of(page.render(content))
    assert "The session took" not in text_of(page.render(content))
    assert content.chosen is not None
    chosen, spent = content.chosen, Spent(seconds=100.0, videos=10.0)
    quality = {"psnr": chosen.evidence.quality["psnr"].model_copy(update={"mean": 33.3, "n": 3})}
    seen = SearchFigures(trials=80, prompts=3, pairs=1, speedup=2.2, quality=quality)
    evidence = chosen.evidence.model_copy(update={"search": seen})
    cost = Cost(profile=spent, search=spent, proof=spent, forwards_per_video=100)
    shown = replace(content, chosen=chosen.model_copy(update={"evidence": evidence}), cost=cost)
    said = text_of(page.render(shown))
    assert "No part of this proof: The search, which chose among 80 policies, saw 2.20x" in said
    assert "The session took 300 s (profile 100 s" in said
    assert "3,000 forwards." in said
