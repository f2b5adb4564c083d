"""The page in a real browser: what it draws, what it must not do, and whether it is accessible."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Dialog, Page, Request, sync_playwright

from ditune.reports import page
from ditune.reports.content import ReportContent

Build = Callable[..., ReportContent]
Seen = list[str]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
CHARTS = ("trials", "redundancy", "parts", "blocks")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., tuple[Page, Seen]]]:
    """Return a function that opens content and the list of all it did that a page must not do."""
    opened: list[Page] = []

    def opener(content: ReportContent, width: int = 1440, **options: Any) -> tuple[Page, Seen]:
        path = tmp_path / "report.html"
        page.write(content, path)
        tab = browser.new_page(viewport={"width": width, "height": 900}, **options)
        opened.append(tab)
        seen: Seen = []
        watch(tab, seen)
        tab.goto(path.as_uri())
        tab.wait_for_function(
            "n => document.querySelectorAll('.plot .main-svg').length >= n", arg=len(CHARTS)
        )
        return tab, seen

    yield opener
    for tab in opened:
        tab.close()


def watch(tab: Page, seen: Seen) -> None:
    """Write down messages, errors, dialogs and everything that is loaded besides the page."""

    def dialog(shown: Dialog) -> None:
        seen.append(f"dialog: {shown.message}")
        shown.dismiss()

    def request(sent: Request) -> None:
        if not sent.url.startswith("data:") and not sent.url.endswith("/report.html"):
            seen.append(f"request: {sent.url[:80]}")

    tab.on("console", lambda said: seen.append(f"console {said.type}: {said.text}"))
    tab.on("pageerror", lambda fault: seen.append(f"error: {fault}"))
    tab.on("dialog", dialog)
    tab.on("request", request)


def count(tab: Page, selector: str) -> int:
    """Return how many elements there are."""
    return tab.locator(selector).count()


@pytest.mark.parametrize("hostile", [False, True])
def test_it_draws_and_does_nothing_else(
    build: Build, show: Callable[..., tuple[Page, Seen]], hostile: bool
) -> None:
    tab, seen = show(build(hostile=hostile))
    assert count(tab, "[data-chart=trials] .scatterlayer .point") == 80 + 2
    assert count(tab, "[data-chart=redundancy] .scatterlayer .point") == 3 * 49
    assert count(tab, "[data-chart=redundancy] .barlayer .point") == 50
    assert count(tab, "[data-chart=parts] .barlayer .point") == 3
    assert count(tab, "[data-chart=blocks] .barlayer .point") == 40
    assert count(tab, ".strip svg[role=img] rect") == 50
    tab.mouse.move(600, 400)
    assert seen == []


def test_hostile_text_is_shown_as_text(
    build: Build, show: Callable[..., tuple[Page, Seen]]
) -> None:
    content = build(hostile=True)
    tab, _ = show(content)
    assert [strip.prompt for strip in content.frames[:4]] == tab.locator(
        ".frames figcaption"
    ).all_inner_texts()[:4]
    body = tab.locator("body").inner_text()
    assert "\\x1b[31mred" in body and "safe\\u202egnp.exe" in body and "{{ 7 * 7 }}" in body
    for char in "\x1b\u202e\u2066":
        assert char not in body
    assert count(tab, "main b, main img:not([src^='data:image/png']), main a") == 0
    drawn = tab.locator(".plot .ytick text").all_text_contents()
    assert any("<b>bold</b>" in label for label in drawn)


def test_nothing_offers_to_share(
    content: ReportContent, show: Callable[..., tuple[Page, Seen]]
) -> None:
    tab, _ = show(content)
    tab.locator("[data-chart=trials]").hover()
    titles = "[data-title*='hare' i], [data-title*='loud' i], [title*='hare' i], [title*='loud' i]"
    assert count(tab, f"{titles}, .modebar-btn, button, form, iframe") == 0
    assert count(tab, "a[href]:not([href^='#'])") == 0


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("hostile", [False, True])
def test_the_page_never_scrolls_sideways(
    build: Build, show: Callable[..., tuple[Page, Seen]], width: int, hostile: bool
) -> None:
    tab, _ = show(build(hostile=hostile), width)
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert width == tab.evaluate("document.documentElement.scrollWidth")


@pytest.mark.parametrize(("found", "scheme"), [(True, "light"), (True, "dark"), (False, "light")])
def test_axe_finds_nothing_serious(
    build: Build, show: Callable[..., tuple[Page, Seen]], scheme: str, found: bool
) -> None:
    content = build(found=found)
    few = replace(content, trials=content.trials[:12])  # axe looks at every cell
    tab, _ = show(few, color_scheme=scheme, bypass_csp=True)
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    violations = Axe().run(tab).response["violations"]
    grave = [v for v in violations if v["impact"] in ("serious", "critical")]
    assert [(v["id"], v["nodes"][0]["html"][:200]) for v in grave] == []


def test_charts_follow_the_scheme_and_print_in_light(
    content: ReportContent, show: Callable[..., tuple[Page, Seen]]
) -> None:
    colour = "getComputedStyle(document.querySelector('[data-chart=blocks] .barlayer path')).fill"
    tab, seen = show(content, color_scheme="light")
    light = tab.evaluate(colour)
    tab.emulate_media(color_scheme="dark")
    tab.wait_for_function(f"light => {colour} !== light", arg=light)
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert light == tab.evaluate(colour)
    assert seen == []


def test_every_disclosure_is_reached_by_keyboard(
    content: ReportContent, show: Callable[..., tuple[Page, Seen]]
) -> None:
    tab, _ = show(content)
    reached = set()
    for _ in range(20):
        tab.keyboard.press("Tab")
        reached.add(tab.evaluate("document.activeElement.innerText.split('\\n')[0]"))
    assert {"Skip to the result", "Steps in words", "All trials with their policies"} <= reached
    tab.locator("summary", has_text="Steps in words").press("Enter")
    assert tab.get_by_text("Steps 1 to 8 full; 9 step").is_visible()


def test_without_scripts_the_numbers_are_there(
    content: ReportContent, browser: Browser, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    page.write(content, path)
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(path.as_uri())
    tab.get_by_text("Numbers of this chart").first.click()
    assert tab.get_by_role("region", name="Numbers: Every policy tried").is_visible()
    context.close()
